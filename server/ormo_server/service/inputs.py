"""The way to the core: one input at a time, and none after a failure that may have left it half changed."""

import threading

from ormo_server.core.errors import NotReady, OrmoError
from ormo_server.core.state_machine import StateMachine
from ormo_server.service.streams import draining
from ormo_server.service.timed_lock import TimedLock

_RETRY_SECONDS = 2.0


class Inputs:
    """Holds the lock while an input is given to the machine.

    Args:
        machine: that takes them.
        lock: that whoever touches the machine holds.

    Attributes:
        closed: every input is refused from now on.
        broken: set if the state may be half changed, is not finite, or can't be kept: nothing may be served, or kept,
            from it.
        why_broken: a sentence.
    """

    def __init__(self, machine: StateMachine, lock: TimedLock) -> None:
        self.closed = False
        self.broken = threading.Event()
        self.why_broken = ""
        self._machine = machine
        self._lock = lock

    def __enter__(self) -> StateMachine:
        self._lock.__enter__()
        if self.closed:
            self._lock.__exit__()
            raise self.refusal()
        return self._machine

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, OrmoError):
            self.fail("an input failed, and the state may be half changed")
        self._lock.__exit__()

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
