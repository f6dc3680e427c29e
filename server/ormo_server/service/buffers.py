"""Payload buffers that are used again: memory that is already mapped costs a fifth of fresh memory to fill."""

import mmap
import threading
from typing import Self

import torch

from ormo_protos.tensors import Payload, PayloadLayout
from ormo_server.core.errors import TooMuchInFlight
from ormo_server.service.in_flight import RETRY_SECONDS, BytesInFlight


def _page_aligned(size: int) -> torch.Tensor:
    """Memory that begins with a page, so that the journal can write it past the page cache."""
    memory = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % mmap.PAGESIZE
    return memory[start : start + size]


class _Buffer:
    """Memory that can be any payload that fits."""

    def __init__(self, size: int) -> None:
        self.memory = _page_aligned(size)
        self._payloads: dict[PayloadLayout, Payload] = {}
        self._layout: PayloadLayout | None = None

    def payload(self, layout: PayloadLayout) -> Payload:
        if layout not in self._payloads:
            self._payloads[layout] = Payload(layout, self.memory)
        if layout != self._layout:
            self._layout = layout
            self._payloads[layout].zero_padding()  # where the payload before had numbers
        return self._payloads[layout]


def _made(size: int) -> _Buffer:
    try:
        return _Buffer(size)
    except (RuntimeError, MemoryError) as error:  # the first is PyTorch's
        raise TooMuchInFlight(
            f"{size:,} bytes are wanted for tensors, and this machine has no memory for them while so much is under "
            "way: try again, and have less under way (--max-bytes-in-flight, --max-readers) or more memory",
            retry_seconds=RETRY_SECONDS,
        ) from error


class BufferPool:
    """Lends payloads. It never holds more buffers than were out at one time, each as large as what was asked for.

    Args:
        in_flight: counts what is lent, by caller.
    """

    def __init__(self, in_flight: BytesInFlight) -> None:
        self.in_flight = in_flight
        self._lock = threading.Lock()
        self._idle: list[_Buffer] = []
        self._lent: dict[int, _Buffer] = {}

    @property
    def idle_bytes(self) -> int:
        """Memory that is kept and not lent."""
        return sum(buffer.memory.numel() for buffer in self._idle)

    def loans(self, caller: str) -> "Loans":
        """What is taken through it, for this caller, is given back when it is left."""
        return Loans(self, caller)

    def take(self, layout: PayloadLayout) -> Payload:
        """A payload of this layout, with whatever its memory held before.

        Raises:
            TooMuchInFlight: this machine has no more memory.
        """
        with self._lock:
            fitting = (at for at, buffer in enumerate(self._idle) if buffer.memory.numel() >= layout.total_bytes)
            at = next(fitting, None)
            buffer = self._idle.pop(at if at is not None else -1) if self._idle else None
        if buffer is None or buffer.memory.numel() < layout.total_bytes:
            buffer = None  # one that is too small makes room
            buffer = _made(layout.total_bytes)
        payload = buffer.payload(layout)
        with self._lock:
            self._lent[id(payload)] = buffer
        return payload

    def again(self, payload: Payload, layout: PayloadLayout) -> Payload | None:
        """The memory of a payload that is lent, as another of the same dtype.

        It may be filled once the payload has been used: each number then lies where one was that is done with.

        Returns:
            None if it does not fit. It is given back with the payload.
        """
        buffer = self._lent[id(payload)]
        fits = layout.dtype == payload.layout.dtype and layout.total_bytes <= buffer.memory.numel()
        return buffer.payload(layout) if fits else None

    def give(self, payload: Payload) -> None:
        """The payload is not used any more."""
        with self._lock:
            self._idle.append(self._lent.pop(id(payload)))


class Loans:
    """Payloads that are lent for the time of an exchange."""

    __slots__ = ("_caller", "_pool", "_taken")

    def __init__(self, pool: BufferPool, caller: str) -> None:
        self._pool = pool
        self._caller = caller
        self._taken: list[Payload] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for payload in self._taken:
            self._pool.give(payload)
            self._pool.in_flight.end(self._caller, payload.layout.total_bytes)

    def take(self, layout: PayloadLayout) -> Payload:
        """A payload of this layout.

        Raises:
            TooMuchInFlight: the caller has as much as it may, or the machine has no more memory.
        """
        self._pool.in_flight.begin(self._caller, layout.total_bytes)
        try:
            payload = self._pool.take(layout)
        except TooMuchInFlight:
            self._pool.in_flight.end(self._caller, layout.total_bytes)
            raise
        self._taken.append(payload)
        return payload

    def place(self, layout: PayloadLayout, used: Payload | None) -> Payload:
        """Where parameters can go: the memory of a gradient that will be used before, if they fit there."""
        again = self._pool.again(used, layout) if used is not None else None
        return again if again is not None else self.take(layout)
