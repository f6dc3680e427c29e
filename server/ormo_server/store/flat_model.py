"""A model as three vectors, and its tensors by name."""

from dataclasses import dataclass

import torch

from ormo_protos.manifest import BFLOAT16, FLOAT32, FLOAT64, INT64, Manifest, TensorSpec

_TORCH_DTYPES: dict[int, torch.dtype] = {
    FLOAT32: torch.float32,
    BFLOAT16: torch.bfloat16,
    INT64: torch.int64,
    FLOAT64: torch.float64,
}


@dataclass(frozen=True, slots=True)
class FlatModel:
    """The values of a model in the flat layout of its manifest.

    Attributes:
        params: shape (d,), float32.
        float_buffers: shape (f,), float32.
        int_buffers: shape (i,), int64, or the bits of float64.
    """

    params: torch.Tensor
    float_buffers: torch.Tensor
    int_buffers: torch.Tensor

    @classmethod
    def empty(cls, manifest: Manifest) -> "FlatModel":
        """Room for this model; the values are whatever the memory holds."""
        sizes = manifest.sizes
        return cls(
            torch.empty(sizes["parameters"]),
            torch.empty(sizes["float_buffers"]),
            torch.empty(sizes["int_buffers"], dtype=torch.int64),
        )

    def view(self, spec: TensorSpec) -> torch.Tensor:
        """The place of one tensor, in its shape; float32, int64 or float64, whatever dtype the model has it in."""
        section = {"parameters": self.params, "float_buffers": self.float_buffers, "int_buffers": self.int_buffers}
        flat = section[spec.section][spec.offset : spec.offset + spec.elements]
        return (flat.view(torch.float64) if spec.dtype == FLOAT64 else flat).view(spec.shape)

    def state_dict(self, manifest: Manifest) -> dict[str, torch.Tensor]:
        """All tensors of the model under all their names, in the model's shapes and dtypes.

        Where the dtype is the vector's they are views of it. Another name for a tensor gets a copy of its own:
        safetensors takes no memory twice, and a strict `load_state_dict` wants every name.
        """
        found = {
            "parameters": self.params.numel(),
            "float_buffers": self.float_buffers.numel(),
            "int_buffers": self.int_buffers.numel(),
        }
        sizes = {name: manifest.sizes[name] for name in found}
        assert found == sizes, f"vectors of {found} elements for a model of {sizes}"
        return {
            spec.name: self.view(spec).to(_TORCH_DTYPES[spec.dtype], copy=bool(spec.alias_of))
            for spec in manifest.tensors
        }
