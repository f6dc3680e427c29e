"""Where the first model comes from: one worker at a time is asked for it."""

import threading

from ormo_server.core.errors import NotWanted

# How long the others wait before they ask again.
WAIT_SECONDS = 0.5


class ModelOffers:
    """Remembers who is asked for the model, on a lease that its bytes renew. Time is an argument.

    Args:
        lease_seconds: how long the asked worker may be silent.
    """

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._asked: tuple[str, int] | None = None
        self._until = 0.0
        self._lock = threading.Lock()

    def ask(self, worker: str, incarnation: int, now: float) -> bool:
        """Whether this worker is the one to send its model. Asking again renews nothing: its bytes must come."""
        with self._lock:
            if now >= self._until:
                self._asked, self._until = (worker, incarnation), now + self.lease_seconds
            return self._asked == (worker, incarnation)

    def renew(self, worker: str, incarnation: int, now: float) -> None:
        """Bytes came.

        Raises:
            NotWanted: this worker was not asked, or was silent for so long that another one was.
        """
        with self._lock:
            if self._asked != (worker, incarnation):
                raise NotWanted(
                    f"worker {worker!r} is not the one that was asked for the model, or was silent for more than "
                    f"{self.lease_seconds:g} s: join again"
                )
            self._until = now + self.lease_seconds

    def give_up(self, worker: str, incarnation: int) -> None:
        """The worker's offer failed: whoever asks next is asked, unless another one is asked already."""
        with self._lock:
            if self._asked == (worker, incarnation):
                self._until = 0.0
