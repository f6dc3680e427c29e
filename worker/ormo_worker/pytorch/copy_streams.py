"""Copies between a CUDA device and page-locked memory that go on while the device computes."""

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


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
        outward: for copies from the device.
        inward: for copies to it.
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
    """

    def __init__(self, event: Event | None = None) -> None:
        self._event = event
        self._done_at = time.monotonic()

    def done(self) -> bool:
        """Whether they are done, without waiting; for the thread that would wait for them."""
        if self._event is not None and self._event.query():
            self._event, self._done_at = None, time.monotonic()
        return self._event is None

    def wait(self) -> float:
        """Wait until they are done, in any thread; returns when the first to wait saw that, by `time.monotonic`."""
        if self._event is not None:
            self._event.synchronize()
            self._event, self._done_at = None, time.monotonic()
        return self._done_at


class Arriving:
    """A tensor that may still be on its way from the device.

    Args:
        tensor: on the CPU, complete once the copies are done.
        copies: of it; None if none are under way.
    """

    def __init__(self, tensor: Tensor, copies: Copies | None = None) -> None:
        self._tensor = tensor
        self._copies = copies

    def here(self) -> bool:
        """Whether it is there, so that nobody has to wait; for the thread that would."""
        return self._copies is None or self._copies.done()

    def number(self) -> float:
        """Its only element, once it is there; in any thread."""
        return float(self.arrived())

    def arrived(self) -> Tensor:
        """The tensor, once it is there; in any thread."""
        if self._copies is not None:
            self._copies.wait()
        return self._tensor


def queue_copies(streams: Streams, stream: Stream, after: Event, pairs: Iterable[tuple[Tensor, Tensor]]) -> Event:
    """Copy on this stream, once the event has come.

    Args:
        streams: of the device.
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
