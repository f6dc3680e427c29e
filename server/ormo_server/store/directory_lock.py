"""One server at a time for a directory: two would write over each other's checkpoints."""

import fcntl
import os
from pathlib import Path

from ormo_server.store.errors import StoreError
from ormo_server.store.files import identity, is_at, make_directory


class DirectoryLock:
    """Held from its making to `release`, or to the end of the process however it ends.

    Args:
        directory: made if it is missing.

    Raises:
        StoreError: another process holds it, or the directory can't be written to.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".lock"
        try:
            make_directory(directory)
            self._file = self._path.open("a+")
        except OSError as error:
            raise StoreError(
                f"can't write to {directory}: {error.strerror}; make it writable or choose another --directory"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._holder()
            self._file.close()
            raise StoreError(
                f"{directory} is in use by another program (process {holder}): stop it or choose another --directory"
            ) from error
        self._identity = identity(self._file.fileno())
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def _holder(self) -> str:
        self._file.seek(0)
        return self._file.read() or "unknown"

    @property
    def holds(self) -> bool:
        """Whether no other program can have the directory: not if its file was removed, or the directory with it."""
        return is_at(self._path, self._identity)

    def release(self) -> None:
        """Let another program have the directory."""
        self._file.close()
