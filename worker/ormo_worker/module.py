"""A PyTorch module as the server sees it: its manifest and its distinct tensors."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ormo_protos.manifest import (
    BFLOAT16,
    BUFFER,
    FLOAT32,
    FROZEN,
    INT64,
    PARAMETER,
    Manifest,
    ManifestError,
    TensorSpec,
)
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker.errors import ModelUnusable

_PARAMETER_DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


def manifest_of(model: nn.Module) -> Manifest:
    """The model's manifest: the entries of its `state_dict`, in order, parameters before frozen ones before buffers.

    Frozen are the parameters that require no gradient now: a run in which `params=` left some out has those frozen,
    too. A tensor that has several names is an alias in all but the first.

    Raises:
        ModelUnusable: a parameter is neither float32 nor bfloat16, or an entry is no tensor that can be
            sent; the sentence names it.
    """
    return ModelTensors(model).manifest


class ModelTensors:
    """The model's distinct tensors, without aliases, in the order of the payload's sections.

    Args:
        model: that has them.
        frozen: parameters that this run does not train; by default those that require no gradient.

    Attributes:
        manifest: what the server must agree to.
        parameters: the module's own parameter objects, of those that are trained; they stay the same ones throughout.
        frozen: as `parameters`, of the others.

    Raises:
        ModelUnusable: as for `manifest_of`.
    """

    def __init__(self, model: nn.Module, frozen: Collection[Tensor] | None = None) -> None:
        entries = _entries(model)
        _check_usable(entries)
        resting = frozen_in(model) if frozen is None else frozen
        _check_trained(entries, resting)
        try:
            self.manifest = Manifest.laid_out(_spec(name, entry, resting) for name, entry in entries.items())
        except ManifestError as error:
            raise ModelUnusable(str(error)) from None
        own = [(spec.section, entries[spec.name]) for spec in self.manifest.tensors if not spec.alias_of]
        self.parameters = [entry.tensor for section, entry in own if section == "parameters"]
        self.frozen = [entry.tensor for section, entry in own if section == "frozen"]
        # Looked up each time: a module may put a new tensor in the place of a buffer.
        self._float_buffers = [entry for section, entry in own if section == "float_buffers"]
        self._int_buffers = [entry for section, entry in own if section == "int_buffers"]

    def named_frozen(self) -> Iterator[tuple[str, Tensor]]:
        """The frozen parameters with their first names."""
        names = (spec.name for spec in self.manifest.tensors if spec.role == FROZEN and not spec.alias_of)
        return zip(names, self.frozen, strict=True)

    @property
    def has_buffers(self) -> bool:
        """Whether any buffer travels."""
        return bool(self._float_buffers or self._int_buffers)

    @property
    def float_buffers(self) -> list[Tensor]:
        """The floating-point buffers as they are now."""
        return [entry.current() for entry in self._float_buffers]

    @property
    def int_buffers(self) -> list[Tensor]:
        """The integer and boolean buffers as they are now."""
        return [entry.current() for entry in self._int_buffers]


def frozen_in(model: nn.Module) -> set[Tensor]:
    """The model's parameters that require no gradient."""
    return {parameter for parameter in model.parameters() if not parameter.requires_grad}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of the state_dict, where it lives, and which earlier entry is the same tensor."""

    owner: nn.Module
    attribute: str
    tensor: Tensor
    alias_of: str

    def current(self) -> Tensor:
        # Straight from where `getattr` would find it, with 1 µs of Python: there may be hundreds of them.
        tensor = self.owner._buffers.get(self.attribute)  # noqa: SLF001
        if tensor is None:
            tensor = getattr(self.owner, self.attribute)
        assert isinstance(tensor, Tensor)
        return tensor


def _entries(model: nn.Module) -> dict[str, _Entry]:
    # A compiled module names its tensors after the plain one, which other workers may well have.
    plain: nn.Module = getattr(model, "_orig_mod", model)
    entries: dict[str, _Entry] = {}
    first_names: dict[int, str] = {}
    for name, tensor in plain.state_dict(keep_vars=True).items():
        owner_name, _, attribute = name.rpartition(".")
        owner = plain.get_submodule(owner_name)
        held = getattr(owner, attribute, None)
        if not isinstance(held, Tensor) or held is not tensor:
            raise ModelUnusable(
                f"the model's state_dict has {name!r}, which is neither a parameter nor a buffer: only those "
                "can be kept on the server"
            )
        first = first_names.setdefault(id(held), name)
        entries[name] = _Entry(owner, attribute, held, alias_of="" if first == name else first)
    for name, parameter in plain.named_parameters():
        if id(parameter) not in first_names:
            raise ModelUnusable(
                f"the parameter {name!r} is not in the model's state_dict, and so would not be in the server's "
                "checkpoint either: leave the state_dict complete"
            )
    return entries


def _check_usable(entries: dict[str, _Entry]) -> None:
    places: dict[tuple[torch.device, int], str] = {}
    for name, entry in entries.items():
        tensor = entry.tensor
        if nn.parameter.is_lazy(tensor):
            raise ModelUnusable(f"the tensor {name!r} has no shape yet: run one batch through the model first")
        if tensor.is_meta:
            raise ModelUnusable(f"the tensor {name!r} is on the meta device and has no values: load them first")
        if entry.alias_of or not tensor.numel():
            continue
        other = places.setdefault((tensor.device, tensor.data_ptr()), name)
        if other != name:  # each delivery would write the one memory twice, with different values
            raise ModelUnusable(
                f"{name!r} and {other!r} are two tensors in the same memory: to tie weights, assign the one "
                "parameter object to both places"
            )


def _check_trained(entries: dict[str, _Entry], frozen: Collection[Tensor]) -> None:
    if frozen and not any(_is_parameter(entry) and entry.tensor not in frozen for entry in entries.values()):
        raise ModelUnusable(
            "all parameters of the model are frozen (requires_grad=False, or left out of params=): there is nothing to "
            "train"
        )


def _is_parameter(entry: _Entry) -> bool:
    return isinstance(entry.tensor, nn.Parameter)


def _spec(name: str, entry: _Entry, frozen: Collection[Tensor]) -> TensorSpec:
    shape = tuple(entry.tensor.shape)
    if _is_parameter(entry):
        role = FROZEN if entry.tensor in frozen else PARAMETER
        return TensorSpec(name, shape, _parameter_dtype(name, entry.tensor), role, alias_of=entry.alias_of)
    return TensorSpec(name, shape, _buffer_dtype(name, entry.tensor), BUFFER, alias_of=entry.alias_of)


def _parameter_dtype(name: str, tensor: Tensor) -> pb.Dtype.ValueType:
    if tensor.dtype not in _PARAMETER_DTYPES:
        raise ModelUnusable(
            f"the parameter {name!r} is {tensor.dtype}, but parameters must be torch.float32 or "
            "torch.bfloat16: convert the model first (for mixed precision keep it in float32 and use "
            "torch.autocast)"
        )
    return _PARAMETER_DTYPES[tensor.dtype]


def _buffer_dtype(name: str, tensor: Tensor) -> pb.Dtype.ValueType:
    if tensor.is_complex() or tensor.is_quantized:
        raise ModelUnusable(
            f"the buffer {name!r} is {tensor.dtype}, but buffers must be real floating-point, integer or "
            "boolean: register it with persistent=False if it need not be kept"
        )
    if not tensor.is_floating_point():
        return INT64
    return BFLOAT16 if tensor.dtype == torch.bfloat16 else FLOAT32
