"""The files of a journal: logs, to which whole lines are appended, and marks; and what is wrong when one fails."""

import contextlib
import errno
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ormo_server.core.errors import DiskFull
from ormo_server.journal.records import MARK_NAME, Place, numbered
from ormo_server.store.files import identity, is_at, is_scarcity, reading, sync

# Bounds what a log takes beside its lines: some fifty small gradients, and hundreds of lines without one.
_AHEAD_BYTES = 256 << 10


class LogFile:
    """A new file that grows by whole appends.

    Args:
        path: where to make the file; nothing may be there yet.
        opening: the first line, as bytes.
        ahead: write zeros behind the lines, over which the next ones go. Worth it where each append is synced: then
            neither the file's length nor its blocks change, and nothing but the lines is to be made sure. On ext4 a
            sync of a line takes a third of the time.

    Attributes:
        size_bytes: length of the file, zeros left out.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self, path: Path, opening: bytes, *, ahead: bool) -> None:
        self._descriptor = new_file(path)
        self._path, self._identity = path, identity(self._descriptor)
        self._ahead = ahead
        self.size_bytes = self._end_of_zeros = 0
        try:
            # Without zeros behind it: what an older server finds in a journal that was not used is as it knows it.
            self._append(opening)
        except OSError:
            self.close()
            path.unlink()
            raise

    def append(self, data: bytes) -> None:
        """Write all of this, or leave the file as it was.

        Raises:
            OSError: there is no room, or the disk does not take it.
        """
        self._append(data)
        if self._ahead and self.size_bytes > self._end_of_zeros:
            with contextlib.suppress(OSError):  # the lines are there, and the next ones may have room
                self._write(bytes(_AHEAD_BYTES))
                self._end_of_zeros = self.size_bytes + _AHEAD_BYTES

    def _append(self, data: bytes) -> None:
        self._write(data)
        self.size_bytes += len(data)

    def _write(self, data: bytes) -> None:
        rest, end = memoryview(data), self.size_bytes
        try:
            while rest:
                written = os.pwrite(self._descriptor, rest, end)
                rest, end = rest[written:], end + written
        except OSError:
            self._cut()
            raise

    def _cut(self) -> None:
        self._end_of_zeros = 0
        os.ftruncate(self._descriptor, self.size_bytes)

    def sync(self) -> None:
        """Return when the whole file is on the disk; raises as `sync_or_fail` does."""
        sync_or_fail(os.fdatasync, self._descriptor)

    def refuse_if_gone(self) -> None:
        """Fail if what is written here would not be found after a restart, as the function of this name says."""
        refuse_if_gone(self._path, self._identity)

    def close(self) -> None:
        """Close the file; it stays on the disk, without the zeros."""
        if self._end_of_zeros > self.size_bytes:
            with contextlib.suppress(OSError):  # zeros are read over
                self._cut()
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
