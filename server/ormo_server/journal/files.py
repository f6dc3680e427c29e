"""The files of a journal: logs, to which whole lines are appended, and those with what gradients carried."""

import contextlib
import errno
import mmap
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ormo_protos.tensors import Payload
from ormo_server.core.errors import DiskFull, NotReady
from ormo_server.journal.records import GRADIENTS_NAME, MARK_NAME, Place, StoredGradient, gradients_path, numbered
from ormo_server.store.files import identity, is_at, is_scarcity, reading, sync


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


# Bytes to given places of one file, large ones past the page cache. Nobody reads them again but after a crash. Measured
# with 45 MB on ext4: 100 ms, 72 ms of them of the processor, through the page cache, and 13 ms, 1 ms, past it; below
# some 256 KiB the cache is faster.


_BLOCK_BYTES = mmap.PAGESIZE
_DIRECT_BYTES = 256 << 10
_DIRECT: int | None = getattr(os, "O_DIRECT", None)  # Linux


def place_after(end: int, size: int) -> int:
    """Where the next place begins: a large one with a block, since nothing smaller goes past the page cache."""
    return -(-end // _BLOCK_BYTES) * _BLOCK_BYTES if size >= _DIRECT_BYTES else end


class PlacedWriter:
    """Writes to places that do not overlap, from any thread.

    Args:
        path: of the file, which must not exist.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = new_file(path)
        self._path, self._identity = path, identity(self._descriptor)
        self._direct: int | None = None
        self._closed = False
        if _DIRECT is not None:
            with contextlib.suppress(OSError):  # not every file system can
                self._direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC | _DIRECT)

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of it.

        Raises:
            OSError: there is no room, or the disk does not take it.
        """
        done = self._written_directly(data, offset)
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)

    def _written_directly(self, data: memoryview, offset: int) -> int:
        aligned = len(data) - len(data) % _BLOCK_BYTES
        if self._direct is None or aligned < _DIRECT_BYTES or _address(data) % _BLOCK_BYTES:
            return 0
        try:
            done = 0
            while done < aligned:
                done += os.pwrite(self._direct, data[done:aligned], offset + done)
        except OSError:
            return 0  # if it is not for the way it is written, it comes again
        return done

    def sync(self) -> None:
        """Return when all of it is on the disk.

        Raises:
            OSError: see `synced`.
        """
        synced(os.fdatasync, self._descriptor)

    def refuse_if_gone(self) -> None:
        """See `log_file.refuse_if_gone`."""
        refuse_if_gone(self._path, self._identity)

    def close(self) -> None:
        """Let it go; may be called again."""
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


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_RETRY_SECONDS = 2.0


def may_pass(error: OSError) -> bool:
    """Whether this is for lack of something, so that it may go better later."""
    return error.errno in _NO_ROOM or is_scarcity(error)


def disk_full(where: object, why: object) -> DiskFull:
    """What a worker is told: it tries again, and training goes on once there is room."""
    return _refusal(where, why, "make room there, or mend the disk")


def kept_back(where: object, error: OSError) -> DiskFull:
    """The same for what the system said."""
    if is_scarcity(error):
        return _refusal(where, error.strerror, "see who has them, or raise the limit of open files or of memory")
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
    """One server's, in a file of its own.

    Args:
        directory: of the journal.
        log: number of the server's first log.

    Raises:
        OSError: the file can't be made.
    """

    def __init__(self, directory: Path, log: int) -> None:
        self._descriptor = new_file(directory / f"acknowledged-{log:08d}")

    def move(self, place: Place) -> None:
        """What is up to here may be told from now on."""
        text = b"%012d %012d" % place
        try:
            os.pwrite(self._descriptor, b"%08x %s\n" % (zlib.crc32(text), text), 0)
        except OSError:
            return  # an old mark says less, and nothing wrong

    def close(self) -> None:
        """Let it go."""
        os.close(self._descriptor)


def marks(directory: Path) -> Iterator[Place]:
    """All that can be read.

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
