"""A PyTorch module as the server sees it: its manifest and its distinct tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ormo_protos.manifest import (
    AVERAGE,
    BFLOAT16,
    BUFFER,
    FLOAT32,
    FLOAT64,
    INT64,
    LAST,
    MAXIMUM,
    PARAMETER,
    Manifest,
    ManifestError,
    TensorSpec,
)
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker.errors import ModelUnusable

# By the last part of a buffer's name, as batch norm has them; all else is the program's own, and whole at any time.
_AVERAGED = ("running_mean", "running_var")
_COUNTERS = ("num_batches_tracked",)
_PARAMETER_DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


def manifest_of(model: nn.Module) -> Manifest:
    """The model's manifest: the entries of its `state_dict`, in order, parameters before buffers.

    Frozen parameters count as parameters. A tensor that has several names is an alias in all but the first.

    Raises:
        ModelUnusable: a parameter is neither float32 nor bfloat16, or an entry is no tensor that can be
            sent; the sentence names it.
    """
    return ModelTensors(model).manifest


class ModelTensors:
    """The model's distinct tensors, without aliases, in the order of the payload's sections.

    Attributes:
        manifest: what the server must agree to.
        parameters: the module's own parameter objects; they stay the same ones throughout.

    Raises:
        ModelUnusable: as for `manifest_of`.
    """

    def __init__(self, model: nn.Module) -> None:
        entries = _entries(model)
        _check_usable(entries)
        try:
            self.manifest = Manifest.laid_out(_spec(name, entry) for name, entry in entries.items())
        except ManifestError as error:
            raise ModelUnusable(str(error)) from None
        own = [(spec, entries[spec.name]) for spec in self.manifest.tensors if not spec.alias_of]
        self.parameters = [entry.tensor for spec, entry in own if spec.section == "parameters"]
        # Looked up each time: a module may put a new tensor in the place of a buffer.
        buffers = [_Buffer.of(spec, entry) for spec, entry in own if spec.role == BUFFER]
        self._float_buffers = [buffer for buffer in buffers if buffer.spec.section == "float_buffers"]
        self._int_buffers = [buffer for buffer in buffers if buffer.spec.section == "int_buffers"]

    @property
    def has_buffers(self) -> bool:
        """Whether any buffer travels."""
        return bool(self._float_buffers or self._int_buffers)

    @property
    def float_buffers(self) -> list[Tensor]:
        """The buffers that travel as float32, as they are now.

        Raises:
            ModelUnusable: one is not what it was when the model was looked at.
        """
        return [buffer.current() for buffer in self._float_buffers]

    @property
    def int_buffers(self) -> list[Tensor]:
        """The integer and boolean buffers, and the bits of those in float64, as they are now.

        Raises:
            ModelUnusable: as for `float_buffers`.
        """
        return [buffer.bits() for buffer in self._int_buffers]

    @torch.no_grad()
    def mend(self, float_buffers: list[Tensor], int_buffers: list[Tensor]) -> list[str]:
        """Take over, of the server's buffers, those that it did not take from this model.

        These have NaN, or are averages with an infinity that the server's does not have.

        Args:
            float_buffers, int_buffers: the server's, in the shapes of the properties of these names.

        Returns:
            The names of the tensors.
        """
        buffers = zip(self._float_buffers + self._int_buffers, float_buffers + int_buffers, strict=True)
        return [buffer.spec.name for buffer, server in buffers if buffer.mend(server)]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of the state_dict, where it lives, and which earlier entry is the same tensor."""

    owner: nn.Module
    attribute: str
    tensor: Tensor
    alias_of: str

    def current(self) -> object:
        # Straight from where `getattr` would find it, with 1 µs of Python: there may be hundreds of them.
        tensor = self.owner._buffers.get(self.attribute)  # noqa: SLF001
        return getattr(self.owner, self.attribute, None) if tensor is None else tensor


@dataclass(frozen=True, slots=True)
class _Buffer:
    """A buffer that travels: as the server knows it, where it lives, and in which dtype it joined."""

    spec: TensorSpec
    entry: _Entry
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, spec: TensorSpec, entry: _Entry) -> "_Buffer":
        buffer = cls(spec, entry, entry.tensor.dtype, entry.tensor.shape)
        buffer._checked(entry.tensor)
        return buffer

    def current(self) -> Tensor:
        tensor, joined = self.entry.current(), self.entry.tensor
        if tensor is joined and joined.shape == self.shape and joined.dtype == self.dtype:
            return joined  # most are, and all else that is asked of a tensor takes longer
        return self._checked(tensor)

    def _checked(self, tensor: object) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise ModelUnusable(f"the buffer {self.spec.name!r} is no tensor any more: {self._wanted()}")
        if tensor.shape != self.shape or tensor.dtype != self.dtype:
            became = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ModelUnusable(f"the buffer {self.spec.name!r} has become {became}: {self._wanted()}")
        if tensor.layout != torch.strided:
            raise ModelUnusable(f"the buffer {self.spec.name!r} has become {tensor.layout}: {self._wanted()}")
        if any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ModelUnusable(
                f"the buffer {self.spec.name!r} is a view with several elements in one place in memory, as `expand` "
                "makes them: give it memory of its own with .clone()"
            )
        return tensor

    def bits(self) -> Tensor:
        current = self.current()
        return current.detach().view(torch.int64) if self.spec.dtype == FLOAT64 else current

    def mend(self, server: Tensor) -> bool:
        own = self.current()
        if not own.is_floating_point():
            return False
        server = server.view(torch.float64) if self.spec.dtype == FLOAT64 else server
        bad = own.isnan() if self.spec.merge == LAST else ~own.isfinite() & (own != server.to(own.device, own.dtype))
        if bad.any():
            own.copy_(server)
            return True
        return False

    def _wanted(self) -> str:
        return (
            f"the run has it as {self.dtype} of shape {self.spec.shape}; keep it so, or register it with "
            "persistent=False if it need not be kept"
        )


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
        if tensor.layout != torch.strided:
            raise ModelUnusable(
                f"the tensor {name!r} is {tensor.layout}, and only dense ones can be kept on the server: convert it "
                "with .to_dense(), or register it with persistent=False if it is a buffer that need not be kept"
            )
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


def _spec(name: str, entry: _Entry) -> TensorSpec:
    shape = tuple(entry.tensor.shape)
    if isinstance(entry.tensor, nn.Parameter):
        dtype = _parameter_dtype(name, entry.tensor)
        return TensorSpec(name, shape, dtype, PARAMETER, alias_of=entry.alias_of)
    dtype = _buffer_dtype(name, entry.tensor)
    return TensorSpec(name, shape, dtype, BUFFER, alias_of=entry.alias_of, merge=_merge(name, dtype))


def _merge(name: str, dtype: pb.Dtype.ValueType) -> pb.Merge.ValueType:
    kind = name.rpartition(".")[2]
    if kind in _COUNTERS and dtype == INT64:
        return MAXIMUM
    return AVERAGE if kind in _AVERAGED and dtype != INT64 else LAST


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
    return {torch.bfloat16: BFLOAT16, torch.float64: FLOAT64}.get(tensor.dtype, FLOAT32)
