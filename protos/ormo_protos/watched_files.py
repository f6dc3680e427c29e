"""Files that somebody replaces while a program runs: certificates, keys, tokens, lists of who may do what."""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0

T = TypeVar("T")
_Stamp = tuple[tuple[int, int, int] | None, ...]


class WatchedFiles(Generic[T]):
    """What some files say, read again when one of them is another. Looking takes microseconds, so look often.

    Files that can't be used, as when only one of a pair has been replaced yet, leave what was read before, and a line
    in the log. They are tried again now and then: they may be good, and this process out of descriptors.

    Args:
        paths: of the files.
        read: makes the value from them.
        unusable: what `read` raises for files that can't be used.

    Raises:
        what `read` raises: they can't be used at the start.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T], unusable: type[Exception]) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._unusable = unusable
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._value = read()
        self._version = 0
        self._again = math.inf

    @property
    def value(self) -> T:
        """What they say."""
        self._look()
        return self._value

    @property
    def version(self) -> int:
        """Rises with each change that could be used."""
        self._look()
        return self._version

    def _look(self) -> None:
        if self._stamp() == self._seen and time.monotonic() < self._again:
            return
        with self._lock:
            stamp = self._stamp()
            if stamp == self._seen and time.monotonic() < self._again:
                return
            names = ", ".join(map(str, self._paths))
            self._seen, self._again = stamp, math.inf
            try:
                self._value = self._read()
            except self._unusable as error:
                self._again = time.monotonic() + RETRY_SECONDS
                log.error("%s changed and can't be used, so what was read before stays in force: %s", names, error)
            else:
                self._version += 1
                log.info("%s changed and is in force", names)

    def _stamp(self) -> _Stamp:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - half the time of Path.stat, for each call of the server
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino)
