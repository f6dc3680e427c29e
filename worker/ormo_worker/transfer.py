"""Tensors on the way between a model and the payload in which they travel."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ormo_protos.manifest import FLOAT32
from ormo_protos.tensors import Payload, PayloadLayout, torch_dtype
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker.module import ModelTensors

Tensors = list[Tensor]


class Staging:
    """Makes payloads for a model, and the ways between the two.

    Where all parameters are on one CUDA device, tensors are packed and unpacked there and cross to
    page-locked host memory in one piece. Otherwise they are copied straight to and from their places.

    Attributes:
        tensors: the model's.
        device: the CUDA device that holds all parameters, if there is one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = ModelTensors(model)
        devices = {parameter.device for parameter in self.tensors.parameters}
        self.device = devices.pop() if len(devices) == 1 and all(d.type == "cuda" for d in devices) else None
        self._mirrors: dict[int, _Mirror] = {}

    def payload(self, dtype: pb.Dtype.ValueType, *, with_buffers: bool) -> Payload:
        """Memory for one payload of this model."""
        layout = PayloadLayout.of(self.tensors.manifest, dtype, with_buffers=with_buffers)
        return Payload(layout, pin_memory=self.device is not None and self.device.type == "cuda")

    def transfer(self, payload: Payload) -> "Transfer":
        """The way between the model and this payload."""
        if self.device is None:
            return Transfer(self.tensors, payload, _Direct(payload))
        dtype = payload.layout.dtype
        if dtype not in self._mirrors:  # one serves all payloads of a dtype: only one is under way at a time
            self._mirrors[dtype] = self._mirror(dtype, self.device)
        return Transfer(self.tensors, payload, _ThroughDevice(payload, self._mirrors[dtype], self.device))

    def snapshot(self) -> Payload:
        """The model as it is now, float32 with buffers: what a server without a model is offered."""
        layout = PayloadLayout.of(self.tensors.manifest, FLOAT32, with_buffers=True)
        payload = Payload(layout)  # wanted once or twice in a run: not worth page-locked memory, nor a mirror
        Transfer(self.tensors, payload, _Direct(payload)).gather_parameters()
        return payload

    def _mirror(self, dtype: pb.Dtype.ValueType, device: torch.device) -> "_Mirror":
        sizes = self.tensors.manifest.sizes
        return _Mirror(
            torch.empty(sizes["parameters"], dtype=torch_dtype(dtype), device=device),
            torch.empty(sizes["float_buffers"], dtype=torch.float32, device=device),
            torch.empty(sizes["int_buffers"], dtype=torch.int64, device=device),
        )


class Transfer:
    """Moves tensors between a model and one payload, in either direction, converting dtypes as it goes.

    Every method returns when the payload may be read, sent or overwritten.

    Attributes:
        payload: where the tensors go or come from.
    """

    def __init__(self, tensors: ModelTensors, payload: Payload, way: "_Way") -> None:
        self.payload = payload
        self._tensors = tensors
        self._way = way
        self._parameters = _cut(way.flat.parameters, tensors.parameters)
        self._float_buffers: Tensors = []
        self._int_buffers: Tensors = []
        if payload.layout.with_buffers:
            self._float_buffers = _cut(way.flat.float_buffers, tensors.float_buffers)
            self._int_buffers = _cut(way.flat.int_buffers, tensors.int_buffers)

    @torch.no_grad()
    def gather_gradients(self, decays: Sequence[float | None]) -> None:
        """Write `g + decay * w` for each parameter, and the buffers if the payload has them.

        Args:
            decays: one number for each of the model's distinct parameters; None for one that is not
                trained. Such a one, and one without a gradient, counts as zero, without decay.
        """
        idle: Tensors = []
        active: defaultdict[float, _Rows] = defaultdict(_Rows)  # by decay
        for decay, view, weight in zip(decays, self._parameters, self._tensors.parameters, strict=True):
            gradient = weight.grad
            if decay is None or gradient is None:
                idle.append(view)
            else:
                active[decay].add(view, gradient.to_dense() if gradient.is_sparse else gradient, weight)
        if idle:
            torch._foreach_zero_(idle)
        for decay, rows in active.items():
            _write_decayed(rows, decay)
        self._gather_buffers()
        self._way.to_payload()

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """Write the parameters, and the buffers if the payload has them."""
        torch._foreach_copy_(self._parameters, self._tensors.parameters)
        self._gather_buffers()
        self._way.to_payload()

    @torch.no_grad()
    def load(self) -> None:
        """Copy the payload into the model in place: parameters, and buffers if the payload has them."""
        copies = self._way.from_payload()
        torch._foreach_copy_(self._tensors.parameters, self._parameters)
        if self._float_buffers:
            torch._foreach_copy_(self._tensors.float_buffers, self._float_buffers)
        if self._int_buffers:
            torch._foreach_copy_(self._tensors.int_buffers, self._int_buffers)
        copies.wait()

    def _gather_buffers(self) -> None:
        if self._float_buffers:
            torch._foreach_copy_(self._float_buffers, self._tensors.float_buffers)
        if self._int_buffers:
            torch._foreach_copy_(self._int_buffers, self._tensors.int_buffers)


class _Flat(Protocol):
    """Three flat tensors, one for each section of a payload."""

    @property
    def parameters(self) -> Tensor: ...
    @property
    def float_buffers(self) -> Tensor: ...
    @property
    def int_buffers(self) -> Tensor: ...


class _Way(Protocol):
    """Where single tensors are packed to sections (`flat`), and how these become the payload's."""

    @property
    def flat(self) -> _Flat: ...
    def to_payload(self) -> None: ...
    def from_payload(self) -> "_Copies": ...


@dataclass(frozen=True, slots=True)
class _Direct:
    """Tensors are copied to and from the payload itself: on the CPU, and for models on several devices."""

    flat: Payload

    def to_payload(self) -> None:
        """Nothing is left to do."""

    def from_payload(self) -> "_Copies":
        return _Copies(None)


@dataclass(frozen=True, slots=True)
class _Mirror:
    """The sections of a payload, on a device."""

    parameters: Tensor
    float_buffers: Tensor
    int_buffers: Tensor


@dataclass(frozen=True, slots=True)
class _ThroughDevice:
    """Tensors are packed on their device, and the sections cross whole."""

    payload: Payload
    flat: _Mirror
    device: torch.device

    def to_payload(self) -> None:
        for there, here in self._pairs():
            here.copy_(there, non_blocking=True)
        _Copies(self.device).wait()

    def from_payload(self) -> "_Copies":
        for there, here in self._pairs():
            there.copy_(here, non_blocking=True)
        return _Copies(self.device)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        pairs = [(self.flat.parameters, self.payload.parameters)]
        if self.payload.layout.with_buffers:
            pairs.append((self.flat.float_buffers, self.payload.float_buffers))
            pairs.append((self.flat.int_buffers, self.payload.int_buffers))
        return pairs


class _Copies:
    """What has been queued on the device's current stream up to this moment; None if all is done.

    Waiting for an event leaves what is queued behind it running, which synchronizing the device would not.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._event: torch.cuda.Event | None = None
        if device is not None and device.type == "cuda":
            self._event = torch.cuda.current_stream(device).record_event()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class _Rows:
    """Tensors that belong together, as `torch._foreach` functions want them: in three lists."""

    def __init__(self) -> None:
        self.views: Tensors = []
        self.gradients: Tensors = []
        self.weights: Tensors = []

    def add(self, view: Tensor, gradient: Tensor, weight: Tensor) -> None:
        self.views.append(view)
        self.gradients.append(gradient)
        self.weights.append(weight)


def _cut(flat: Tensor, like: Sequence[Tensor]) -> Tensors:
    """Views in `flat`, one after the other, of the shapes of these tensors."""
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _write_decayed(rows: _Rows, decay: float) -> None:
    views, gradients, weights = rows.views, rows.gradients, rows.weights
    if decay == 0:
        torch._foreach_copy_(views, gradients)
    elif views[0].dtype == torch.float32 and all(g.device == views[0].device for g in gradients):
        torch._foreach_copy_(views, gradients)
        torch._foreach_add_(views, weights, alpha=decay)
    elif views[0].is_cuda:  # rounded once, at the cost of a second gradient while no activations are held
        torch._foreach_copy_(views, list(torch._foreach_add(gradients, weights, alpha=decay)))  # noqa: SLF001
    else:
        for view, gradient, weight in zip(views, gradients, weights, strict=True):
            # As above, a tensor at a time: fresh host memory is dear, launches cost nothing.
            view.copy_(torch.add(gradient, weight, alpha=decay))
