"""Tensors between the wire and the core: bytes under way, memory that is used again, payloads as they come and go.

Memory is used again because what is already mapped costs a fifth of fresh memory to fill.
"""

import contextlib
import math
import mmap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Self, TypeVar

import torch

from ormo_protos.framing import Frame, Headed
from ormo_protos.tensors import Chunk, Payload, PayloadLayout, PayloadReceiver
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.core.errors import TooMuchInFlight
from ormo_server.core.vectors import SquaredNorm
from ormo_server.journal import Storing
from ormo_server.metrics.families import Traffic
from ormo_server.service import messages
from ormo_server.service.admission import ReceivedGradient
from ormo_server.service.delivery import Delivery
from ormo_server.service.engine import Engine
from ormo_server.service.streams import OpenStream

R = TypeVar("R", pb.PushPullResponse, pb.PullParamsResponse)

RETRY_SECONDS = 1.0


class BytesInFlight:
    """Keeps one caller from taking all of the server's memory.

    Args:
        limit: bytes that each may have under way at a time; None for no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._bytes: Counter[str] = Counter()
        self._lock = threading.Lock()  # of the counts: exchanges of one caller begin and end in many threads

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


def _make_buffer(size: int) -> _Buffer:
    try:
        return _Buffer(size)
    except (RuntimeError, MemoryError) as error:  # the first is PyTorch's
        raise TooMuchInFlight(
            f"{size:,} bytes are wanted for tensors, and this machine does not have that much memory while so much is "
            "under way: try again, and have less under way (--max-bytes-in-flight, --max-readers) or more memory",
            retry_seconds=RETRY_SECONDS,
        ) from error


class BufferPool:
    """Lends payloads. It never holds more buffers than were out at one time, each as large as what was asked for.

    Args:
        in_flight: counts what is lent, by caller.
    """

    def __init__(self, in_flight: BytesInFlight) -> None:
        self.in_flight = in_flight
        # Of the two lists only: memory is made outside it, which takes long for a large model.
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
            buffer = self._pop_idle(layout.total_bytes)
        if buffer is None or buffer.memory.numel() < layout.total_bytes:
            buffer = None  # one that is too small makes room
            buffer = _make_buffer(layout.total_bytes)
        payload = buffer.payload(layout)
        with self._lock:
            self._lent[id(payload)] = buffer
        return payload

    def _pop_idle(self, size: int) -> _Buffer | None:
        """One that is large enough; else the one that was used last; None if there is none."""
        for at, buffer in enumerate(self._idle):
            if buffer.memory.numel() >= size:
                return self._idle.pop(at)
        return self._idle.pop() if self._idle else None

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

    __slots__ = ("_caller", "_pool", "_storing", "_taken")

    def __init__(self, pool: BufferPool, caller: str) -> None:
        self._pool = pool
        self._caller = caller
        self._taken: list[Payload] = []
        self._storing: Storing | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # First, and whatever happened: the journal's threads read what is lent.
        if self._storing is not None:
            self._storing.give_up()
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

    def mind(self, storing: Storing | None) -> Storing | None:
        """See to it that what is not stored in the end is given up."""
        self._storing = storing
        return storing

    def place(self, layout: PayloadLayout, used: Payload | None) -> Payload:
        """Where parameters can go: the memory of a gradient that will be used before, if they fit there."""
        again = self._pool.again(used, layout) if used is not None else None
        return again if again is not None else self.take(layout)


class Transfers:
    """Receives gradients and sends deliveries, chunk by chunk, and counts them.

    Args:
        max_bytes_in_flight: of each caller; None for no limit.
        traffic: what to count in.
        takes_int8: whether gradients may come in int8, as those of local steps.

    Attributes:
        takes_int8: as given.
        in_flight: what is under way, by caller.
    """

    def __init__(self, max_bytes_in_flight: int | None, traffic: Traffic, *, takes_int8: bool) -> None:
        self.takes_int8 = takes_int8
        self.in_flight = BytesInFlight(max_bytes_in_flight)
        self._buffers = BufferPool(self.in_flight)
        self._traffic = traffic

    def lend(self, caller: str) -> "Loans":
        """Memory for the payloads of one exchange of this caller."""
        return Loans(self._buffers, caller)

    def receive(
        self, receiver: PayloadReceiver, chunks: Iterator[Chunk], method: str, on_part: Callable[[], object]
    ) -> None:
        """Fill a payload.

        Args:
            receiver: of the payload.
            chunks: what comes.
            method: that it came by.
            on_part: is called after each chunk but the last.

        Raises:
            PayloadError: a chunk is missing, out of place, or one too many.
        """
        counter = self._traffic.received_bytes[method]
        while not receiver.complete:
            chunk = next(chunks, None)
            if chunk is None:
                raise receiver.missing()
            receiver.accept(chunk)
            counter.note(len(chunk.data))
            del chunk  # a megabyte, for as long as the next one is waited for
            if not receiver.complete:
                on_part()
        if method != "PushPull":  # which goes on with the next exchange
            for chunk in chunks:
                receiver.accept(chunk)  # refuses it: all is there

    def receive_gradient(
        self,
        borrowed: Loans,
        engine: Engine,
        header: pb.Gradient,
        chunks: Iterator[Chunk],
        method: str = "PushPull",
    ) -> ReceivedGradient:
        """A gradient, received whole into memory that is given back with `borrowed`.

        Its norm is counted, and the journal given its bytes, as they arrive, while they are in the processor's cache.

        Raises:
            OrmoError: as `messages.gradient_layout`, `Loans.take`, `Engine.begin_storing` and `messages.check_codes`.
            PayloadError: as `receive`.
        """
        started, checking = time.perf_counter(), 0.0
        payload = borrowed.take(messages.gradient_layout(engine.manifest, header, takes_int8=self.takes_int8))
        storing = borrowed.mind(engine.begin_storing(payload))
        receiver, square = PayloadReceiver(payload), SquaredNorm(payload.gradient)

        def use_part() -> None:
            nonlocal checking
            if storing is not None:
                storing.advance(receiver.received_bytes)
            arrived = time.perf_counter()
            square.count(payload.numbers_in(receiver.received_bytes))
            checking += time.perf_counter() - arrived

        self.receive(receiver, chunks, method, use_part)
        arrived = time.perf_counter()
        messages.check_codes(payload)
        total = square.total()
        ended = time.perf_counter()
        checking += ended - arrived
        self._traffic.stage["receive"].note(ended - started - checking)
        self._traffic.stage["check"].note(checking)
        return messages.received_gradient(header, payload, None if total is None else math.sqrt(total), storing)

    def send(
        self, stream: OpenStream, head: R, delivery: Delivery, method: str, *, with_data: bool = False
    ) -> Iterator[Frame[R]]:
        """A delivery as it travels: its head, with the first chunk in it if the peer takes that, and other chunks."""
        started, counter = time.perf_counter(), self._traffic.sent_bytes[method]
        chunks = delivery.chunks()
        first = next(chunks, None) if with_data else None
        frame: Headed[R] | Chunk | None = Headed(head) if first is None else Headed(head, first.data)
        while frame is not None:
            # Counted as it is handed over: a reader that has all it wants may never ask for the end.
            counter.note(len(frame.data))
            yield frame
            frame = next(chunks, None)
            if frame is not None:  # the end of all shows in what the peer sends next
                stream.touch()
        if delivery.payload is not None:
            self._traffic.stage["send"].note(time.perf_counter() - started)
