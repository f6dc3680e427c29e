"""A PyTorch module as the server sees it: its manifest and its distinct tensors."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ormo_protos.manifest import (
    AVERAGE,
    BFLOAT16,
    BUFFER,
    FLOAT32,
    FLOAT64,
    FROZEN,
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
from ormo_worker.pytorch.devices import find_shared

# By the last part of a buffer's name, as batch norm has them; all else is the program's own, and whole at any time.
_AVERAGED = ("running_mean", "running_var")
_COUNTERS = ("num_batches_tracked",)
_PARAMETER_DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")  # by name: importing them takes longer than all else here
_WHOLE = (
    "a worker needs the whole model, in plain tensors; if it is too large for one device, put its layers on several"
)


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
        model: the module whose tensors they are.
        frozen: parameters that this run does not train; by default those that require no gradient.

    Attributes:
        manifest: what the server must agree to.
        parameters: the module's own parameter objects, of those that are trained; they stay the same ones throughout.
        frozen: the module's own parameter objects, of those that are not trained.

    Raises:
        ModelUnusable: as for `manifest_of`.
    """

    def __init__(self, model: nn.Module, frozen: Collection[Tensor] | None = None) -> None:
        _check_whole(model)
        entries = _entries(model)
        _check_usable(entries)
        resting = frozen_in(model) if frozen is None else frozen
        _check_trained(entries, resting)
        try:
            self.manifest = Manifest.laid_out(_spec(name, entry, resting) for name, entry in entries.items())
        except ManifestError as error:
            raise ModelUnusable(str(error)) from None
        own = [(spec, entries[spec.name]) for spec in self.manifest.tensors if not spec.alias_of]
        self.parameters = [entry.tensor for spec, entry in own if spec.section == "parameters"]
        self.frozen = [entry.tensor for spec, entry in own if spec.section == "frozen"]
        # Looked up each time: a module may put a new tensor in the place of a buffer.
        buffers = [_Buffer.of(spec, entry) for spec, entry in own if spec.role == BUFFER]
        self._float_buffers = [buffer for buffer in buffers if buffer.spec.section == "float_buffers"]
        self._int_buffers = [buffer for buffer in buffers if buffer.spec.section == "int_buffers"]

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

    @property
    def buffers(self) -> list[Tensor]:
        """All buffers that travel, as they are now.

        Raises:
            ModelUnusable: as for `float_buffers`.
        """
        return self.float_buffers + self.int_buffers

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
        return cls(spec, entry, entry.tensor.dtype, entry.tensor.shape)

    def current(self) -> Tensor:
        tensor, joined = self.entry.current(), self.entry.tensor
        if tensor is joined and joined.shape == self.shape and joined.dtype == self.dtype:
            return joined  # most are, and all else that is asked of a tensor takes longer
        return self._check(tensor)

    def _check(self, tensor: object) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise ModelUnusable(f"the buffer {self.spec.name!r} is no longer a tensor: {self._advice()}")
        if tensor.shape != self.shape or tensor.dtype != self.dtype:
            became = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ModelUnusable(f"the buffer {self.spec.name!r} has become {became}: {self._advice()}")
        if tensor.layout != torch.strided:
            raise ModelUnusable(f"the buffer {self.spec.name!r} has become {tensor.layout}: {self._advice()}")
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

    def _advice(self) -> str:
        return (
            f"the run has it as {self.dtype} of shape {self.spec.shape}; keep it so, or register it with "
            "persistent=False if it need not be kept"
        )


def _entries(model: nn.Module) -> dict[str, _Entry]:
    homes = _homes(model)
    entries: dict[str, _Entry] = {}
    first_names: dict[int, str] = {}
    for full_name, tensor in model.state_dict(keep_vars=True).items():
        name = _plain_name(model, full_name)
        if id(tensor) not in homes:
            raise ModelUnusable(
                f"the model's state_dict has {name!r}, which is neither a parameter nor a buffer: only those "
                "can be kept on the server"
            )
        first = first_names.setdefault(id(tensor), name)
        entries[name] = _Entry(*homes[id(tensor)], tensor, alias_of="" if first == name else first)
    for name, parameter in model.named_parameters():
        if id(parameter) not in first_names:
            raise ModelUnusable(
                f"the parameter {name!r} is not in the model's state_dict, and so would not be in the server's "
                "checkpoint either: leave the state_dict complete"
            )
    return entries


def _homes(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """The module and attribute where each tensor lives, by its id: names need not say, for hooks may change them."""
    homes: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):  # noqa: SLF001
            for attribute, value in held.items():
                if isinstance(value, Tensor):
                    homes.setdefault(id(value), (module, attribute))
    return homes


def _plain_name(model: nn.Module, name: str) -> str:
    """The name without what wrappers put into it, so that a plain, a compiled and a parallel model are the same."""
    parts: list[str] = []
    module: nn.Module | None = model
    for part in name.split("."):
        if module is None or part != _wrapped(module):
            parts.append(part)
        module = None if module is None else module._modules.get(part)  # noqa: SLF001
    return ".".join(parts)


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module in a compiled or parallel one."""
    while (name := _wrapped(model)) is not None:
        model = model.get_submodule(name)
    return model


def _wrapped(module: nn.Module) -> str | None:
    """The name of the one module that this one only wraps; None if it is more than that."""
    names = [*module._parameters, *module._buffers, *module._modules]  # noqa: SLF001
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) and names == ["module"]:
        return "module"
    return "_orig_mod" if names == ["_orig_mod"] else None  # of torch.compile


def _check_whole(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(base.__name__ in _SHARDED for base in type(module).__mro__):
            what = f"the module {name!r}" if name else "the model"
            raise ModelUnusable(
                f"{what} is sharded by FSDP, so each process has a part of it (DTensor parameters): {_WHOLE}; GPUs "
                "that have room for it are one worker with DistributedDataParallel and process_group="
            )


def _check_usable(entries: dict[str, _Entry]) -> None:
    for name, entry in entries.items():
        tensor: Any = entry.tensor  # to mypy no tensor can be put together from others
        if nn.parameter.is_lazy(tensor):
            raise ModelUnusable(f"the tensor {name!r} has no shape yet: run one batch through the model first")
        if tensor.layout != torch.strided:
            raise ModelUnusable(
                f"the tensor {name!r} is {tensor.layout}, and only dense ones can be kept on the server: convert it "
                "with .to_dense(), or register it with persistent=False if it is a buffer that need not be kept"
            )
        if tensor.is_meta:
            raise ModelUnusable(f"the tensor {name!r} is on the meta device and has no values: load them first")
        if is_traceable_wrapper_subclass(tensor):
            raise ModelUnusable(
                f"the tensor {name!r} is a {type(tensor).__name__}, which only stands for its values, as tensor "
                f"parallelism and quantisation make them: {_WHOLE}"
            )
    own = ((name, entry.tensor) for name, entry in entries.items() if not entry.alias_of)
    for name, other in find_shared(own):  # each delivery would write the one memory twice, with different values
        if name == other:
            raise ModelUnusable(
                f"the tensor {name!r} has several elements in the same place in memory, as `expand` makes them: give "
                "it memory of its own with .clone()"
            )
        raise ModelUnusable(
            f"{name!r} and {other!r} are two tensors in the same memory, at least in part: to tie weights, assign the "
            "one parameter object to both places; give all else memory of its own with .clone()"
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
