"""`ormo-server export`: a model as a file, in the format of whoever wants it."""

import sys
import tempfile
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator

from ormo_runtime import logs
from ormo_runtime.settings import Settings
from ormo_server.core.errors import SettingsError
from ormo_server.mirror.addresses import check_address
from ormo_server.mirror.models import fetched, put_file
from ormo_server.store import ModelFile, StoreError
from ormo_server.store.files import save_tensors


class ExportSettings(Settings):
    """Write the model of a run, or of any file, into a file of tensors by name; exits with 1 if it fails."""

    # What a pod has in its environment is for `serve`.
    flags_only: ClassVar[frozenset[str]] = frozenset({"model", "into", "format"})

    model: str = Field(
        title="What is written",
        description="path, or address of a bucket: a run's directory, a mirror or a checkpoint, or a model's file or "
        "folder",
    )
    into: str = Field(description="path or address of the file that is written; what is there is replaced")
    format: Literal["safetensors", "torch"] = Field(
        "safetensors", description="as `save_file` of safetensors writes a state_dict, or `torch.save`"
    )

    @field_validator("model", "into")
    @classmethod
    def _is_place(cls, value: str) -> str:
        check_address(value)
        return value


def export(settings: ExportSettings) -> int:
    """Write the file; returns 1 if it can't be written, and 2 if an address can't be used."""
    try:
        with tempfile.TemporaryDirectory(prefix="ormo-export-") as folder:
            model = fetched(settings.model)
            file = Path(folder, "model")
            _write(model, file, settings.format)
            put_file(file, settings.into)
    except (StoreError, SettingsError, OSError) as error:
        logs.last_words("ormo-server export", error, "text")
        return 2 if isinstance(error, SettingsError) else 1
    sys.stdout.write(f"{settings.into}: {len(model.weights)} tensors from {settings.model}, {settings.format}\n")
    return 0


def _write(model: ModelFile, file: Path, kind: str) -> None:
    # A checkpoint's file has each name of a tied weight with values of its own, as a strict `load_state_dict` wants.
    if kind == "torch":
        torch.save(model.weights, file)
    else:
        save_tensors(file, model.weights, {"format": "pt"})
