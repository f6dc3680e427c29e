"""The files of a journal: logs, to which whole lines are appended, and those with what gradients carried."""

import contextlib
import errno
import mmap
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ormo_protos.tensors import Payload
from ormo_runtime.process import StartedPool
from ormo_server.core.errors import DiskFull, NotReady
from ormo_server.journal.records import GRADIENTS_NAME, MARK_NAME, Place, StoredGradient, gradients_path, numbered
from ormo_server.store.files import identity, is_at, is_scarcity, reading, sync


class LogFile:
    """A new file that grows by whole appends.

    Args:
        path: where to make the file; nothing may be there yet.
        opening: the first line, as bytes.

    Attributes:
        size_bytes: length of the file.

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
        """Return when the whole file is on the disk; raises as `sync_or_fail` does."""
        sync_or_fail(os.fsync, self._descriptor)

    def refuse_if_gone(self) -> None:
        """Fail if what is written here would not be found after a restart, as the function of this name says."""
        refuse_if_gone(self._path, self._identity)

    def close(self) -> None:
        """Close the file; it stays on the disk."""
        os.close(self._descriptor)


def refuse_if_gone(path: Path, known: tuple[int, int]) -> None:
    """Fail if a file that this process has open is no longer at its path: a restart would not find what it holds.

    Raises:
        OSError: the file was removed, so it goes with this process, or it was moved or replaced.
    """
    if not is_at(path, known):
        raise OSError(errno.ESTALE, f"{path} was removed, moved or replaced while this server wrote to it")


def sync_or_fail(sync: Callable[[int], None], descriptor: int) -> None:
    """Call an fsync, and make every failure of it final.

    Args:
        sync: `os.fsync` or `os.fdatasync`.
        descriptor: of the file.

    Raises:
        OSError: EIO, whatever the reason was, even lack of room, which `may_pass` would let a worker retry. After a
            failed fsync the system may drop the pages, and the next fsync then succeeds without them: no retry is safe.
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


# Gradients go to places of their own in one file. Where each is waited for until it is on the disk, large ones go past
# the page cache: they are read again only after a crash. Measured with 45 MB on ext4: 16 ms, of which the processor
# works 2; through the cache 10 ms, all of it work, and as much again until they are on the disk. In one piece the cache
# took 100 ms. Below some 256 KiB it is faster in any case.

_WRITERS = 4
_BLOCK_BYTES = mmap.PAGESIZE
_DIRECT_BYTES = 256 << 10
_CACHED_AT_ONCE_BYTES = 1 << 20
_DIRECT: int | None = getattr(os, "O_DIRECT", None)  # Linux


def place_after(end: int, size: int) -> int:
    """Where the next place begins: a large one with a block, since nothing smaller goes past the page cache."""
    return -(-end // _BLOCK_BYTES) * _BLOCK_BYTES if size >= _DIRECT_BYTES else end


class PlacedWriter:
    """Writes to places that do not overlap, from any thread and without a lock.

    Args:
        path: where to make the file; nothing may be there yet.
        past_cache: whether large pieces go past the page cache, where the file system can do that.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self, path: Path, *, past_cache: bool) -> None:
        self._descriptor = new_file(path)
        self._path, self._identity = path, identity(self._descriptor)
        self._direct: int | None = None
        self._closed = False
        if past_cache and _DIRECT is not None:
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
        if self._direct is None or aligned < _DIRECT_BYTES or _address(data) % _BLOCK_BYTES:
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
    """A file of gradients: each place in it belongs to one gradient and is written once.

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


class GradientFiles:
    """Takes payloads from many threads at once.

    Places are handed out under a lock of its own, which is held for no write: gradients are written side by side,
    before the engine's lock is taken, large ones by threads of their own while that of the exchange computes the
    checksum. `sync` and `let_go_before` are for one thread at a time, which the journal's commit lock sees to.

    Args:
        directory: the journal's directory, which is there.
        past_cache: whether large payloads go past the page cache.

    Attributes:
        size_bytes: bytes in all files that were begun by this process and are still needed.

    Raises:
        RuntimeError: the system has no threads for it.
    """

    def __init__(self, directory: Path, *, past_cache: bool) -> None:
        self._directory = directory
        self._past_cache = past_cache
        self._writers = StartedPool(_WRITERS, "gradients")
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
            file, offset, written = self._begin(memory)
        except OSError as error:
            raise kept_back(self._directory, error) from error
        checksum = zlib.crc32(memory)
        try:
            if written is None:
                file.writer.write(memory, offset)
            else:
                written.result()
        except OSError as error:
            self._done_with(file)
            raise kept_back(self._directory, error) from error
        file.unsynced = True  # after the write: an fsync that clears the mark before would not cover these bytes
        return StoredGradient(
            file=file.number,
            offset=offset,
            size=layout.total_bytes,
            checksum=checksum,
            dtype=layout.dtype,
            with_buffers=layout.with_buffers,
        )

    def _begin(self, memory: memoryview) -> tuple[_File, int, Future[None] | None]:
        """The place for so many bytes, and what writes them there, if not the caller."""
        size = len(memory)
        with self._lock:
            if self._closed:
                raise NotReady(f"the journal in {self._directory} is closed: this server stops", retry_seconds=1.0)
            if self._current is None:
                self._current = _File(self._next, self._new_writer())
                self._files[self._next] = self._current
                self._next += 1
            file = self._current
            before, offset = file.end, place_after(file.end, size)
            file.end = offset + size
            file.users += 1
            self.size_bytes += file.end - before
            if size < _DIRECT_BYTES:
                return file, offset, None
            return file, offset, self._writers.submit(file.writer.write, memory, offset)

    def _new_writer(self) -> PlacedWriter:
        return PlacedWriter(gradients_path(self._directory, self._next), past_cache=self._past_cache)

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
            found = numbered(self._directory, GRADIENTS_NAME)
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


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_RETRY_SECONDS = 2.0


def may_pass(error: OSError) -> bool:
    """Whether this is for lack of room, descriptors or memory, so that a later try may succeed."""
    return error.errno in _NO_ROOM or is_scarcity(error)


def disk_full(where: object, why: object) -> DiskFull:
    """The refusal that a worker hears: it tries again, and training goes on once there is room."""
    return _refusal(where, why, "make room there, or mend the disk")


def kept_back(where: object, error: OSError) -> DiskFull:
    """The same refusal for an error of the operating system."""
    if is_scarcity(error):
        return _refusal(
            where, error.strerror, "find the process that uses them up, or raise the limit of open files or of memory"
        )
    return disk_full(where, error.strerror)


def _refusal(where: object, why: object, advice: str) -> DiskFull:
    return DiskFull(
        f"the journal in {where} can't take more ({why}): {advice}; workers try again by themselves, and nothing is "
        "lost",
        retry_seconds=_RETRY_SECONDS,
    )


# A mark of what was acknowledged, for the lines that no other line comes after to say so. It is written in place before
# each answer, and never waited for: it outlives the process like all that the system took, and after a power cut it is
# older than the truth, never ahead of lines that were waited for.

_MARK = re.compile(rb"([0-9a-f]{8}) (\d{12} \d{12})\n")


class Mark:
    """How far one server has acknowledged, in a file of its own.

    Args:
        directory: the journal's directory.
        log: number of this server's first log.

    Raises:
        OSError: the file can't be made.
    """

    def __init__(self, directory: Path, log: int) -> None:
        self._descriptor = new_file(directory / f"acknowledged-{log:08d}")

    def move(self, place: Place) -> None:
        """Let workers hear of everything up to here from now on."""
        text = b"%012d %012d" % place
        try:
            os.pwrite(self._descriptor, b"%08x %s\n" % (zlib.crc32(text), text), 0)
        except OSError:
            return  # an older mark claims less than is true, so it is still right

    def close(self) -> None:
        """Close the file; it stays on the disk."""
        os.close(self._descriptor)


def marks(directory: Path) -> Iterator[Place]:
    """The marks of all servers that wrote here, as far as they can be read.

    Raises:
        StoreError: a file can't be read.
    """
    with reading(directory):
        found = numbered(directory, MARK_NAME)
    for path in found.values():
        with reading(path):
            match = _MARK.fullmatch(path.read_bytes())
        if match is not None and int(match[1], 16) == zlib.crc32(match[2]):
            yield Place(*map(int, match[2].split()))
