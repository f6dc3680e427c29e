"""Where tensors lie, and how they get elsewhere: devices, copies beside the computation, memory that tensors share."""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ormo_worker.errors import OptionRefused


def resolve_device(name: str) -> torch.device:
    """The device that is meant by `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        OptionRefused: there is no such device, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = _parse_device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        number = device.index or 0
        if number >= found:
            raise OptionRefused(
                f"--device is {name}, but PyTorch finds {found} CUDA devices here: use one of "
                f"{', '.join(['cpu', *(f'cuda:{index}' for index in range(found))])}"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)  # for what a task makes without naming a device
    return device


def _parse_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise OptionRefused(f"--device is {name!r}: expected auto, cpu, cuda, or cuda:N with N the number of a GPU")
    return device


class Event(Protocol):
    """A point in what is queued on a stream."""

    def synchronize(self) -> None:
        """Wait, in the calling thread, until the device has come there."""

    def query(self) -> bool:
        """Whether it has."""


class Stream(Protocol):
    """Work for a device, done in the order in which it was queued."""

    def wait_event(self, event: Any) -> None:
        """Let what is queued from now on wait for the event; the caller goes on."""


class Streams:
    """What a device computes is queued on the caller's current stream; copies have one for each direction.

    With one for both, parameters that have arrived would wait behind a gradient that is still being computed.

    Attributes:
        outward: where copies from the device are queued.
        inward: where copies to the device are queued.
    """

    def __init__(self, device: torch.device) -> None:
        self.outward: Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.inward: Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._device = device

    def computing(self) -> Stream:
        """The stream on which the caller's tensors are computed."""
        return torch.cuda.current_stream(self._device)

    def mark(self, stream: Any) -> Event:
        """An event after what is queued there by now."""
        # A thread that waits for it sleeps: others have the processor while a gradient is being computed.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def on(self, stream: Any) -> AbstractContextManager[object]:
        """Within the block, work is queued on this stream."""
        return torch.cuda.stream(stream)

    def keep(self, tensor: Tensor) -> None:
        """Let the tensor's memory be given to no other tensor before the copies queued at its end are done."""
        for stream in (self.outward, self.inward):
            tensor.record_stream(stream)  # type: ignore[arg-type]


class Copies:
    """Copies that are under way; those without an event are done when this is made.

    Waiting for an event leaves what is queued behind it running, which synchronizing the device would not.

    Not locked, though two slots' threads may wait for the same copies, the one for its gradient and the other to know
    when the gradient before its own was done: each waits for the event itself, and both note nearly the same time.
    """

    def __init__(self, event: Event | None = None) -> None:
        self._event = event
        self._done_at = time.monotonic()

    def done(self) -> bool:
        """Whether they are done, without waiting; for the thread that would wait for them."""
        if self._event is not None and self._event.query():
            self._done_at = time.monotonic()
            self._event = None
        return self._event is None

    def wait(self) -> float:
        """Wait until they are done, in any thread; returns when the first to wait saw that, by `time.monotonic`."""
        event = self._event  # read once: another thread may see it done meanwhile
        if event is not None:
            event.synchronize()
            self._done_at = time.monotonic()
            self._event = None  # after the time, which whoever finds no event returns
        return self._done_at


class Arriving:
    """A tensor that may still be on its way from the device.

    Args:
        tensor: where it arrives, on the CPU; complete once the copies are done.
        copies: those that fill it; None if it is complete already.
    """

    def __init__(self, tensor: Tensor, copies: Copies | None = None) -> None:
        self._tensor = tensor
        self._copies = copies

    def is_here(self) -> bool:
        """Whether it is there, so that nobody has to wait; for the thread that would."""
        return self._copies is None or self._copies.done()

    def number(self) -> float:
        """Its only element, once it is there; in any thread."""
        return float(self.wait())

    def wait(self) -> Tensor:
        """The tensor, once it is there; in any thread."""
        if self._copies is not None:
            self._copies.wait()
        return self._tensor


def queue_copies(streams: Streams, stream: Stream, after: Event, pairs: Iterable[tuple[Tensor, Tensor]]) -> Event:
    """Copy on this stream, once the event has come.

    Args:
        streams: the device's.
        stream: one of its two for copies.
        after: when the sources are written, and the targets no longer read.
        pairs: target and source each, one of them on the device, the other in page-locked memory.

    Returns:
        The event after them.
    """
    stream.wait_event(after)
    with streams.on(stream):
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
    return streams.mark(stream)


def find_shared(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """Pairs of tensors that have a byte in common, and (paired with itself) a tensor that has one byte twice.

    Args:
        tensors: by name; those that are not strided, as sparse ones, are not looked at.

    Yields:
        The later of the two, as they were given, and the earlier.
    """
    strided = [(name, each) for name, each in tensors if each.numel() and each.layout == torch.strided]
    spans = [_Span(number, name, each) for number, (name, each) in enumerate(strided)]
    reaching: list[_Span] = []  # beyond the start of the next one
    for span in sorted(spans, key=lambda span: (span.device, span.start)):
        if _has_a_byte_twice(span.tensor):
            yield span.name, span.name
        reaching = [other for other in reaching if other.device == span.device and span.start < other.end]
        for other in reaching:
            if _overlap(other.tensor, span.tensor):
                earlier, later = sorted((span, other), key=lambda each: each.number)
                yield later.name, earlier.name
        reaching.append(span)


class _Span:
    """The memory from a tensor's first byte to its last, all of its own or not."""

    def __init__(self, number: int, name: str, tensor: Tensor) -> None:
        self.number = number
        self.name = name
        self.tensor = tensor
        self.device = str(tensor.device)
        self.start = tensor.data_ptr()
        self.end = self.start + length_of(tensor)


def length_of(tensor: Tensor) -> int:
    """Bytes from its first element to the end of its last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def _has_a_byte_twice(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return False
    return int(_mark(tensor, length_of(tensor), 0).count_nonzero()) < tensor.numel() * tensor.element_size()


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether they share a byte; columns of one matrix, say, do not, though each lies between the other's."""
    apart = second.data_ptr() - first.data_ptr()
    length = max(length_of(first), apart + length_of(second))
    return bool((_mark(first, length, 0) & _mark(second, length, apart)).any())


def _mark(tensor: Tensor, length: int, start: int) -> Tensor:
    """Bytes of memory, true where the tensor has an element of its own; shape (length,)."""
    marks = torch.zeros(length, dtype=torch.bool, device="cpu")
    size = tensor.element_size()
    strides = (*(stride * size for stride in tensor.stride()), 1)
    marks.as_strided((*tensor.shape, size), strides, start).fill_(1)
    return marks
