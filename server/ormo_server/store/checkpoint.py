"""One checkpoint: what it holds, and its files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from ormo_protos.manifest import BUFFER, FROZEN, Manifest
from ormo_server.core.snapshot import Snapshot
from ormo_server.store.errors import NotFinite, StoreError, listed
from ormo_server.store.files import (
    SUMS_FILE,
    check_sums,
    load_tensors,
    non_finite,
    reading,
    save_tensors,
    sync,
    write_sums,
)
from ormo_server.store.flat_model import FlatModel, no_frozen

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
STATE_FILE = "state.safetensors"
DOCUMENT_FILE = "checkpoint.json"
# Where a model file carries its manifest, as JSON.
MANIFEST_KEY = "ormo_manifest"

_FILES = (MODEL_FILE, STATE_FILE, DOCUMENT_FILE)
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
        manifest: the model's.
        drained: nothing was applied after it, so tickets in flight and kept results stay good.
        clock_seconds: the run's clock.
        settings: of the server, as JSON holds them; they inform, a restore does not use them.
        journal_log: number of the journal's log that begins with it; None without a journal.
        format_version: of the files.
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
    write_sums(directory, _FILES)
    for name in (*_FILES, SUMS_FILE):
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
        return any((directory / name).exists() for name in (*_FILES, SUMS_FILE))


def unsound(taken: Snapshot, manifest: Manifest) -> str:
    """Names of the tensors of a state that can't be kept, for what `non_finite` says; empty if all can be."""
    tensors = taken.tensors
    # What is frozen was looked at when it came.
    trained = (spec for spec in manifest.tensors if spec.role != FROZEN)
    bad = unsound_tensors(FlatModel(*(tensors[name] for name in _MODEL_VECTORS)).named(trained), manifest)
    return listed(bad + non_finite({name: tensors[name] for name in tensors if name not in _MODEL_VECTORS}))


def unsound_tensors(tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> list[str]:
    """Names of those of a model's tensors that have NaN, or are parameters and have infinity."""
    return non_finite(tensors, {spec.name for spec in manifest.tensors if spec.role == BUFFER})


def model_of(directory: Path) -> Path:
    """The model file of a checkpoint, checked.

    Raises:
        StoreError: this is no checkpoint, or the file is not what was written.
    """
    if not (directory / DOCUMENT_FILE).exists():
        raise StoreError(f"{directory} is a directory, but no checkpoint: there is no {DOCUMENT_FILE} in it")
    check_sums(directory, (MODEL_FILE,))
    return directory / MODEL_FILE


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
