"""A lock that says how long it was waited for and held."""

import threading
import time

from ormo_server.metrics.upkeep import Upkeep


class TimedLock:
    """A mutual exclusion lock.

    Args:
        upkeep: where waits and holds are counted.

    Attributes:
        waited_seconds: of whoever holds it now.
    """

    def __init__(self, upkeep: Upkeep) -> None:
        self.waited_seconds = 0.0
        self._wait = upkeep.lock_wait_seconds
        self._held = upkeep.lock_held_seconds
        self._lock = threading.Lock()
        self._since = 0.0

    def __enter__(self) -> None:
        asked = time.perf_counter()
        self._lock.acquire()
        self._since = time.perf_counter()
        self.waited_seconds = self._since - asked
        self._wait.observe(self.waited_seconds)

    def __exit__(self, *_: object) -> None:
        held = time.perf_counter() - self._since
        self._lock.release()
        self._held.inc(held)
