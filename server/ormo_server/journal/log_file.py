"""One log: lines are appended whole, or not at all."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from ormo_server.store.files import identity, is_at, sync


class LogFile:
    """A new file that grows by whole appends.

    Args:
        path: of the file, which must not exist.
        opening: what it begins with.

    Attributes:
        size_bytes: of all that is in it.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self, path: Path, opening: bytes) -> None:
        self._descriptor = new_file(path)
        self._path, self._identity = path, identity(self._descriptor)
        self.size_bytes = 0
        try:
            self.append(opening)
        except OSError:
            self.close()
            path.unlink()
            raise

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
        """Return when it is on the disk.

        Raises:
            OSError: see `synced`.
        """
        synced(os.fsync, self._descriptor)

    def refuse_if_gone(self) -> None:
        """See `refuse_if_gone`."""
        refuse_if_gone(self._path, self._identity)

    def close(self) -> None:
        """Let it go."""
        os.close(self._descriptor)


def refuse_if_gone(path: Path, known: tuple[int, int]) -> None:
    """Look whether what is written will be found.

    Raises:
        OSError: the file is not at this path any more: it goes as soon as this process ends, or is somewhere else.
    """
    if not is_at(path, known):
        raise OSError(errno.ESTALE, f"{path} was removed, moved or replaced while this server wrote to it")


def synced(sync: Callable[[int], None], descriptor: int) -> None:
    """Call an fsync.

    Raises:
        OSError: the disk did not take what the system had taken, for whatever reason, also for lack of room. The system
            may have let go of it, so that another fsync succeeds without it: nobody must try.
    """
    try:
        sync(descriptor)
    except OSError as error:
        raise OSError(errno.EIO, f"what was written may not be on the disk ({error.strerror})") from error


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
