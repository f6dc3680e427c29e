"""Tensors on the way between a model and the payload in which they travel."""

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from ormo_protos.int8 import encode, rounding
from ormo_protos.manifest import FLOAT32
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker.pytorch.devices import Arriving, Copies, Event, Streams, queue_copies
from ormo_worker.pytorch.module import ModelTensors
from ormo_worker.pytorch.ranks import Ranks

Tensors = list[Tensor]
# Payload's views, gradients and weights that belong together, as `torch._foreach` functions want them.
_Rows = tuple[Tensors, Tensors, Tensors]


class Staging:
    """Makes payloads for a model, and the ways between the two.

    Where all parameters are on one CUDA device, tensors are packed and unpacked there and cross to
    page-locked host memory in one piece, on streams of their own beside what the device computes.
    Otherwise they are copied straight to and from their places, as frozen ones always are: those come once.

    Args:
        model: the module whose tensors they are.
        frozen: parameters that this run does not train; by default those that require no gradient.
        ranks: those that are one worker; None for a worker that is one process.

    Attributes:
        tensors: the model's distinct tensors, in the order in which they travel.
        device: the CUDA device that holds all parameters, if there is one.
        streams: its streams, made when first needed.
        loading: held while the model's parameters are written.
    """

    def __init__(self, model: nn.Module, frozen: Collection[Tensor] | None = None, ranks: Ranks | None = None) -> None:
        self.tensors = ModelTensors(model, frozen)
        self._ranks = ranks
        devices = {parameter.device for parameter in self.tensors.parameters}
        self.device = devices.pop() if len(devices) == 1 and all(d.type == "cuda" for d in devices) else None
        self.streams: Streams | None = None
        self._mirrors: dict[tuple[int, int], _Mirror] = {}
        # Held by who writes the model's tensors (`load`, local steps: the training thread) and by who reads all of them
        # as one (`snapshot`, in whichever thread joins): a model of which half is newer must not become the run's.
        self.loading = threading.Lock()

    @property
    def pinned(self) -> bool:
        """Whether payloads lie in page-locked memory, as copies beside the computation need it."""
        return self.device is not None and self.device.type == "cuda"

    @property
    def spreads(self) -> bool:
        """Whether rank 0's parameters go to the other ranks from device to device, while they are loaded."""
        return self._ranks is not None and self.device is not None and self._ranks.reaches(self.device)

    def payload(self, dtype: pb.Dtype.ValueType, *, with_buffers: bool) -> Payload:
        """Memory for one payload of this model, without its frozen tensors."""
        layout = PayloadLayout.of_gradient(self.tensors.manifest, dtype, with_buffers=with_buffers)
        return Payload(layout, pin_memory=self.pinned)

    def outgoing(self, dtype: pb.Dtype.ValueType) -> "Transfer":
        """The way of one slot's gradients, with buffers if the model has any; a dead end in ranks that send nothing."""
        layout = PayloadLayout.of_gradient(self.tensors.manifest, dtype, with_buffers=self.tensors.has_buffers)
        if self._ranks is not None and not self._ranks.leads:
            return Unsent(
                self.tensors, Payload(layout), None, self.loading
            )  # memory that is never touched is not there
        return self.transfer(Payload(layout, pin_memory=self.pinned))

    def transfer(self, payload: Payload, *, mirror: int = 0) -> "Transfer":
        """The way between the model and this payload; all ways of a model are for one thread.

        Args:
            payload: the memory to fill or to read, with a layout of the model's.
            mirror: number of the memory on the device in which tensors are packed. Payloads of one dtype
                share it with those of the same number, at the price that each waits until the one before
                has left it: what comes in while a gradient is still being computed needs another.
        """
        if self.device is None:
            return Transfer(self.tensors, payload, None, self.loading)
        if self.streams is None:
            self.streams = Streams(self.device)
        key = (payload.layout.dtype, mirror)
        if key not in self._mirrors:
            self._mirrors[key] = self._mirror(payload, self.device, self.streams)
        ranks = self._ranks if self.spreads else None
        device = _ThroughDevice(payload, self._mirrors[key], self.streams, ranks)
        return Transfer(self.tensors, payload, device, self.loading)

    def snapshot(self) -> Payload:
        """All of the model as it is now, in float32: what a server without a model is offered.

        From any thread: parameters that are being loaded are waited for.
        """
        layout = PayloadLayout.of(self.tensors.manifest, FLOAT32, with_buffers=True, with_frozen=True)
        payload = Payload(layout)  # wanted once or twice in a run: not worth page-locked memory, nor a mirror
        with self.loading:
            if self.device is not None and self.pinned:
                torch.cuda.synchronize(self.device)  # another thread's current stream need not be this one's
            Transfer(self.tensors, payload, None, self.loading).gather_parameters()
        return payload

    def fetch(self, value: Tensor) -> Arriving:
        """Get a tensor from the device without waiting for what is queued after it."""
        if self.streams is None or value.device != self.device:
            return Arriving(value.detach().to("cpu", copy=True))
        source = torch.empty_like(value.detach()).copy_(value.detach())  # the caller may overwrite its own
        here = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=self.pinned)
        self.streams.keep(source)
        computed = self.streams.mark(self.streams.computing())
        return Arriving(here, Copies(queue_copies(self.streams, self.streams.outward, computed, [(here, source)])))

    def fetch_number(self, value: Tensor) -> Arriving | float:
        """As `fetch`, for a tensor with one element; at once where nothing is queued that would have to be waited for.

        Where it is not, and there are other ranks, it is the mean of theirs. The caller may overwrite its own from now
        on.
        """
        if self.streams is None or value.device != self.device:
            return float(value.detach().item())
        return self.fetch(self._ranks.mean(value) if self._ranks is not None and self.spreads else value)

    def _mirror(self, payload: Payload, device: torch.device, streams: Streams) -> "_Mirror":
        sizes = self.tensors.manifest.sizes
        sections = (
            torch.empty_like(payload.parameters, device=device),
            torch.empty_like(payload.scales, device=device),
            torch.empty(sizes["float_buffers"], dtype=torch.float32, device=device),
            torch.empty(sizes["int_buffers"], dtype=torch.int64, device=device),
        )
        for section in sections:
            streams.keep(section)
        # What had this memory before may still be queued.
        return _Mirror(*sections, free=streams.mark(streams.computing()))


class Transfer:
    """Moves tensors between a model and one payload, in either direction, converting dtypes as it goes.

    Every method but those that begin something returns when the payload may be read, sent or overwritten.

    Attributes:
        payload: where the tensors go or come from.
        values: one for each of the model's distinct parameters: what `load` gave them, until the payload has new bytes.
    """

    def __init__(
        self, tensors: ModelTensors, payload: Payload, device: "_ThroughDevice | None", loading: threading.Lock
    ) -> None:
        self.payload = payload
        self._tensors = tensors
        # None where tensors are copied to and from the payload itself: on the CPU, and for models on several devices.
        self._device = device
        self._loading = loading
        flat = payload if device is None else device.flat
        self.values = _cut(flat.parameters, tensors.parameters)
        self._float_buffers: Tensors = []
        self._int_buffers: Tensors = []
        if payload.layout.with_buffers:
            self._float_buffers = _cut(flat.float_buffers, tensors.float_buffers)
            self._int_buffers = _cut(flat.int_buffers, tensors.int_buffers)
        self._frozen = _cut(payload.frozen, tensors.frozen) if payload.layout.frozen else []

    def gather_gradients(self, decays: Sequence[float | None]) -> None:
        """Write `g + decay * w` for each parameter, and the buffers if the payload has them.

        Args:
            decays: one number for each of the model's distinct parameters; None for one that is not
                trained. Such a one, and one without a gradient, counts as zero, without decay.
        """
        self.begin_gradients(decays).wait()

    @torch.no_grad()
    def begin_gradients(self, decays: Sequence[float | None]) -> Copies:
        """As `gather_gradients`; the payload may be read once these copies are done, the model changed at once."""
        if self._device is not None:
            self._device.claim()
        idle: Tensors = []
        active: dict[float, _Rows] = {}  # by decay
        for decay, view, weight in zip(decays, self.values, self._tensors.parameters, strict=True):
            gradient = weight.grad
            if decay is None or gradient is None:
                idle.append(view)
            else:
                views, gradients, weights = active.setdefault(decay, ([], [], []))
                views.append(view)
                gradients.append(gradient.to_dense() if gradient.is_sparse else gradient)
                weights.append(weight)
        if idle:
            torch._foreach_zero_(idle)
        for decay, rows in active.items():
            _write_decayed(rows, decay)
        return self._gather_rest()

    @torch.no_grad()
    def begin_moves(self, moves: Sequence[Tensor]) -> Copies:
        """Write these in place of gradients, and the buffers if the payload has them; as `begin_gradients`.

        Args:
            moves: one for each of the model's distinct parameters, float32.
        """
        if self._device is not None:
            self._device.claim()
        torch._foreach_copy_(self.values, list(moves))
        return self._gather_rest()

    @torch.no_grad()
    def begin_codes(self, moves: Tensor, ticket: pb.Ticket) -> Copies:
        """As `begin_moves`, into a payload of int8; they are rounded by the numbers of the ticket that they are for.

        Args:
            moves: of all parameters, one after the other, shape (d,), float32.
            ticket: the one that they will be pushed with.
        """
        if self._device is not None:
            self._device.claim()
        flat, blocks = self.payload if self._device is None else self._device.flat, self.payload.layout.blocks
        assert blocks is not None
        here = moves.to(flat.parameters.device)
        rounded_by = rounding(ticket.epoch, ticket.number, here.device)
        encode(here, flat.parameters, flat.scales, blocks, rounded_by)
        return self._gather_rest()

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """Write the parameters, and the buffers and frozen tensors if the payload has them."""
        if self._device is not None:
            self._device.claim()
        torch._foreach_copy_(self.values, self._tensors.parameters)
        if self._frozen:
            torch._foreach_copy_(self._frozen, self._tensors.frozen)
        self._gather_rest().wait()

    @torch.no_grad()
    def load(self, *, mends: bool = False) -> list[str]:
        """Copy the payload into the model in place: parameters, and buffers and frozen tensors if it has them.

        Args:
            mends: only those buffers that the server did not take from this model, for NaN or infinity in them; to
                find them, this waits for the device.

        Returns:
            The names of the buffers that were mended.
        """
        mended: list[str] = []
        with self._loading:  # `snapshot`, in a thread that joins again, must not read half of the old and of the new
            copies = None if self._device is None else self._device.from_payload()
            torch._foreach_copy_(self._tensors.parameters, self.values)
            if self._frozen:
                torch._foreach_copy_(self._tensors.frozen, self._frozen)
            if mends and self.payload.layout.with_buffers:
                mended = self._tensors.mend(self._float_buffers, self._int_buffers)
            elif self.payload.layout.with_buffers:
                self._load_buffers()
            if self._device is not None:
                self._device.release()
        if copies is not None:
            copies.wait()
        return mended

    def _load_buffers(self) -> None:
        if self._float_buffers:
            torch._foreach_copy_(self._tensors.float_buffers, self._float_buffers)
        if self._int_buffers:
            torch._foreach_copy_(self._tensors.int_buffers, self._int_buffers)

    def _gather_rest(self) -> Copies:
        """Write the buffers, if the payload has them, and send all of it on its way."""
        if self._float_buffers:
            torch._foreach_copy_(self._float_buffers, self._tensors.float_buffers)
        if self._int_buffers:
            torch._foreach_copy_(self._int_buffers, self._tensors.int_buffers)
        return Copies() if self._device is None else self._device.to_payload()


class Unsent(Transfer):
    """The way of gradients that another rank sends, which has the same."""

    @override
    def begin_gradients(self, decays: Sequence[float | None]) -> Copies:
        return Copies()

    @override
    def begin_moves(self, moves: Sequence[Tensor]) -> Copies:
        return Copies()

    @override
    def begin_codes(self, moves: Tensor, ticket: pb.Ticket) -> Copies:
        return Copies()


@dataclass(slots=True)
class _Mirror:
    """The sections of a payload, on a device.

    Attributes:
        free: when what used them last is done.
    """

    parameters: Tensor
    scales: Tensor
    float_buffers: Tensor
    int_buffers: Tensor
    free: Event


@dataclass(frozen=True, slots=True)
class _ThroughDevice:
    """Tensors are packed on their device, and the sections cross whole, on a stream beside the computation."""

    payload: Payload
    flat: _Mirror
    streams: Streams
    ranks: Ranks | None  # if parameters go on to others from here

    def claim(self) -> None:
        """What is computed from now on may overwrite the mirror."""
        self.streams.computing().wait_event(self.flat.free)

    def to_payload(self) -> Copies:
        packed = self.streams.mark(self.streams.computing())
        outward = [(here, there) for there, here in self._pairs()]
        self.flat.free = queue_copies(self.streams, self.streams.outward, packed, outward)
        return Copies(self.flat.free)

    def from_payload(self) -> Copies:
        if self.ranks is not None and not self.ranks.leads:
            self.claim()
            copies = Copies()
        else:
            # Not after all that is queued: parameters come in while the gradient before is still being computed.
            arrived = queue_copies(self.streams, self.streams.inward, self.flat.free, self._pairs())
            self.streams.computing().wait_event(arrived)
            copies = Copies(arrived)
        if self.ranks is not None:
            for section, _ in self._pairs():
                self.ranks.broadcast(section)
        return copies

    def release(self) -> None:
        """What is computed by now was the last to read the mirror."""
        self.flat.free = self.streams.mark(self.streams.computing())

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        pairs = [(self.flat.parameters, self.payload.parameters)]
        if self.payload.layout.scales:
            pairs.append((self.flat.scales, self.payload.scales))
        if self.payload.layout.with_buffers:
            pairs.append((self.flat.float_buffers, self.payload.float_buffers))
            pairs.append((self.flat.int_buffers, self.payload.int_buffers))
        return pairs


def _cut(flat: Tensor, like: Sequence[Tensor]) -> Tensors:
    """Views in `flat`, one after the other, of the shapes of these tensors."""
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _write_decayed(rows: _Rows, decay: float) -> None:
    views, gradients, weights = rows
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
