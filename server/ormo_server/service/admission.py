"""What gradients must keep to besides being finite, and what becomes of workers whose gradients often do not."""

from dataclasses import dataclass, replace

from ormo_server.core.errors import NormTooLarge, UnsoundWorker
from ormo_server.core.inputs import Requester
from ormo_server.service.transfers import ReceivedGradient


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of a run.

    Attributes:
        norm: the largest Euclidean norm of a gradient; None for any that leaves the model finite.
        clips: whether a longer gradient is scaled down to it; else it is refused.
        refused_share: a worker is sent away once more than this share of its gradients, smoothed, was refused as
            unsound; None for never.
    """

    norm: float | None = None
    clips: bool = True
    refused_share: float | None = None

    def exceeded_by(self, push: ReceivedGradient) -> bool:
        """Whether a finite gradient is longer than the bound."""
        return self.norm is not None and push.norm is not None and push.norm > self.norm

    def clipped(self, push: ReceivedGradient) -> ReceivedGradient:
        """The gradient scaled down to the bound, in its payload."""
        assert self.norm is not None
        assert push.norm is not None
        push.payload.parameters.mul_(self.norm / push.norm)
        return replace(push, norm=self.norm)

    def too_large(self, requester: Requester, push: ReceivedGradient) -> NormTooLarge:
        """The refusal of a longer gradient."""
        return NormTooLarge(
            f"the gradient of worker {requester.worker!r}, request {requester.request}, has norm {push.norm:.4g}, and "
            f"this run takes gradients of a norm up to {self.norm:g}: it was not applied; its ticket stays valid, "
            "unless the exchange asked for the next one. Clip the gradient, or raise --max-gradient-norm of the server",
            worker=requester.worker,
        )


class UnsoundWorkers:
    """The processes that were sent away. A new process of the same worker may try again."""

    def __init__(self) -> None:
        self._incarnations: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._incarnations)

    def add(self, requester: Requester) -> None:
        """Send a process away, from its next call on."""
        self._incarnations[requester.worker] = requester.incarnation

    def has(self, worker: str, incarnation: int) -> bool:
        """Whether this process was sent away."""
        return self._incarnations.get(worker) == incarnation

    def refusal(self, worker: str) -> UnsoundWorker:
        """What it is told."""
        return UnsoundWorker(
            f"too many gradients of worker {worker!r} were not finite or too large, so this process was sent away: see "
            "to its data, its device or its precision and start it again, or raise --max-refused-share of the server"
        )
