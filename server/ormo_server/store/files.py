"""Files that are whole and on the disk, or not there: syncing, checksums, tensors in and out."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ormo_server.core.vectors import all_finite, has_nan

SUMS_FILE = "SHA256SUMS"
# Descriptors, or memory, of this process or of the system: others may have them for a while.
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def is_scarcity(error: BaseException | None) -> bool:
    """Whether it says nothing of a file or a disk, but of what the system has to give just now."""
    return isinstance(error, OSError) and error.errno in _SCARCE


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever is wrong with the content of `path` into a `StoreError` that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing") from error
    except OSError as error:
        raise StoreError(f"{path} can't be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise StoreError(f"{path} is not a whole safetensors file ({error})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is malformed ({type(error).__name__}: {error})") from error


def sync(path: Path) -> None:
    """Return when this file's content, or this directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def identity(descriptor: int) -> tuple[int, int]:
    """Of an open file: its device and its number there."""
    about = os.fstat(descriptor)
    return about.st_dev, about.st_ino


def is_at(path: Path, known: tuple[int, int]) -> bool:
    """Whether the file with this identity is found at this path. Asked before each answer: it takes 3 us."""
    try:
        about = path.stat()
    except OSError:  # what can't be looked at can't be found either
        return False
    return (about.st_dev, about.st_ino) == known


def make_directory(path: Path) -> None:
    """Make a directory with its parents, so that a power cut does not take them away again."""
    made = [directory for directory in (path, *path.parents) if not directory.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for directory in made:
        sync(directory.parent)


def copy_of_directory(source: Path, target: Path) -> None:
    """Make a copy, of links where the file system has them; its files are on the disk when this returns.

    Raises:
        OSError: there is no room for it, or a file can't be read.
    """
    shutil.copytree(source, target, copy_function=_link_or_copy)
    sync(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(Path(target))


def size_bytes(directory: Path) -> int:
    """Of the files in a directory; 0 for what has gone meanwhile."""
    with suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in directory.iterdir())
    return 0


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write contiguous tensors that do not overlap (slices of one vector may be among them); no copy is made.

    Raises:
        OSError: the disk is full, or does not take it for another reason.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
    # safetensors gives its files to the owner alone, whatever the umask says: others may want to load the model.
    path.chmod(path.parent.stat().st_mode & 0o666)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    Raises:
        StoreError: it is missing, or not a safetensors file.
    """
    with reading(path), safe_open(path, framework="pt") as file:
        # What comes is mapped memory: without a copy, the process would die of a file that is cut short later.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no mapping
        return tensors, dict(file.metadata() or {})


def non_finite(tensors: Mapping[str, torch.Tensor], buffers: Container[str] = ()) -> list[str]:
    """Names of the tensors that hold NaN or infinity, or of `buffers` NaN: masks and observers have infinities."""
    floating = ((name, tensor.reshape(-1)) for name, tensor in tensors.items() if tensor.is_floating_point())
    return [repr(name) for name, flat in floating if (has_nan(flat) if name in buffers else not all_finite(flat))]


def write_sums(directory: Path, names: Sequence[str]) -> None:
    """Write the checksums of these files beside them, in the format of `sha256sum`."""
    lines = [f"{_sha256(directory / name)}  {name}\n" for name in names]
    (directory / SUMS_FILE).write_text("".join(lines))


def check_sums(directory: Path, names: Sequence[str]) -> None:
    """Compare these files with their checksums.

    Raises:
        StoreError: one is missing, or not what was written.
    """
    path = directory / SUMS_FILE
    with reading(path):
        expected = {name: digest for digest, name in map(str.split, path.read_text().splitlines())}
        missing = [name for name in names if name not in expected]
    if missing:
        raise StoreError(f"{path} is malformed: it has no checksum for {listed(missing)}")
    for name in names:
        with reading(directory / name):
            found = _sha256(directory / name)
        if found != expected[name]:
            raise StoreError(f"{directory / name} has the SHA-256 {found}, but was written with {expected[name]}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_OF_A_RUN = ("checkpoint-*", ".writing-checkpoint-*", "journal-damaged-*", "journal", "latest", "mirror.json")


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


_LISTED = 3


class StoreError(Exception):
    """Something on disk can't be read, written or used; the sentence says which, why and what to do."""


class NotFinite(StoreError):
    """The state has NaN or infinite values, and must not replace one that is sound."""


def listed(items: Sequence[str]) -> str:
    """The first few items and how many more there are, for a sentence."""
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")
