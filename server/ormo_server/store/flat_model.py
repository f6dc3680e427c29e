"""A model as four vectors, its tensors by name, and how its buffers are merged, as its manifest says."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from ormo_protos.manifest import (
    AVERAGE,
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    INT64,
    LAST,
    MAXIMUM,
    Manifest,
    TensorSpec,
)
from ormo_server.core.buffers import Buffer, Buffers, Merge

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
        return self.named(manifest.tensors)

    def named(self, specs: Iterable[TensorSpec]) -> dict[str, torch.Tensor]:
        """As `state_dict`, some of its tensors."""
        return {spec.name: self.view(spec).to(_TORCH_DTYPES[spec.dtype], copy=bool(spec.alias_of)) for spec in specs}


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
