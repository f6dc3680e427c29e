"""Where copies are kept: a bucket, or a folder that is used as one, by names with slashes in them."""

import fcntl
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ormo_server.core.errors import SettingsError
from ormo_server.mirror.addresses import check_address, is_address, local_path
from ormo_server.store.files import StoreError, make_directory, sync

_ASIDE = ".writing-"


class BucketError(StoreError):
    """A bucket can't be reached, read or written just now; nothing is known of what is in it."""


class ChangedError(Exception):
    """What was to be replaced is not what it was when it was read."""


@dataclass(frozen=True, slots=True)
class Object:
    """A small object.

    Attributes:
        content: all of it.
        version: what tells it from what was there before, and comes after; the bucket's own.
    """

    content: bytes
    version: Any


class Bucket(Protocol):
    """Objects by name, each of them whole or not there. Everything may raise a BucketError.

    Attributes:
        address: where it is, for people.
    """

    address: str

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of each object by its name, of those whose name begins with the folder `below`, or of all."""

    def read(self, name: str) -> Object | None:
        """A small object; None if there is none."""

    def replace(self, name: str, content: bytes, over: Any) -> Any:
        """Write an object where the one of version `over` is, or none where that is None; returns its version.

        Raises:
            ChangedError: there is another one.
        """

    def upload(self, source: Path, name: str) -> None:
        """Copy a file there."""

    def download(self, name: str, target: Path) -> None:
        """Copy an object into a file; it is on the disk when this returns."""

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects; those that have gone already do no harm."""


def bucket_at(address: str) -> Bucket:
    """The bucket, with what this address adds before all names.

    Raises:
        SettingsError: the library for it is not installed, or the address can't be one.
    """
    try:
        check_address(address)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if not is_address(address):
        return Folder(local_path(address))
    # For those who ask for it only: it is an extra.
    from ormo_server.mirror.objects import ObjectStore

    return ObjectStore(address)


class Folder:
    """A folder as a bucket: on another disk, or one that machines share. It needs locks of files, as NFS 4 has them.

    It must be there, as a bucket must: one that is missing may be a disk that is not mounted.
    """

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self._path = path

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of each object by its name."""
        with self._using("read"):
            self._path.stat()
            files = [path for path in (self._path / below).rglob("*") if path.is_file() and path.name[0] != "."]
            return {path.relative_to(self._path).as_posix(): path.stat().st_size for path in files}

    def read(self, name: str) -> Object | None:
        """A small object; None if there is none."""
        with self._using("read"):
            self._path.stat()
            with suppress(FileNotFoundError):
                content = (self._path / name).read_bytes()
                return Object(content, hashlib.sha256(content).hexdigest())
        return None

    def replace(self, name: str, content: bytes, over: Any) -> Any:
        """Write an object where the one of version `over` is, or none where that is None; returns its version."""
        with self._using("written"), self._locked():
            there = self.read(name)
            if (there.version if there else None) != over:
                raise ChangedError
            aside = self._path / (_ASIDE + name)
            aside.write_bytes(content)
            self._put(aside, self._path / name)
        return hashlib.sha256(content).hexdigest()

    def upload(self, source: Path, name: str) -> None:
        """Copy a file there."""
        target = self._path / name
        with self._using("written"):
            self._path.stat()
            make_directory(target.parent)
            aside = target.with_name(_ASIDE + target.name)
            try:
                shutil.copyfile(source, aside)
                self._put(aside, target)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise

    def download(self, name: str, target: Path) -> None:
        """Copy an object into a file; it is on the disk when this returns."""
        with self._using("read"):
            shutil.copyfile(self._path / name, target)
            sync(target)

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, and folders that are empty then."""
        with self._using("written"):
            for name in names:
                (self._path / name).unlink(missing_ok=True)
            for folder in sorted({(self._path / name).parent for name in names}):
                while folder != self._path and folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
                    folder = folder.parent  # noqa: PLW2901 - upwards, to the first that is not empty

    def _put(self, aside: Path, target: Path) -> None:
        sync(aside)
        aside.replace(target)
        sync(target.parent)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._path / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _using(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BucketError(
                f"the folder {self.address} can't be {done} ({error.strerror or error}): mount it, make it, "
                "or make room there"
            ) from error
