"""The checkpoints of a run in their directory: written aside and renamed, the last few kept, the newest whole one read.

They are in the order of writing, not of iterations: after a fall-back to an older one, or when a drain writes the
iteration that is there already, the one that was written last is the newest.
"""

import itertools
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ormo_server.core.errors import SettingsError
from ormo_server.store.checkpoint import Checkpoint, damage_of_model, has_files, read_files, write_files
from ormo_server.store.errors import StoreError
from ormo_server.store.files import is_scarcity, make_directory, reading, sync

log = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)-iteration-\d+")
_ASIDE = ".writing-"
_LATEST = "latest"


class CheckpointStore:
    """The checkpoints in one directory, which is made when the first one is written. One process writes there.

    Args:
        directory: where they are.
        keep: how many of the last whole ones stay, at least 1. Corrupt ones do not count; they go with their elders.

    Attributes:
        newer_lost: `newest` has found one, and there was a newer one that is missing or not whole.

    Raises:
        SettingsError: `keep` is below 1.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        if keep < 1:
            raise SettingsError(f"checkpoints kept {keep}: expected at least 1")
        self._directory = directory
        self._keep = keep
        self.newer_lost = False
        self._newest: Path | None = None
        self._corrupt: set[Path] = set()
        self._writing = threading.Lock()

    def paths(self) -> list[Path]:
        """The checkpoints that are there, whole or not, oldest first.

        Raises:
            StoreError: the directory can't be read.
        """
        found = [path for path in self._entries() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(filter(has_files, found), key=_serial)

    def newest(self, refuse: Callable[[Checkpoint], object] = lambda _: None) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there is none at all.

        Each newer one that is not whole, or is missing where `latest` names it, is logged as an error, and `newer_lost`
        is set. `drained` is false then, whatever was written: the lost ones may have applied gradients after it.

        Args:
            refuse: raises a StoreError for one that must not be gone on with; it counts as not whole.

        Raises:
            StoreError: there are checkpoints, or were, and none is whole; or the directory can't be read, or one of
                them for want of descriptors or memory.
        """
        paths, failures = self.paths(), self._missing()
        for path in reversed(paths):
            try:
                checkpoint = read_files(path)
                refuse(checkpoint)
            except StoreError as error:
                if is_scarcity(error.__cause__):
                    raise  # it may be whole
                failures.append(error)
                self._corrupt.add(path)
                continue
            for failure in failures:
                log.error(
                    "corrupt checkpoint: %s; %s is used instead, what came after it is lost if no journal has it",
                    failure,
                    path,
                )
            if damage := damage_of_model(path):
                log.warning("%s; nothing is lost: the state has the model too, and it is written anew", damage)
            self._newest, self.newer_lost = path, bool(failures)
            return replace(checkpoint, drained=False) if failures else checkpoint
        if failures:
            raise StoreError(
                f"none of the checkpoints in {self._directory} is whole (the newest: {failures[0]}): "
                "bring one back from a backup, or choose another --directory for a new run"
            )
        return None

    def move_corrupt(self, directory: Path) -> None:
        """Put those that `newest` has found corrupt into this directory.

        Raises:
            OSError: one can't be moved.
        """
        while self._corrupt:
            path = self._corrupt.pop()
            path.rename(directory / path.name)

    def read_again(self) -> Checkpoint:
        """What `newest` has found, once more.

        Raises:
            StoreError: it is not whole any more.
        """
        assert self._newest is not None
        checkpoint = read_files(self._newest)
        return replace(checkpoint, drained=False) if self.newer_lost else checkpoint

    def _missing(self) -> list[StoreError]:
        named = self._named_latest()
        if named is None or any(_serial(path) >= _serial(named) for path in self.paths()):
            return []
        return [StoreError(f"{named} is missing, and {self._directory / _LATEST} names it as the last one")]

    def _named_latest(self) -> Path | None:
        # It may stay behind where it could not be pointed anew, and then names an older one.
        link = self._directory / _LATEST
        name = link.readlink().name if link.is_symlink() else ""
        return self._directory / name if _NAME.fullmatch(name) else None

    def write(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint; it is on the disk when this returns. One write at a time, others wait.

        Returns:
            Its directory.

        Raises:
            StoreError: the disk is full or does not take it, or the model has non-finite values. No trace is left of
                it, and the earlier ones are untouched.
        """
        with self._writing:
            # At once, since they may be what fills the disk; nothing whole is among them.
            self._remove(self._stale())
            try:
                path = self._write_whole(checkpoint)
            except OSError as error:
                raise StoreError(
                    f"the checkpoint of iteration {checkpoint.snapshot.fields['iteration']} can't be written to "
                    f"{self._directory} ({error}): make room there or mend the disk; the earlier ones are untouched"
                ) from error
            self._point_latest(path)
            self._remove(self._outdated())
            return path

    def _write_whole(self, checkpoint: Checkpoint) -> Path:
        make_directory(self._directory)
        name = self._next_name(checkpoint.snapshot.fields["iteration"])
        aside, path = self._directory / (_ASIDE + name), self._directory / name
        aside.mkdir()
        try:
            write_files(aside, checkpoint)
            aside.rename(path)
            sync(self._directory)
        except BaseException:
            if path.exists():
                path.rename(aside)  # one that is removed by half must not look like the newest
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return path

    def _next_name(self, iteration: int) -> str:
        # Stale ones that can't be removed count: their names are taken. So does one that is missing: it may come back
        # from a backup. Empty folders do not, or a stray one would decide on all numbers to come.
        named = self._named_latest()
        known = [*self.paths(), *self._stale(), *([named] if named else ())]
        numbers = itertools.count(1 + max(map(_serial, known), default=0))
        names = (f"checkpoint-{number:08d}-iteration-{iteration}" for number in numbers)
        return next(name for name in names if not (self._directory / name).exists())

    def _point_latest(self, path: Path) -> None:
        # A convenience for people and scripts: where a file system has no links, there is none.
        with suppress(OSError):
            link = self._directory / f".{_LATEST}"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name, target_is_directory=True)
            link.replace(self._directory / _LATEST)

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            try:
                shutil.rmtree(path)
            except OSError as error:
                log.warning("%s is no longer needed and can't be removed (%s): remove it by hand", path, error)

    def _outdated(self) -> list[Path]:
        paths = self.paths()
        oldest_kept = [path for path in paths if path not in self._corrupt][-self._keep :][0]
        return paths[: paths.index(oldest_kept)]

    def _stale(self) -> list[Path]:
        # What a server left that died while it wrote.
        names = (path for path in self._entries() if path.name.startswith(_ASIDE))
        return [path for path in names if _NAME.fullmatch(path.name.removeprefix(_ASIDE))]

    def _entries(self) -> Iterator[Path]:
        with reading(self._directory):
            yield from self._directory.iterdir() if self._directory.exists() else ()


def _serial(path: Path) -> int:
    name = _NAME.fullmatch(path.name.removeprefix(_ASIDE))
    assert name is not None
    return int(name[1])
