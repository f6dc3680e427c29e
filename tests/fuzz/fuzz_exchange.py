"""Any stream of requests ends as the contract says, and the parameters move by whole gradients and nothing else.

The fuzzed bytes are a script: each step makes one request, sound or not, or ends the call.
"""

import atexit
import contextlib
import functools
import itertools
import logging
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from google.rpc import code_pb2, error_details_pb2, status_pb2

from fuzz.fuzz_framing import meaning
from fuzz.script import Script
from ormo_protos.framing import Framing
from ormo_protos.manifest import BFLOAT16, FLOAT32, INT8
from ormo_protos.refusals import Reason
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.metrics import Metrics
from ormo_server.security import OpenAccess
from ormo_server.service.admin import Controls
from ormo_server.service.run import RunHost
from ormo_server.service.servicer import Servicer
from ormo_server.service.streams import StreamRegistry
from service.wire import SMALL, payload, settings

READ, WRITE = Framing(pb.PushPullRequest).decode, Framing(pb.PushPullResponse).encode
PARAMETERS = SMALL.sizes["parameters"]
MOST_STEPS = 16


def mean(held: torch.Tensor, sent: torch.Tensor, weight: float) -> torch.Tensor:
    """The mean of numbers that are finite is finite, also where their difference is not."""
    merged = held.lerp(sent, weight)
    return merged if merged.isfinite().all() else held.double().lerp(sent.double(), weight).float()


def numbers_of(gradient: Payload) -> torch.Tensor:
    """What a gradient that was counted says, int8 by the words of the contract: two blocks, of 6 numbers and of 3."""
    if gradient.layout.dtype != INT8:
        return gradient.parameters.float()
    codes = np.frombuffer(gradient.memory[:PARAMETERS], np.int8)
    scales = np.frombuffer(gradient.memory[16:24], np.float32)
    assert codes.min() > -128, "a code was counted that is none"
    assert np.isfinite(scales).all(), "a scale was counted that is no number"
    assert scales.min() >= 0, "a scale was counted that is below zero"
    return torch.from_numpy(codes.astype(np.float32) * scales.repeat([6, 3]))


class Ended(Exception):
    """The server ended the call."""


class Gone(grpc.RpcError):
    """The client ended the call."""


class Context:
    """As much of a call as the service looks at."""

    def __init__(self) -> None:
        self.active = True
        self.ended: Any = None

    def add_callback(self, callback: Any) -> None:
        pass

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def is_active(self) -> bool:
        return self.active

    def cancel(self) -> None:
        self.active = False

    def abort_with_status(self, status: Any) -> None:
        self.ended = status
        raise Ended


class World:
    """A server's inside, with a model whose parameters are 0 at the start of each script, and one worker."""

    def __init__(self, folder: Path) -> None:
        run = settings(folder, method="asgd", momentum=0.0, local_steps=MOST_STEPS, bucket="sum")
        self.host = RunHost(run, Metrics(run.worker_series))
        self.streams = StreamRegistry(4, 4)
        self.host.offers.ask("w", 1, self.host.clock())
        self.host.accept_model("w", 1, SMALL, payload(SMALL, 0.0, buffers=True))
        self.servicer = Servicer(self.host, self.streams, OpenAccess(), Controls(self.host, threading.Event()))
        self.pool = self.servicer._transfers._buffers
        self.incarnation = self.request = 0

    def close(self) -> None:
        self.host.close()

    def state(self) -> tuple[int, list[torch.Tensor]]:
        """The iteration, and copies of parameters and buffers."""
        with self.host.engine.inspect() as machine:
            state = machine.state
            return state.iteration, [one.clone() for one in (state.params, state.float_buffers, state.int_buffers)]

    def expected(self, counted: list[Payload]) -> list[torch.Tensor]:
        """Parameters and buffers, from 0 on, after these gradients."""
        params, floats, ints = torch.zeros(PARAMETERS), torch.zeros(3), torch.zeros(1, dtype=torch.int64)
        with self.host.engine.inspect() as machine:
            weight = 1.0 / machine.bucket_size
        for gradient in counted:
            params -= numbers_of(gradient)
            if gradient.layout.with_buffers:
                floats = mean(floats, gradient.float_buffers, weight)
                ints = torch.maximum(ints, gradient.int_buffers)
        return [params, floats, ints]

    def start(self) -> None:
        """All numbers are 0 again, and the worker has just joined."""
        self.incarnation, self.request = self.incarnation + 1, 0
        self.host.engine.join("w", self.incarnation, 2)
        with self.host.engine.inspect() as machine:
            machine.state.params.zero_()
            machine.state.float_buffers.zero_()
            machine.state.int_buffers.zero_()


class Call:
    """One PushPull, from both sides."""

    def __init__(self, world: World, script: Script) -> None:
        self.world, self.script, self.context = world, script, Context()
        self.ticket = pb.Ticket()
        self.header = pb.Exchange()  # of the exchange under way
        self.received = b""  # what came of its gradient
        self.counted: list[Payload] = []
        self.leaves = False

    def requests(self) -> Iterator[Any]:
        last = b""
        while not self.script.over:
            step = self.script.number()
            if step == 255:
                self.context.active = False
                raise Gone
            self.leaves |= step == 254
            last = self.request(step % 9, last)
            self.note(last)
            yield READ(last)

    def request(self, step: int, last: bytes) -> bytes:
        size = self.script.number() if step not in (1, 2) else 0
        match step:
            case 0:
                return self.script.take(size)
            case 1:
                return self.exchange(with_gradient=False).SerializeToString()
            case 2:
                return self.exchange().SerializeToString()
            case 3:
                return pb.PushPullRequest(
                    exchange=self.exchange().exchange, data=self.script.take(size)
                ).SerializeToString()
            case 4:
                return self.chunk(len(self.received), size)
            case 5:
                return self.chunk(self.script.number(1, signed=True), size)
            case 6:
                message = self.exchange()
                message.data = self.script.take(message.exchange.gradient.payload_bytes)
                return message.SerializeToString()
            case 7:
                at = size % max(1, len(last))
                return last[:at] + self.script.take(1) + last[at + 1 :]
        return self.changed(size)

    def chunk(self, offset: int, size: int) -> bytes:
        made = pb.TensorChunk(offset=offset, data=self.script.take(size))
        return pb.PushPullRequest(chunk=made).SerializeToString()

    def exchange(self, *, with_gradient: bool = True) -> pb.PushPullRequest:
        world, message = self.world, pb.PushPullRequest()
        world.request += 1
        made, choice = message.exchange, self.script.number()
        made.requester.MergeFrom(pb.Requester(worker="w", incarnation=world.incarnation, request=world.request))
        if choice & 1:
            made.next.MergeFrom(pb.DeliveryRequest(dtype=BFLOAT16 if choice & 2 else FLOAT32))
            made.next.with_buffers, made.next.takes_data = bool(choice & 4), bool(choice & 8)
        if with_gradient:
            dtype = INT8 if choice & 64 else BFLOAT16 if choice & 32 else FLOAT32
            layout = PayloadLayout.of_gradient(SMALL, dtype, with_buffers=bool(choice & 16))
            made.gradient.local_steps = self.script.number(1, signed=True) if choice & 128 else MOST_STEPS
            made.gradient.MergeFrom(pb.Gradient(ticket=self.ticket, manifest_digest=SMALL.digest, dtype=layout.dtype))
            made.gradient.with_buffers, made.gradient.payload_bytes = layout.with_buffers, layout.total_bytes
        return message

    def changed(self, which: int) -> bytes:
        """A header with one thing wrong with it."""
        message = self.exchange()
        made, value = message.exchange, self.script.number(8, signed=True)
        small = max(-(2**31), min(2**31 - 1, value))
        numbers = (
            (made.gradient, "payload_bytes", value),
            (made.gradient, "samples", value),
            (made.gradient, "dtype", small),
            (made.gradient, "compute_seconds", float(value)),
            (made.gradient, "manifest_digest", self.script.take(which % 40)),
            (made.gradient.ticket, "number", value),
            (made.requester, "request", value if which & 64 else self.world.request - 1 - (value & 1)),
            (made.requester, "slot", small if which & 64 else 1),
            (made.requester, "incarnation", self.world.incarnation - 1 + (value & 2)),
            (made.requester, "worker", "v"),
            (made.next, "dtype", small),
            (made.gradient, "local_steps", small),
        )
        holder, name, given = numbers[which % len(numbers)]
        setattr(holder, name, given)
        self.world.request = max(self.world.request, min(made.requester.request, 2**62))
        return message.SerializeToString()

    def note(self, encoded: bytes) -> None:
        """What the server is told by it, as generated code reads it."""
        kind, *rest = meaning(pb.PushPullRequest, encoded)
        if kind == "chunk":
            self.received += rest[1] if rest[0] == len(self.received) else b""
        elif kind == "headed":
            self.header, self.received = pb.PushPullRequest.FromString(rest[0]).exchange, rest[1]

    def follow(self) -> None:
        """Hold the call, and check each answer."""
        answers = self.world.servicer.PushPull(self.requests(), self.context)
        to_come = 0  # bytes of a delivery
        for answer in answers:
            kind, *rest = meaning(pb.PushPullResponse, WRITE(answer))
            if kind == "chunk":
                to_come -= len(rest[1])
            else:
                assert (kind, to_come) == ("headed", 0), "a delivery was not sent whole"
                to_come = self.answered(pb.PushPullResponse.FromString(rest[0]), rest[1])
            assert to_come >= 0
            if self.leaves:
                answers.close()
                return
        assert to_come == 0

    def answered(self, message: pb.PushPullResponse, data: bytes) -> int:
        """Take in the head of an answer; returns how many bytes are to follow it."""
        together = message.WhichOneof("part") == "delivery"
        result = message.delivery.result if together else message.result
        if result.request and not result.refusal and not result.repeated:
            self.counted.append(self.gradient())
        if not together:
            assert not data
            return 0
        assert self.header.next.takes_data or not (data or message.delivery.HasField("result"))
        self.ticket = message.delivery.ticket
        return message.delivery.payload_bytes - len(data)

    def gradient(self) -> Payload:
        """The gradient that a result is of: all of it must have come."""
        announced = self.header.gradient
        assert len(self.received) == announced.payload_bytes, "a gradient was counted that did not come whole"
        assert 1 <= announced.local_steps <= MOST_STEPS
        layout = PayloadLayout.of_gradient(SMALL, announced.dtype, with_buffers=announced.with_buffers)
        return Payload(layout, torch.frombuffer(bytearray(self.received), dtype=torch.uint8))

    def ending(self) -> str:
        """The reason that the server gave for it, or OK."""
        if self.context.ended is None:
            return "OK" if self.context.active else "GONE"
        ((_, packed),) = self.context.ended.trailing_metadata
        status, info = status_pb2.Status.FromString(packed), error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert status.code == code_pb2.Code.Value(Reason(info.reason).status)
        assert info.reason != Reason.INTERNAL, status.message
        return info.reason


def check(fuzzed: bytes, world: World | None = None) -> tuple[str, int]:
    """Play a script; returns how the call ended, and how many gradients were counted in it."""
    world = world or one_world()
    world.start()
    before, _ = world.state()
    call = Call(world, Script(fuzzed))
    with contextlib.suppress(Ended, Gone):
        call.follow()
    iteration, tensors = world.state()
    assert iteration == before + len(call.counted)
    for found, expected in zip(tensors, world.expected(call.counted), strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), (found, expected)
    assert not world.pool._lent, "a buffer was not given back"
    assert len(world.streams) == 0
    return call.ending(), len(call.counted)


def step(number: int, size: int | None = None, data: bytes = b"", choice: int | None = None) -> bytes:
    """One step of a script."""
    return bytes(value for value in (number, size, choice) if value is not None) + data


def seeds() -> Iterator[bytes]:
    """Scripts that reach far."""
    gradient = struct.pack("<10f", *range(1, 10), 0.0)
    ask, push, end = step(1, choice=1), step(2, choice=1), step(2, choice=0)
    by_data = step(6, 0, gradient[:0], 9)
    yield ask
    yield ask + push + step(4, 16, gradient[:16]) + step(4, 24, gradient[16:]) + end + step(4, 40, gradient)
    yield ask + (by_data + gradient) * 3
    yield ask + step(3, 20, b"", 1) + gradient[:20] + step(4, 20, gradient[20:])
    yield ask + push + step(4, 40, b"\xff" * 40) + step(6, 0, b"", 1) + gradient
    yield ask + step(6, 0, b"", 1 | 4 | 16) + gradient + bytes(24) + step(6, 0, b"", 1 | 2 | 8 | 32) + bytes(24)
    for code, scale in ((3, 0.5), (-128, 0.5), (127, 1e38), (3, -0.5), (3, float("nan")), (0, float("inf"))):
        coded = struct.pack("<9b7x2f", *[7] * 8, code, 1.5, scale)
        yield ask + step(6, 0, coded, 1 | 64) + step(6, 0, b"", 1 | 16 | 64) + coded + bytes(24) + by_data + gradient
    for steps in (0, 1, 17, 255):
        yield ask + step(6, 0, bytes([steps]) + gradient, 1 | 128) + by_data + gradient
    yield ask + push + step(5, 8, b"\x08" + bytes(8))
    yield ask + push + step(4, 16, gradient[:16]) + b"\xff"
    yield ask + step(254, choice=1) + step(4, 40, gradient)  # as 2, and then it leaves
    yield ask + step(0, 3, b"\x0a\x05a")
    for which, value in itertools.product([*range(11), *range(64, 75)], [5, 7]):
        yield ask * 2 + step(8, which, b"\x01" + value.to_bytes(8, "little")) + step(4, 40, gradient)


@functools.cache
def one_world() -> World:
    logging.disable(logging.WARNING)
    folder = tempfile.TemporaryDirectory()
    world = World(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(world.close)
    return world
