"""What a worker or reader tells of itself while it works; who wants to know overrides a method."""

from collections.abc import Iterable
from typing import Literal

Stage = Literal["compute", "push", "wait", "pull"]
Outcome = Literal["applied", "discarded", "refused", "lost"]


class Observer:
    """Takes no notice. Methods are called from any thread."""

    def stages(self, times: Iterable[tuple[Stage, float]]) -> None:
        """Parts of a step are over: computing the gradient; pushing it, up to its result; waiting for the next
        parameters, up to their first byte; pulling them.

        Args:
            times: each of them with its seconds; those of an exchange come together, when that is over.
        """

    def blocked(self, seconds: float) -> None:
        """A step has waited so long for parameters; less than its exchange took, where others are in flight."""

    def stepped(self, outcome: Outcome) -> None:
        """A gradient was given to the server; `lost` if its result was, with the connection or the server."""

    def retried(self, cause: str) -> None:
        """A call failed and is made again.

        Args:
            cause: the server's reason, or gRPC's status code.
        """

    def rejoined(self) -> None:
        """The worker joined once more."""
