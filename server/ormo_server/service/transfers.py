"""Tensors between the wire and the core: bytes under way, buffers that are used again, gradients as they come.

Buffers are used again because memory that is already mapped costs a fifth of fresh memory to fill.
"""

import contextlib
import math
import mmap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch

from ormo_protos.tensors import Payload, PayloadLayout
from ormo_server.core.errors import NonFinite, TooMuchInFlight
from ormo_server.core.ids import TicketKey
from ormo_server.core.inputs import Requester
from ormo_server.core.vectors import SquaredNorm

RETRY_SECONDS = 1.0


class BytesInFlight:
    """Keeps one caller from taking all of the server's memory.

    Args:
        limit: bytes that each may have under way at a time; None for no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._bytes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def begin(self, caller: str, size: int) -> None:
        """So many bytes are about to come from, or go to, a caller.

        Raises:
            TooMuchInFlight: with those that are under way they are too many.
        """
        if self._limit is None:
            return
        with self._lock:
            under_way = self._bytes[caller]
            if under_way + size > self._limit:
                raise TooMuchInFlight(
                    f"{caller!r} has {under_way:,} bytes under way and wants {size:,} more, and max_bytes_in_flight is "
                    f"{self._limit:,}: end an exchange first, or raise it",
                    retry_seconds=RETRY_SECONDS,
                )
            self._bytes[caller] += size

    def end(self, caller: str, size: int) -> None:
        """They have arrived, or never will."""
        if self._limit is None:
            return
        with self._lock:
            self._bytes[caller] -= size
            if not self._bytes[caller]:
                del self._bytes[caller]

    @contextlib.contextmanager
    def during(self, caller: str, size: int) -> Iterator[None]:
        """As `begin`, and `end` afterwards."""
        self.begin(caller, size)
        try:
            yield
        finally:
            self.end(caller, size)


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


@dataclass(frozen=True, slots=True)
class ReceivedGradient:
    """A gradient that has arrived whole.

    Attributes:
        ticket: that it redeems.
        payload: its tensors.
        samples: in the mini-batch.
        loss: of the mini-batch, NaN if it is not finite; None if not told.
        compute_seconds: as the worker measured; 0 if not told.
        norm: Euclidean, of the gradient; None if it has NaN or infinity. Buffers are the core's to judge.
    """

    ticket: TicketKey
    payload: Payload
    samples: int
    loss: float | None
    compute_seconds: float
    norm: float | None


class FiniteNorm:
    """The gradient's Euclidean norm, in one walk with the search for NaN and infinity, as its bytes arrive.

    Attributes:
        seconds: that it took so far.
    """

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._square = SquaredNorm(payload.parameters)
        self.seconds = 0.0

    def arrived(self, size: int) -> None:
        """The payload's first so many bytes are there."""
        started = time.perf_counter()
        self._square.count(size // self._payload.parameters.element_size())
        self.seconds += time.perf_counter() - started

    def norm(self) -> float | None:
        """None if there is NaN or infinity."""
        started = time.perf_counter()
        square = self._square.total()
        self.seconds += time.perf_counter() - started
        return None if square is None else math.sqrt(square)


def non_finite(requester: Requester) -> NonFinite:
    """The refusal of a gradient that is not finite."""
    return NonFinite(
        f"the gradient of worker {requester.worker!r}, request {requester.request}, has NaN or infinite values and was "
        "not applied; its ticket stays valid, unless the exchange asked for the next one. Lower the learning rate, or "
        "clip or rescale the gradient",
        worker=requester.worker,
    )
