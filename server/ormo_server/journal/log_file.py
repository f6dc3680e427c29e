"""One log: lines are appended whole, or not at all."""

import os
from pathlib import Path

from ormo_server.store.files import sync


class LogFile:
    """A new file that grows by whole appends.

    Args:
        path: of the file, which must not exist.

    Attributes:
        size_bytes: of all that was appended.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = new_file(path)
        self.size_bytes = 0

    def append(self, data: bytes) -> None:
        """Write all of this, or leave the file as it was.

        Raises:
            OSError: there is no room, or the disk does not take it.
        """
        rest, end = memoryview(data), self.size_bytes
        try:
            while rest:
                written = os.pwrite(self._descriptor, rest, end)
                rest, end = rest[written:], end + written
        except OSError:
            os.ftruncate(self._descriptor, self.size_bytes)
            raise
        self.size_bytes = end

    def sync(self) -> None:
        """Return when it is on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Let it go."""
        os.close(self._descriptor)


def new_file(path: Path) -> int:
    """The descriptor of a new file whose name is on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        sync(path.parent)
    except OSError:
        os.close(descriptor)
        path.unlink()
        raise
    return descriptor
