"""The model that a run starts from, given as a file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ormo_protos.manifest import FLOAT64, INT64, Manifest, TensorSpec
from ormo_server.store.checkpoints import MANIFEST_KEY, model_of, unsound_tensors
from ormo_server.store.files import StoreError, listed, load_tensors, non_finite, reading
from ormo_server.store.flat_model import FlatModel

_SERVED = (torch.float32, torch.bfloat16, torch.int64, torch.float64)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The tensors of a model by name.

    Attributes:
        path: the file.
        weights: by name; float32, bfloat16, float64 or int64, without NaN.
        manifest: the model's, if the file says it. A plain state_dict does not: safetensors sorts the tensors, so their
            order is lost, and so is what is a parameter and what a buffer. The first worker knows both.
    """

    path: Path
    weights: dict[str, torch.Tensor]
    manifest: Manifest | None

    @classmethod
    def load(cls, path: Path) -> "ModelFile":
        """Read a state_dict in safetensors format, or the model of a checkpoint, given as its directory.

        Raises:
            StoreError: it is missing, not safetensors, damaged, or has values that are not served.
        """
        try:
            file = model_of(path) if path.is_dir() else path
            weights, metadata = load_tensors(file)
        except StoreError as error:
            raise StoreError(
                f"no model to start from: {error}; expected a file that safetensors.torch.save_file or save_model "
                "wrote, or the directory of a checkpoint"
            ) from error
        _refuse_values(file, weights)
        with reading(file):
            rows = metadata.get(MANIFEST_KEY)
            return cls(file, weights, None if rows is None else Manifest.from_json(json.loads(rows)))

    def arranged(self, manifest: Manifest) -> FlatModel:
        """The values in the order of this manifest, in memory of their own.

        Names and shapes must be the manifest's. Of several names for one tensor the file needs only one. float32 and
        bfloat16 pass for each other, as the server computes in float32, and for float64.

        Raises:
            StoreError: the file is of another model, or a parameter in it is infinite.
        """
        found = list(self._differences(manifest))
        if found:
            raise StoreError(
                f"{self.path} is not the model that is to be trained: {listed(found)}; give the file of this model, or "
                "none to start from the first worker's"
            )
        flat = FlatModel.empty(manifest)
        for spec in manifest.tensors:
            if spec.name in self.weights:
                flat.view(spec).copy_(self.weights[spec.name])
        bad = unsound_tensors(flat.state_dict(manifest), manifest)
        if bad:
            raise StoreError(f"{self.path} has infinite values in {listed(bad)}: start from a sound model")
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


def _refuse_values(path: Path, weights: dict[str, torch.Tensor]) -> None:
    other = [f"{name!r} ({tensor.dtype})" for name, tensor in weights.items() if tensor.dtype not in _SERVED]
    if other:
        raise StoreError(
            f"{path} has tensors that are not served: {listed(other)}; convert floating ones to float32 or bfloat16, "
            "integer ones to int64, and save it again"
        )
    bad = non_finite(weights, buffers=weights)  # which of them are parameters, the manifest says
    if bad:
        raise StoreError(f"{path} has NaN in {listed(bad)}: start from a sound model")
