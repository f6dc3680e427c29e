"""The one lock of a run: who holds it may give the state machine inputs. And the clock that inputs are told by."""

import contextlib
import threading
import time
from collections.abc import Iterator

from ormo_server.core.errors import NotReady, OrmoError
from ormo_server.core.machine import StateMachine
from ormo_server.metrics.families import Upkeep
from ormo_server.service.streams import draining

_RETRY_SECONDS = 2.0


class MachineLock:
    """Gives its holder the machine, one thread at a time, and none after a failure that may have left it half changed.

    Args:
        machine: that takes inputs.
        upkeep: where waits and holds are counted.

    Attributes:
        closed: every input is refused from now on.
        broken: set if the state may be half changed, is not finite, or can't be kept: nothing may be served, or kept,
            from it.
        why_broken: a sentence.
        waited_seconds: of whoever holds it now.
    """

    def __init__(self, machine: StateMachine, upkeep: Upkeep) -> None:
        self.closed = False
        self.broken = threading.Event()
        self.why_broken = ""
        self.waited_seconds = 0.0
        self._machine = machine
        self._upkeep = upkeep
        self._lock = threading.Lock()
        self._since = 0.0

    def __enter__(self) -> StateMachine:
        self._acquire()
        if self.closed:
            self._release()
            raise self.refusal()
        return self._machine

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, OrmoError):
            self.fail("an input failed, and the state may be half changed")
        self._release()

    @contextlib.contextmanager
    def reading(self) -> Iterator[StateMachine]:
        """The machine to read from, held still, also once inputs are refused."""
        self._acquire()
        try:
            yield self._machine
        finally:
            self._release()

    def _acquire(self) -> None:
        asked = time.perf_counter()
        self._lock.acquire()
        self._since = time.perf_counter()
        self.waited_seconds = self._since - asked

    def _release(self) -> None:
        waited, held = self.waited_seconds, time.perf_counter() - self._since
        self._lock.release()
        # After it: whoever is next need not wait for what people want to know.
        self._upkeep.lock_wait_seconds.note(waited)
        self._upkeep.lock_held_seconds.note(held)

    def fail(self, why: str) -> None:
        """The state must not be used any more. The first reason is the one that is told."""
        self.why_broken = self.why_broken or why
        self.closed = True
        self.broken.set()

    def refusal(self) -> OrmoError:
        """What inputs are refused with once they are."""
        if not self.why_broken:
            return draining()
        return NotReady(f"{self.why_broken}: the server stops, try again later", retry_seconds=_RETRY_SECONDS)


class RunClock:
    """Seconds that the run has been served, over all restarts: what inputs carry.

    It follows the monotonic clock, so that jumps of the wall clock do not matter.

    Args:
        start_seconds: what it shows at first; a restored run goes on where its checkpoint was.
    """

    def __init__(self, start_seconds: float = 0.0) -> None:
        self._offset = start_seconds - time.monotonic()

    def __call__(self) -> float:
        """Seconds now."""
        return time.monotonic() + self._offset
