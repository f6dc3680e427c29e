"""The files that gradients' payloads are kept in."""

import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

from ormo_protos.tensors import Payload
from ormo_server.core.errors import NotReady
from ormo_server.journal.no_room import kept_back
from ormo_server.journal.placed_writer import PlacedWriter, place_after
from ormo_server.journal.records import GRADIENTS_NAME, StoredGradient, gradients_path, numbered


@dataclass(eq=False, slots=True)
class _File:
    """Each place in it is one gradient's, written once.

    Attributes:
        number: in its name.
        writer: of its bytes.
        end: bytes given out so far.
        users: gradients whose exchange is not over.
        last_log: the newest log that names a gradient of it.
        unsynced: written to since the last fsync.
    """

    number: int
    writer: PlacedWriter
    end: int = 0
    users: int = 0
    last_log: int = 0
    unsynced: bool = False


class GradientFiles:
    """Takes payloads from many threads at once.

    Args:
        directory: of the journal.

    Attributes:
        size_bytes: of all its files.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._next = 1 + max(numbered(directory, GRADIENTS_NAME), default=0)
        self._lock = threading.Lock()
        self._files: dict[int, _File] = {}
        self._current: _File | None = None
        self._closed = False
        self.size_bytes = 0

    def store(self, payload: Payload) -> StoredGradient:
        """Write a payload. Its file stays until `release` at least.

        Raises:
            DiskFull: there is no room for it.
            NotReady: they are closed.
        """
        layout, memory = payload.layout, payload.memory
        try:
            file, offset = self._place(layout.total_bytes)
        except OSError as error:
            raise kept_back(self._directory, error) from error
        try:
            file.writer.write(memory, offset)
        except OSError as error:
            self._done_with(file)
            raise kept_back(self._directory, error) from error
        file.unsynced = True  # from now on: an fsync before would not have had it
        return StoredGradient(
            file=file.number,
            offset=offset,
            size=layout.total_bytes,
            checksum=zlib.crc32(memory),
            dtype=layout.dtype,
            with_buffers=layout.with_buffers,
        )

    def _place(self, size: int) -> tuple[_File, int]:
        with self._lock:
            if self._closed:
                raise NotReady(f"the journal in {self._directory} is closed: this server stops", retry_seconds=1.0)
            if self._current is None:
                self._current = _File(self._next, PlacedWriter(gradients_path(self._directory, self._next)))
                self._files[self._next] = self._current
                self._next += 1
            file = self._current
            before, offset = file.end, place_after(file.end, size)
            file.end = offset + size
            file.users += 1
            self.size_bytes += file.end - before
            return file, offset

    def release(self, stored: StoredGradient) -> None:
        """The exchange is over: the payload is needed only if a log names it."""
        self._done_with(self._files[stored.file])

    def _done_with(self, file: _File) -> None:
        with self._lock:
            file.users -= 1
            if self._closed and not file.users:
                file.writer.close()

    def named(self, stored: StoredGradient, log: int) -> None:
        """A line of this log names it."""
        self._files[stored.file].last_log = log

    def begin_file(self) -> None:
        """What comes from now on goes into a new file; else one that is always in use could never go."""
        with self._lock:
            self._current = None

    def sync(self) -> None:
        """Return when all that was stored so far is on the disk."""
        with self._lock:
            files = [file for file in self._files.values() if file.unsynced]
            for file in files:
                file.unsynced = False
        for file in files:
            file.writer.sync()

    def close_idle(self, *, unsynced: bool) -> None:
        """Give back the descriptors of files that nothing more is written to; they stay on the disk.

        Checkpoints that fail begin a new file each, and none of these goes before one is written.

        Not to be called while `sync` is.

        Args:
            unsynced: also those that `sync` would see to.
        """
        with self._lock:
            for file in self._files.values():
                if file is not self._current and not file.users and (unsynced or not file.unsynced):
                    file.writer.close()

    def refuse_if_gone(self) -> None:
        """Look whether what is stored now will be found.

        Raises:
            OSError: the file was removed, moved or replaced.
        """
        with self._lock:
            current = self._current
        # It is let go of by `let_go_before` alone, and not while it is the current one or this is called.
        if current is not None:
            current.writer.refuse_if_gone()

    def let_go_before(self, log: int) -> list[Path]:
        """The files that only older logs name, and those of earlier servers: nobody uses them any more.

        Not to be called while `sync` is.
        """
        with self._lock:
            old = [file for file in self._files.values() if self._is_needless(file, log)]
            for file in old:
                file.writer.close()
                self.size_bytes -= self._files.pop(file.number).end
            found = numbered(self._directory, GRADIENTS_NAME)
            return [path for number, path in found.items() if number < self._next and number not in self._files]

    def _is_needless(self, file: _File, log: int) -> bool:
        return file is not self._current and not file.users and file.last_log < log

    def close(self) -> None:
        """Let the files go, each when nobody writes to it any more."""
        with self._lock:
            for file in self._files.values():
                if not self._closed and not file.users:
                    file.writer.close()
            self._closed = True
