"""Checkpoints: what one holds, and its files; in their directory the last few are kept, the newest whole one is read.

They are written aside and renamed. They are in the order of writing, not of iterations: after a fall-back to an older
one, or when a drain writes the iteration that is there already, the one that was written last is the newest.
"""

import itertools
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from ormo_protos.manifest import FROZEN, Manifest
from ormo_server.core.errors import SettingsError
from ormo_server.core.snapshot import Snapshot
from ormo_server.store.files import (
    SUMS_FILE,
    NotFinite,
    StoreError,
    check_sums,
    is_scarcity,
    listed,
    load_tensors,
    make_directory,
    non_finite,
    reading,
    save_tensors,
    sync,
    write_sums,
)
from ormo_server.store.models import (
    DOCUMENT_FILE,
    MANIFEST_KEY,
    MODEL_FILE,
    FlatModel,
    no_frozen,
    unsound_tensors,
)

_LOG = logging.getLogger(__name__)

FORMAT_VERSION = 1
STATE_FILE = "state.safetensors"

CHECKPOINT_FILES = (MODEL_FILE, STATE_FILE, DOCUMENT_FILE)
_MODEL_VECTORS = ("params", "float_buffers", "int_buffers")
# Of the 100 MB that safetensors allows for a header; the names of 100,000 tensors take 60 MB of it.
_MOST_METADATA_BYTES = 40_000_000
# In the state's file beside what the core has. Without such tensors it is as servers write it that do not know them.
_FROZEN = "frozen"


def _torch_version() -> str:
    return str(torch.__version__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run at one moment. Three fields say what wrote it, and need not be given.

    Attributes:
        snapshot: the core's state.
        manifest: the model's tensors, and where they lie in the snapshot's vectors.
        drained: nothing was applied after it, so tickets in flight and kept results stay good.
        clock_seconds: the run's clock at that moment, in seconds.
        settings: of the server, as JSON holds them; they inform, a restore does not use them.
        journal_log: number of the journal's log that begins with it; None without a journal.
        format_version: version of the files' format.
        torch_version: a replay gives the same bits on the same build only.
        cpu_capability: which vector instructions torch used, for the same reason.
        frozen: the model's tensors that are not trained, shape (z,), float32.
    """

    snapshot: Snapshot
    manifest: Manifest
    drained: bool
    clock_seconds: float
    settings: Mapping[str, Any]
    journal_log: int | None = None
    format_version: int = FORMAT_VERSION
    torch_version: str = field(default_factory=_torch_version)
    cpu_capability: str = field(default_factory=torch.backends.cpu.get_cpu_capability)
    frozen: torch.Tensor = field(default_factory=no_frozen)


def write_files(directory: Path, checkpoint: Checkpoint) -> None:
    """Write the files of a checkpoint into an empty directory; they are on the disk when this returns.

    Raises:
        NotFinite: the model or its momentum has NaN or infinite values.
        OSError: the disk is full, or does not take it for another reason.
    """
    bad = unsound(checkpoint.snapshot, checkpoint.manifest)
    if bad:
        raise NotFinite(
            f"{bad} would be written with NaN or infinite values: restart from an earlier checkpoint, with a lower "
            "learning rate"
        )
    tensors, frozen = checkpoint.snapshot.tensors, checkpoint.frozen
    params, float_buffers, int_buffers = (tensors[name] for name in _MODEL_VECTORS)
    model = FlatModel(params, float_buffers, int_buffers, frozen).state_dict(checkpoint.manifest)
    document = _document_text(checkpoint)
    save_tensors(directory / MODEL_FILE, model, {"format": "pt"} | _manifest_beside(checkpoint.manifest))
    state = tensors | ({_FROZEN: frozen} if frozen.numel() else {})
    save_tensors(directory / STATE_FILE, state, {"format": "pt"})
    (directory / DOCUMENT_FILE).write_text(document, encoding="utf-8")
    write_sums(directory, CHECKPOINT_FILES)
    for name in (*CHECKPOINT_FILES, SUMS_FILE):
        sync(directory / name)
    sync(directory)


def _manifest_beside(manifest: Manifest) -> dict[str, str]:
    """The manifest for the model's file; nothing if there is no room for it: then it is as other programs write it."""
    rows = json.dumps(manifest.to_json(), separators=(",", ":"))
    return {MANIFEST_KEY: rows} if len(json.dumps(rows)) <= _MOST_METADATA_BYTES else {}


def read_files(directory: Path) -> Checkpoint:
    """The checkpoint that `write_files` wrote, its tensors in memory of their own. The model file is not needed.

    Raises:
        StoreError: a file is missing, changed, cut short, or of an unknown format version, or has NaN or infinity.
    """
    check_sums(directory, (STATE_FILE, DOCUMENT_FILE))
    document = _read_document(directory / DOCUMENT_FILE)
    with reading(directory / DOCUMENT_FILE):
        fields, rows, rest = document.fields, document.manifest, document.model_dump(exclude={"fields", "manifest"})
        manifest = Manifest.from_json(rows)
    tensors, _ = load_tensors(directory / STATE_FILE)
    bad = non_finite(tensors, buffers=("float_buffers",))
    if bad:
        raise StoreError(f"{directory / STATE_FILE} has NaN or infinite values in {listed(bad)}")
    frozen = tensors.pop(_FROZEN, no_frozen())
    return Checkpoint(Snapshot(tensors, fields), manifest, frozen=frozen, **rest)


def damage_of_model(directory: Path) -> str:
    """What is wrong with the model file, which holds nothing that the state does not; empty if nothing is."""
    try:
        check_sums(directory, (MODEL_FILE,))
    except StoreError as error:
        return str(error)
    return ""


def has_files(directory: Path) -> bool:
    """Whether this folder holds any file of a checkpoint."""
    with reading(directory):
        return any((directory / name).exists() for name in (*CHECKPOINT_FILES, SUMS_FILE))


def unsound(taken: Snapshot, manifest: Manifest) -> str:
    """Names of the tensors of a state that can't be kept, for what `non_finite` says; empty if all can be."""
    tensors = taken.tensors
    # What is frozen was looked at when it came.
    trained = (spec for spec in manifest.tensors if spec.role != FROZEN)
    bad = unsound_tensors(FlatModel(*(tensors[name] for name in _MODEL_VECTORS)).tensors_of(trained), manifest)
    return listed(bad + non_finite({name: tensors[name] for name in tensors if name not in _MODEL_VECTORS}))


def _document_text(checkpoint: Checkpoint) -> str:
    document = {
        "format_version": checkpoint.format_version,
        "torch_version": checkpoint.torch_version,
        "cpu_capability": checkpoint.cpu_capability,
        "drained": checkpoint.drained,
        "clock_seconds": checkpoint.clock_seconds,
        "settings": dict(checkpoint.settings),
        "journal_log": checkpoint.journal_log,
        "fields": checkpoint.snapshot.fields,
        "manifest": checkpoint.manifest.to_json(),
    }
    try:
        return json.dumps(document, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise StoreError(f"the run's counters or settings can't be written as JSON ({error})") from error


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    format_version: int
    torch_version: str
    cpu_capability: str
    drained: bool
    clock_seconds: float
    settings: dict[str, Any]
    journal_log: int | None = None
    fields: dict[str, Any]
    manifest: Any


def _read_document(path: Path) -> _Document:
    with reading(path):
        content = json.loads(path.read_bytes())
        version = content["format_version"]
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version!r}, and this server reads {FORMAT_VERSION}: use the server that "
            "wrote it"
        )
    with reading(path):
        return _Document.model_validate(content)


NAME = re.compile(r"checkpoint-(\d+)-iteration-\d+")
_ASIDE = ".writing-"
LATEST = "latest"


@dataclass(frozen=True, slots=True)
class Found:
    """The newest checkpoint that is whole.

    Attributes:
        path: its directory.
        checkpoint: what it holds. With newer ones skipped it is not `drained`, whatever was written: gradients may have
            been applied between it and those that are lost.
        skipped: how many newer ones were missing or not whole.
    """

    path: Path
    checkpoint: Checkpoint
    skipped: int

    def read_again(self) -> Checkpoint:
        """Read the same checkpoint once more, into memory of its own.

        Raises:
            StoreError: it is not whole any more.
        """
        return _as_found(read_files(self.path), self.skipped)


def _as_found(checkpoint: Checkpoint, skipped: int) -> Checkpoint:
    return replace(checkpoint, drained=False) if skipped else checkpoint


class CheckpointStore:
    """The checkpoints in one directory, which is made when the first one is written. One process writes there.

    Args:
        directory: holds the checkpoints, each in a folder of its own.
        keep: how many of the last whole ones stay, at least 1. Corrupt ones do not count; they go with their elders.

    Raises:
        SettingsError: `keep` is below 1.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        if keep < 1:
            raise SettingsError(f"checkpoints kept {keep}: expected at least 1")
        self._directory = directory
        self._keep = keep
        # Those that `newest` could not read: they do not count among those that stay.
        self._corrupt: set[Path] = set()
        self._copied: Path | None = None
        # One write at a time: two would draw the same number, and each would remove what the other has half written.
        self._writing = threading.Lock()

    def paths(self) -> list[Path]:
        """The checkpoints that are there, whole or not, oldest first.

        Raises:
            StoreError: the directory can't be read.
        """
        found = [path for path in self._entries() if NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(filter(has_files, found), key=_serial)

    def newest(self, refuse: Callable[[Checkpoint], object] = lambda _: None) -> Found | None:
        """Find the newest checkpoint that is whole.

        Each newer one that is not whole, or is missing where `latest` names it, is logged as an error.

        Args:
            refuse: raises a StoreError for a checkpoint that the run must not go on with; it counts as not whole.

        Returns:
            The checkpoint, and how many newer ones were skipped; None if there never was any.

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
                _LOG.error(
                    "corrupt checkpoint: %s; %s is used instead, anything newer is lost if no journal has it",
                    failure,
                    path,
                )
            if damage := damage_of_model(path):
                _LOG.warning("%s; nothing is lost: the state has the model too, and it is written again", damage)
            return Found(path, _as_found(checkpoint, len(failures)), len(failures))
        if failures:
            raise StoreError(
                f"none of the checkpoints in {self._directory} is whole (the newest: {failures[0]}): "
                "bring one back from a backup, or choose another --directory for a new run"
            )
        return None

    @contextmanager
    def newest_kept(self) -> Iterator[Path | None]:
        """The newest checkpoint, which stays as long as this lasts; None if there is none. One caller at a time.

        Raises:
            StoreError: the directory can't be read.
        """
        with self._writing:
            self._copied = next(reversed(self.paths()), None)
        try:
            yield self._copied
        finally:
            self._copied = None  # the next write removes it

    def move_corrupt(self, directory: Path) -> None:
        """Put those that `newest` has found corrupt into this directory.

        Raises:
            OSError: one can't be moved.
        """
        while self._corrupt:
            path = self._corrupt.pop()
            path.rename(directory / path.name)

    def _missing(self) -> list[StoreError]:
        named = self._named_latest()
        if named is None or any(_serial(path) >= _serial(named) for path in self.paths()):
            return []
        return [StoreError(f"{named} is missing, and {self._directory / LATEST} names it as the last one")]

    def _named_latest(self) -> Path | None:
        # It may stay behind where it could not be pointed anew, and then names an older one.
        link = self._directory / LATEST
        name = link.readlink().name if link.is_symlink() else ""
        return self._directory / name if NAME.fullmatch(name) else None

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
            link = self._directory / f".{LATEST}"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name, target_is_directory=True)
            link.replace(self._directory / LATEST)

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            try:
                shutil.rmtree(path)
            except OSError as error:
                _LOG.warning("%s is no longer needed and can't be removed (%s): remove it by hand", path, error)

    def _outdated(self) -> list[Path]:
        paths = self.paths()
        oldest_kept = [path for path in paths if path not in self._corrupt][-self._keep :][0]
        return [path for path in paths[: paths.index(oldest_kept)] if path != self._copied]

    def _stale(self) -> list[Path]:
        # What a server left that died while it wrote.
        names = (path for path in self._entries() if path.name.startswith(_ASIDE))
        return [path for path in names if NAME.fullmatch(path.name.removeprefix(_ASIDE))]

    def _entries(self) -> Iterator[Path]:
        with reading(self._directory):
            yield from self._directory.iterdir() if self._directory.exists() else ()


def _serial(path: Path) -> int:
    return serial_of(path.name.removeprefix(_ASIDE))


def serial_of(name: str) -> int:
    """The number in the order of writing that a checkpoint has by its name."""
    found = NAME.fullmatch(name)
    assert found is not None
    return int(found[1])
