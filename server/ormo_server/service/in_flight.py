"""How many bytes of tensors each caller has under way."""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

from ormo_server.core.errors import TooMuchInFlight

RETRY_SECONDS = 1.0


class BytesInFlight:
    """Keeps one caller from taking all of the server's memory.

    Args:
        limit: bytes that each may have under way at a time; None for no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._bytes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def begin(self, caller: str, size: int) -> None:
        """So many bytes are about to come from, or go to, a caller.

        Raises:
            TooMuchInFlight: with those that are under way they are too many.
        """
        if self._limit is None:
            return
        with self._lock:
            under_way = self._bytes[caller]
            if under_way + size > self._limit:
                raise TooMuchInFlight(
                    f"{caller!r} has {under_way:,} bytes under way and wants {size:,} more, and max_bytes_in_flight is "
                    f"{self._limit:,}: end an exchange first, or raise it",
                    retry_seconds=RETRY_SECONDS,
                )
            self._bytes[caller] += size

    def end(self, caller: str, size: int) -> None:
        """They have arrived, or never will."""
        if self._limit is None:
            return
        with self._lock:
            self._bytes[caller] -= size
            if not self._bytes[caller]:
                del self._bytes[caller]

    @contextlib.contextmanager
    def during(self, caller: str, size: int) -> Iterator[None]:
        """As `begin`, and `end` afterwards."""
        self.begin(caller, size)
        try:
            yield
        finally:
            self.end(caller, size)
