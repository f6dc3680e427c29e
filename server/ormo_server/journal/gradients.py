"""Gradients on the disk: in their lines if they are small, else at places in files, written while they arrive."""

import contextlib
import mmap
import os
import threading
import zlib
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ormo_protos.limits import CHUNK_BYTES
from ormo_protos.tensors import Payload
from ormo_runtime.process import StartedPool
from ormo_server.core.errors import NotReady
from ormo_server.journal.files import kept_back, new_file, refuse_if_gone, sync_or_fail
from ormo_server.journal.records import GRADIENTS_NAME, GradientInLine, StoredGradient, gradients_path, numbered
from ormo_server.store.files import identity

# Gradients go to places of their own in one file, large ones past the page cache: they are read again only after a
# crash. Measured with 45 MB on ext4: 16 ms, of which the processor works 2; through the cache 10 ms, all work, and
# as much again until they are on the disk; in one piece the cache took 100 ms. Below some 256 KiB the cache is faster,
# and up to a chunk where nobody waits for the disk and nothing else arrives meanwhile: 0.2 against 0.5 ms with 1 MB.

_WRITERS = 4
_BLOCK_BYTES = mmap.PAGESIZE
_LARGE_BYTES = 256 << 10
_CACHED_AT_ONCE_BYTES = 1 << 20
_DIRECT: int | None = getattr(os, "O_DIRECT", None)  # Linux


def place_after(end: int, size: int) -> int:
    """Where the next place begins: a large one with a block, since nothing smaller goes past the page cache."""
    return -(-end // _BLOCK_BYTES) * _BLOCK_BYTES if size >= _LARGE_BYTES else end


class PlacedWriter:
    """Writes to places that do not overlap, from any thread and without a lock.

    Args:
        path: where to make the file; nothing may be there yet.
        direct_bytes: how large what goes past the page cache is at least, where the file system can do that.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self, path: Path, direct_bytes: int) -> None:
        self._descriptor = new_file(path)
        self._direct_bytes = direct_bytes
        self._path, self._identity = path, identity(self._descriptor)
        self._direct: int | None = None
        self._closed = False
        if _DIRECT is not None:
            with contextlib.suppress(OSError):  # not every file system can
                self._direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC | _DIRECT)

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at this offset of the file.

        Raises:
            OSError: there is no room, or the disk does not take it.
        """
        done = self._write_directly(data, offset)
        while done < len(data):
            piece = data[done : done + _CACHED_AT_ONCE_BYTES]
            done += os.pwrite(self._descriptor, piece, offset + done)

    def _write_directly(self, data: memoryview, offset: int) -> int:
        aligned = len(data) - len(data) % _BLOCK_BYTES
        if self._direct is None or aligned < self._direct_bytes or _address(data) % _BLOCK_BYTES:
            return 0
        try:
            done = 0
            while done < aligned:
                done += os.pwrite(self._direct, data[done:aligned], offset + done)
        except OSError:
            return 0  # the caller writes through the cache; what is wrong with the disk itself fails there again
        return done

    def sync(self) -> None:
        """Return when all that was written is on the disk; raises as `sync_or_fail` does."""
        sync_or_fail(os.fdatasync, self._descriptor)

    def refuse_if_gone(self) -> None:
        """Fail if what is written here would not be found after a restart, as the function of this name says."""
        refuse_if_gone(self._path, self._identity)

    def close(self) -> None:
        """Close the file, which stays on the disk; may be called again."""
        if self._closed:
            return
        self._closed = True
        os.close(self._descriptor)
        if self._direct is not None:
            os.close(self._direct)


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data)


@dataclass(eq=False, slots=True)
class _File:
    """A file of gradients: each place in it is one gradient's, and the next one's if it is given up.

    Attributes:
        number: the number in the file's name.
        writer: writes the bytes.
        end: where the next place can begin, in bytes.
        users: gradients in it whose exchange is not over; the file stays open as long as there are any.
        last_log: the newest log with a line that names a gradient of this file; the file stays as long as that log.
        unsynced: whether it was written to since the last fsync.
    """

    number: int
    writer: PlacedWriter
    end: int = 0
    users: int = 0
    last_log: int = 0
    unsynced: bool = False


class StoringInLine:
    """A small payload on its way to its line: as `StoringInFile`, but nothing is to be done before all has come."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload

    def advance(self, received_bytes: int) -> None:
        """So many bytes have come."""

    def finish(self) -> GradientInLine:
        """All has come: a copy of it, as the payload's memory is used again before the line is written."""
        layout = self._payload.layout
        return GradientInLine(payload=bytes(self._payload.memory), dtype=layout.dtype, with_buffers=layout.with_buffers)

    def give_up(self) -> None:
        """It will not be stored."""


class StoringInFile:
    """A payload on its way to its place, for the one thread that receives it.

    Large pieces are written by threads of their own while that one computes their checksum, and receives the next.

    Args:
        files: where the place is.
        file: of them.
        before: where the places in the file ended without this one.
        offset: where the payload goes in it.
        payload: must not change, nor be used for anything else, before `finish` or `give_up` has returned.
    """

    def __init__(self, files: "GradientFiles", file: _File, before: int, offset: int, payload: Payload) -> None:
        self._files = files
        self._file = file
        self._before = before
        self._offset = offset
        self._payload = payload
        self._begun = 0  # bytes, from the payload's start, that are being written, or were
        self._checksum = 0
        self._writes: list[Future[None]] = []
        self._over = False

    def advance(self, received_bytes: int) -> None:
        """So many bytes have come, from the payload's start: write the pieces that are whole.

        Raises:
            NotReady: the files are closed.
        """
        while received_bytes - self._begun >= CHUNK_BYTES:
            self._write(CHUNK_BYTES)

    def finish(self) -> StoredGradient:
        """All has come: return when all is written. The file stays until `release` at least.

        Raises:
            DiskFull: there is no room for it.
            NotReady: the files are closed.
        """
        layout = self._payload.layout
        try:
            self.advance(layout.total_bytes)
            self._write(layout.total_bytes - self._begun)
            for each in self._writes:
                each.result()
        except OSError as error:
            self.give_up()
            raise kept_back(self._files.directory, error) from error
        self._over = True
        self._file.unsynced = True  # after the write: an fsync that clears the mark before would not cover these bytes
        return StoredGradient(
            file=self._file.number,
            offset=self._offset,
            size=layout.total_bytes,
            checksum=self._checksum,
            dtype=layout.dtype,
            with_buffers=layout.with_buffers,
        )

    def _write(self, size: int) -> None:
        piece, offset = self._payload.memory[self._begun : self._begun + size], self._offset + self._begun
        if size >= _LARGE_BYTES:
            self._writes.append(self._files.write(self._file.writer, piece, offset))
        else:  # another thread would take longer to begin
            self._file.writer.write(piece, offset)
        self._checksum = zlib.crc32(piece, self._checksum)
        self._begun += size

    def give_up(self) -> None:
        """It will not be stored, unless it was: nothing is written any more, and the place is free."""
        if not self._over:
            self._over = True
            wait(self._writes)
            self._files.take_back(self._file, self._before, self._offset + self._payload.layout.total_bytes)


Storing = StoringInFile | StoringInLine


class GradientFiles:
    """Takes payloads from many threads at once.

    Places are handed out under a lock of its own, which is held for no write: gradients are written side by side,
    before the engine's lock is taken. `sync` and `let_go_before` are for one thread at a time, which the journal's
    commit lock sees to.

    Args:
        directory: the journal's directory, which is there.
        waited_for: whether each gradient is until it is on the disk.
        in_line_bytes: how large a payload is at most that stands in its line, and in no file.

    Attributes:
        directory: as given.
        size_bytes: bytes in all files that were begun by this process and are still needed.

    Raises:
        RuntimeError: the system has no threads for it.
    """

    def __init__(self, directory: Path, *, waited_for: bool, in_line_bytes: int) -> None:
        self.directory = directory
        self._direct_bytes = _LARGE_BYTES if waited_for else CHUNK_BYTES
        self._in_line_bytes = in_line_bytes
        self._writers = StartedPool(_WRITERS, "gradients")
        self._next = 1 + max(numbered(directory, GRADIENTS_NAME), default=0)
        self._lock = threading.Lock()
        self._files: dict[int, _File] = {}
        self._current: _File | None = None
        self._closed = False
        self.size_bytes = 0

    def begin(self, payload: Payload) -> Storing:
        """A place for a payload; to be ended by `finish`, and then `release`, or by `give_up`.

        Raises:
            DiskFull: there is no room for another file.
            NotReady: they are closed.
        """
        size = payload.layout.total_bytes
        with self._lock:
            self._refuse_if_closed()
            if size <= self._in_line_bytes:
                return StoringInLine(payload)
            try:
                file = self._current = self._current or self._new_file()
            except OSError as error:
                raise kept_back(self.directory, error) from error
            before, offset = file.end, place_after(file.end, size)
            file.end = offset + size
            file.users += 1
            self.size_bytes += file.end - before
        return StoringInFile(self, file, before, offset, payload)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise NotReady(f"the journal in {self.directory} is closed: this server stops", retry_seconds=1.0)

    def _new_file(self) -> _File:
        writer = PlacedWriter(gradients_path(self.directory, self._next), self._direct_bytes)
        file = self._files[self._next] = _File(self._next, writer)
        self._next += 1
        return file

    def write(self, writer: PlacedWriter, piece: memoryview, offset: int) -> Future[None]:
        """Have a piece written by another thread.

        Raises:
            NotReady: they are closed.
        """
        with self._lock:  # so that the threads are there as long as it is not closed
            self._refuse_if_closed()
            return self._writers.submit(writer.write, piece, offset)

    def take_back(self, file: _File, before: int, end: int) -> None:
        """A place is not used after all: the next one can begin there, if none was handed out behind it."""
        with self._lock:
            if file.end == end:
                self.size_bytes -= end - before
                file.end = before
        self._done_with(file)

    def release(self, stored: StoredGradient) -> None:
        """Say that the exchange is over: from now on the payload is needed only if a log names it."""
        self._done_with(self._files[stored.file])

    def _done_with(self, file: _File) -> None:
        with self._lock:
            file.users -= 1
            if self._closed and not file.users:
                file.writer.close()

    def pin(self, stored: StoredGradient, log: int) -> None:
        """Keep the payload's file as long as this log, which has a line that names the payload.

        Called under the engine's lock, so logs come in order and the last one is the newest.
        """
        self._files[stored.file].last_log = log

    def begin_file(self) -> None:
        """Put what comes from now on into a new file; a file that is always in use could never be removed."""
        with self._lock:
            self._current = None

    def sync(self) -> None:
        """Return when all that was stored so far is on the disk."""
        with self._lock:
            files = [file for file in self._files.values() if file.unsynced]
            # Before the fsync: a write that comes during it marks the file again, and the next `sync` covers it.
            for file in files:
                file.unsynced = False
        # Without the lock: an fsync takes milliseconds, and others want places meanwhile.
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
        """Fail if the file that gradients go to now would not be found after a restart.

        Raises:
            OSError: it was removed, moved or replaced.
        """
        with self._lock:
            current = self._current
        # Used without the lock: only `let_go_before` closes it, never while it is current, and the journal's commit
        # lock keeps that call and this one apart.
        if current is not None:
            current.writer.refuse_if_gone()

    def let_go_before(self, log: int) -> list[Path]:
        """Close what only logs before this one name, and say which files may be removed.

        Not to be called while `sync` is: the files that it syncs must stay open.

        Returns:
            The files that are needed no more, those of earlier servers among them.
        """
        with self._lock:
            old = [file for file in self._files.values() if self._is_needless(file, log)]
            for file in old:
                file.writer.close()
                self.size_bytes -= self._files.pop(file.number).end
            found = numbered(self.directory, GRADIENTS_NAME)
            return [path for number, path in found.items() if number < self._next and number not in self._files]

    def _is_needless(self, file: _File, log: int) -> bool:
        return file is not self._current and not file.users and file.last_log < log

    def close(self) -> None:
        """Close the files, each once no exchange writes to it any more; nothing can be stored from now on."""
        with self._lock:
            for file in self._files.values():
                if not self._closed and not file.users:
                    file.writer.close()
            self._closed = True
        self._writers.shutdown()  # without the lock, which the exchanges of what is being written take
