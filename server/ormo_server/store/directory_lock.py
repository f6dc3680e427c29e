"""One server at a time for a directory: two would write over each other's checkpoints."""

import fcntl
import os
from fnmatch import fnmatch
from pathlib import Path

from ormo_server.store.errors import StoreError
from ormo_server.store.files import identity, is_at, make_directory, sync

_OF_A_RUN = ("checkpoint-*", ".writing-checkpoint-*", "journal-damaged-*", "journal", "latest")


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

    def move_run_aside(self, to: str) -> Path | None:
        """Move what a run has left in the directory into a new folder there; nothing is removed.

        Args:
            to: the folder's name.

        Returns:
            The folder; None if no run had left anything.

        Raises:
            StoreError: something can't be moved. What was moved stays there.
        """
        directory = self._path.parent
        # Checkpoints first and `latest` last: after a crash in between, a start misses a checkpoint that these name and
        # says so, instead of going on with half a run.
        there = sorted(directory.iterdir())  # no glob: it leaves out a `latest` that points to nothing
        left = [path for pattern in _OF_A_RUN for path in there if fnmatch(path.name, pattern)]
        if not left:
            return None
        aside = directory / to
        try:
            aside.mkdir()
            for path in left:
                path.rename(aside / path.name)
            sync(aside)
            sync(directory)
        except OSError as error:
            raise StoreError(
                f"the run in {directory} can't be moved to {aside} ({error}): make room there, or choose another "
                "--directory for a new run"
            ) from error
        return aside

    def release(self) -> None:
        """Let another program have the directory."""
        self._file.close()
