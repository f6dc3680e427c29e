"""A model as four vectors, and as files: the one in a checkpoint, and the one that a run may start from."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ormo_protos.manifest import (
    AVERAGE,
    BFLOAT16,
    BUFFER,
    FLOAT32,
    FLOAT64,
    INT64,
    LAST,
    MAXIMUM,
    Manifest,
    TensorSpec,
)
from ormo_server.core.buffers import Buffer, Buffers, Merge
from ormo_server.store.files import StoreError, check_sums, listed, non_finite, reading
from ormo_server.store.weights import EXPECTED, read_weights

# Of a checkpoint.
MODEL_FILE = "model.safetensors"
DOCUMENT_FILE = "checkpoint.json"
# Where a model file carries its manifest, as JSON.
MANIFEST_KEY = "ormo_manifest"

_TORCH_DTYPES: dict[int, torch.dtype] = {
    FLOAT32: torch.float32,
    BFLOAT16: torch.bfloat16,
    INT64: torch.int64,
    FLOAT64: torch.float64,
}


def no_frozen() -> torch.Tensor:
    """For a model in which everything is trained."""
    return torch.zeros(0, dtype=torch.float32, device="cpu")


@dataclass(frozen=True, slots=True)
class FlatModel:
    """The values of a model in the flat layout of its manifest.

    Attributes:
        params: shape (d,), float32.
        float_buffers: shape (f,), float32.
        int_buffers: shape (i,), int64, or the bits of float64.
        frozen: shape (z,), float32.
    """

    params: torch.Tensor
    float_buffers: torch.Tensor
    int_buffers: torch.Tensor
    frozen: torch.Tensor = field(default_factory=no_frozen)

    @classmethod
    def empty(cls, manifest: Manifest) -> "FlatModel":
        """Room for this model; the values are whatever the memory holds."""
        sizes = manifest.sizes
        return cls(
            torch.empty(sizes["parameters"], dtype=torch.float32, device="cpu"),
            torch.empty(sizes["float_buffers"], dtype=torch.float32, device="cpu"),
            torch.empty(sizes["int_buffers"], dtype=torch.int64, device="cpu"),
            torch.empty(sizes["frozen"], dtype=torch.float32, device="cpu"),
        )

    @property
    def _sections(self) -> dict[str, torch.Tensor]:
        return {
            "parameters": self.params,
            "float_buffers": self.float_buffers,
            "int_buffers": self.int_buffers,
            "frozen": self.frozen,
        }

    def view(self, spec: TensorSpec) -> torch.Tensor:
        """The place of one tensor, in its shape; float32, int64 or float64, whatever dtype the model has it in."""
        flat = self._sections[spec.section][spec.offset : spec.offset + spec.elements]
        return (flat.view(torch.float64) if spec.dtype == FLOAT64 else flat).view(spec.shape)

    def state_dict(self, manifest: Manifest) -> dict[str, torch.Tensor]:
        """All tensors of the model under all their names, in the model's shapes and dtypes.

        Where the dtype is the vector's they are views of it. Another name for a tensor gets a copy of its own:
        safetensors takes no memory twice, and a strict `load_state_dict` wants every name.
        """
        found = {name: vector.numel() for name, vector in self._sections.items()}
        assert found == manifest.sizes, f"vectors of {found} elements for a model of {manifest.sizes}"
        return self.tensors_of(manifest.tensors)

    def tensors_of(self, specs: Iterable[TensorSpec]) -> dict[str, torch.Tensor]:
        """The tensors of these specs by name, as `state_dict` has them."""
        return {spec.name: self.view(spec).to(_TORCH_DTYPES[spec.dtype], copy=bool(spec.alias_of)) for spec in specs}


# Values that can't be kept


def unsound_tensors(tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> list[str]:
    """Names of those of a model's tensors that have NaN, or are parameters and have infinity."""
    return non_finite(tensors, {spec.name for spec in manifest.tensors if spec.role == BUFFER})


# The buffers, for the core


_MERGES = {AVERAGE: Merge.AVERAGE, MAXIMUM: Merge.MAXIMUM, LAST: Merge.LAST}


def buffers_of(manifest: Manifest) -> Buffers:
    """The buffers of a model, for its state machine."""
    return Buffers(tuple(_section(manifest, "float_buffers")), tuple(_section(manifest, "int_buffers")))


def _section(manifest: Manifest, section: str) -> Iterator[Buffer]:
    for spec in manifest.tensors:
        if spec.section == section and not spec.alias_of:
            yield Buffer(spec.offset, spec.offset + spec.elements, _merge(spec), spec.dtype == FLOAT64)


def _merge(spec: TensorSpec) -> Merge:
    # Workers and files that say nothing: as it was when there was no choice.
    return _MERGES.get(spec.merge, Merge.MAXIMUM if spec.dtype == INT64 else Merge.AVERAGE)


# A model to start from


_SERVED = (torch.float32, torch.bfloat16, torch.int64, torch.float64)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The tensors of a model by name.

    Attributes:
        path: of the file or folder.
        name: what people call it: its path, or where it was brought from.
        weights: by name; float32, bfloat16, float64 or int64, without NaN.
        manifest: the model's, if the file says it. A plain state_dict does not: safetensors sorts the tensors, so their
            order is lost, and so is what is a parameter and what a buffer. The first worker knows both.
    """

    path: Path
    name: str
    weights: dict[str, torch.Tensor]
    manifest: Manifest | None

    @classmethod
    def load(cls, path: Path, said: str = "") -> "ModelFile":
        """Read a model from any of the kinds of file in `weights.py`, or that of a checkpoint, given as its directory.

        Args:
            path: of the file or directory.
            said: what people call it, if that is not the path.

        Raises:
            StoreError: it is missing, damaged, of another format, or has values that are not served.
        """
        name = said or str(path)
        try:
            if (path / DOCUMENT_FILE).exists():
                check_sums(path, (MODEL_FILE,))
                path = path / MODEL_FILE
            weights, metadata = read_weights(path)
        except StoreError as error:
            why = str(error) if not said else str(error).replace(str(path), said)
            raise StoreError(f"no model to start from: {why}; expected {EXPECTED}") from error
        _refuse_values(name, weights)
        with reading(path):
            rows = metadata.get(MANIFEST_KEY)
            return cls(path, name, weights, None if rows is None else Manifest.from_json(json.loads(rows)))

    def arrange(self, manifest: Manifest) -> FlatModel:
        """The values in the order of this manifest, in memory of their own.

        Names and shapes must be the manifest's. Of several names for one tensor the file needs only one. float32 and
        bfloat16 pass for each other, as the server computes in float32, and for float64.

        Raises:
            StoreError: the file is of another model, or a parameter in it is infinite.
        """
        found = list(self._differences(manifest))
        if found:
            raise StoreError(
                f"{self.name} is not the model that is to be trained: {listed(found)}; give the file of this model, or "
                "none, to start from the first worker's"
            )
        flat = FlatModel.empty(manifest)
        for spec in manifest.tensors:
            if spec.name in self.weights:
                flat.view(spec).copy_(self.weights[spec.name])
        bad = unsound_tensors(flat.state_dict(manifest), manifest)
        if bad:
            raise StoreError(f"{self.name} has infinite values in {listed(bad)}: start from a sound model")
        return flat

    def _differences(self, manifest: Manifest) -> Iterator[str]:
        there = {spec.alias_of or spec.name: spec.name for spec in manifest.tensors if spec.name in self.weights}
        for spec in manifest.tensors:
            if spec.name in self.weights:
                yield from self._difference(spec, there[spec.alias_of or spec.name])
            elif not spec.alias_of and spec.name not in there:
                yield f"{spec.name!r} is missing in the file"
        names = {spec.name for spec in manifest.tensors}
        yield from (f"{name!r} is in the file, but not in the model" for name in self.weights if name not in names)

    def _difference(self, spec: TensorSpec, other_name: str) -> Iterator[str]:
        weight, other = self.weights[spec.name], self.weights[other_name]
        if tuple(weight.shape) != spec.shape or not _holds(spec, weight.dtype):
            came = f"{str(weight.dtype).removeprefix('torch.')} of shape {tuple(weight.shape)}"
            yield f"{spec.name!r} is {came} in the file and {spec.described()} in the model"
        elif weight.dtype != other.dtype or not torch.equal(weight, other):
            yield f"{spec.name!r} and {other_name!r} differ in the file and are one tensor in the model"


def _holds(spec: TensorSpec, dtype: torch.dtype) -> bool:
    """Whether the server can have a file's values: exactly, or as float32 from the other dtype of parameters."""
    if dtype == torch.int64:
        return spec.dtype == INT64
    return spec.dtype == FLOAT64 or (spec.dtype != INT64 and dtype != torch.float64)


def _refuse_values(path: str, weights: dict[str, torch.Tensor]) -> None:
    other = [f"{name!r} ({tensor.dtype})" for name, tensor in weights.items() if tensor.dtype not in _SERVED]
    if other:
        raise StoreError(
            f"{path} has tensors that are not served: {listed(other)}; convert floating ones to float32 or bfloat16, "
            "integer ones to int64, and save it again"
        )
    bad = non_finite(weights, buffers=weights)  # which of them are parameters, the manifest says
    if bad:
        raise StoreError(f"{path} has NaN in {listed(bad)}: start from a sound model")
