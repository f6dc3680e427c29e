"""A server in this process and a foreign client that speaks nothing but generated messages."""

import contextlib
import itertools
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ormo_protos.int8 import encode, rounding
from ormo_protos.manifest import BUFFER, FLOAT32, INT8, INT64, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Payload, PayloadLayout, PayloadReceiver
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.core import snapshot
from ormo_server.core.ids import TicketKey
from ormo_server.service.server import Server
from ormo_server.settings import ServerSettings

SMALL = Manifest.laid_out(
    [
        TensorSpec("weight", (2, 3), FLOAT32, PARAMETER),
        TensorSpec("bias", (3,), FLOAT32, PARAMETER),
        TensorSpec("running_mean", (3,), FLOAT32, BUFFER),
        TensorSpec("num_batches_tracked", (), INT64, BUFFER),
    ]
)
# 12 MB: more than gRPC's windows hold, so that streams stop in the middle when nobody reads.
LARGE = Manifest.laid_out([TensorSpec("weight", (3_000_000,), FLOAT32, PARAMETER)])


def settings(directory: Path, **changes: Any) -> ServerSettings:
    return ServerSettings(
        **{
            "listen": "127.0.0.1:0",
            "metrics_listen": "",
            "directory": directory,
            "learning_rate": 1.0,
            "momentum": 0.5,
            "failure_timeout_seconds": 10.0,
            "drain_seconds": 2.0,
            "max_workers": 4,  # each costs threads at the start
        }
        | changes
    )


@contextlib.contextmanager
def served(directory: Path, **changes: Any) -> Iterator[Server]:
    server = Server(settings(directory, **changes))
    server.start()
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def connected(server: Server) -> Iterator[ParameterServerStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield ParameterServerStub(channel)


def payload(
    manifest: Manifest, value: float, *, buffers: bool = False, frozen: bool = False, dtype: int = FLOAT32
) -> Payload:
    layout = PayloadLayout.of(manifest, dtype, with_buffers=buffers, with_frozen=frozen)  # type: ignore[arg-type]
    made = Payload(layout)
    made.parameters.fill_(value)
    made.float_buffers.fill_(value)
    made.int_buffers.fill_(int(value) if abs(value) < 2**62 else 0)
    made.frozen.copy_(torch.arange(made.frozen.numel()))  # whatever the value, so that each element tells its place
    return made


def int8_payload(manifest: Manifest, values: torch.Tensor, *, buffers: bool = False, ticket: int = 1) -> Payload:
    """These values, shape (d,), rounded as for this ticket."""
    made = Payload(PayloadLayout.of_gradient(manifest, INT8, with_buffers=buffers))
    assert made.layout.blocks is not None
    encode(values, made.parameters, made.scales, made.layout.blocks, rounding(1, ticket, values.device))
    made.float_buffers.fill_(2.0)
    made.int_buffers.fill_(2)
    return made


def tensor_chunks(sent: Payload) -> Iterator[pb.TensorChunk]:
    """The payload in pieces, as generated messages."""
    return (pb.TensorChunk(offset=chunk.offset, data=bytes(chunk.data)) for chunk in sent.chunks())


class Refused(AssertionError):
    """A call ended with a status."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.code = error.code()
        self.message = error.details() or ""
        self.reason = ""
        self.retry_seconds = None
        status = rpc_status.from_call(error)
        for detail in status.details if status else ():
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                self.reason = info.reason
            elif detail.Unpack(retry):
                self.retry_seconds = retry.retry_delay.ToNanoseconds() / 1e9
        super().__init__(f"{self.code} {self.reason}: {self.message}")


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise Refused(error) from error


class Exchanges:
    """One open PushPull stream."""

    _END = None

    def __init__(self, worker: "WireWorker") -> None:
        self._worker = worker
        self._outbox: queue.Queue[pb.PushPullRequest | None] = queue.Queue()
        self.call = worker.stub.PushPull(iter(self._outbox.get, self._END))

    def send(self, message: pb.PushPullRequest) -> None:
        self._outbox.put(message)

    def begin(self, gradient: Payload | None, *, wants: bool = True, **header: Any) -> pb.PushPullRequest:
        """Send an exchange, all of it; returns its header for a retry."""
        message = self._worker.exchange(gradient, wants=wants, **header)
        self.replay(message, gradient)
        return message

    def replay(self, message: pb.PushPullRequest, gradient: Payload | None) -> None:
        self.send(message)
        for chunk in tensor_chunks(gradient) if gradient is not None else ():
            self.send(pb.PushPullRequest(chunk=chunk))

    def receive(self) -> pb.PushPullResponse:
        with refusals():
            return next(self.call)

    def result(self) -> pb.PushResult:
        message = self.receive()
        assert message.WhichOneof("part") == "result", message
        return message.result

    def delivery(self) -> pb.Delivery:
        """The next ticket; its parameters are in the worker's `params`."""
        message = self.receive()
        assert message.WhichOneof("part") == "delivery", message
        self._worker.receive(message.delivery, (self.receive().chunk for _ in itertools.count()))
        return message.delivery

    def finish(self) -> None:
        self._outbox.put(self._END)

    def drop(self) -> None:
        self.call.cancel()
        self._outbox.put(self._END)


class WireWorker:
    """A worker that can be made to misbehave."""

    def __init__(
        self,
        stub: ParameterServerStub,
        name: str,
        manifest: Manifest = SMALL,
        incarnation: int = 1,
        start: float = 0.0,
        local_steps: int = 0,
    ) -> None:
        self.stub, self.name, self.manifest, self.incarnation = stub, name, manifest, incarnation
        self.start, self.local_steps = start, local_steps
        self.request = 0
        self.ticket: pb.Ticket | None = None
        self.params = torch.zeros(0)
        self.float_buffers = torch.zeros(0)
        self.int_buffers = torch.zeros(0)
        self.frozen = torch.zeros(0)  # as they came last

    def join(self, slots: int = 1) -> pb.Welcome:
        with refusals():
            answer = self.ask_to_join(slots)
            if answer.WhichOneof("answer") == "model_wanted":
                self.offer()
                answer = self.ask_to_join(slots)
        assert answer.WhichOneof("answer") == "welcome", answer
        return answer.welcome

    def ask_to_join(self, slots: int = 1, version: int = 1, model_digest: bytes = b"") -> pb.JoinResponse:
        request = pb.JoinRequest(
            worker=self.name,
            incarnation=self.incarnation,
            protocol_version=version,
            slots=slots,
            model_digest=model_digest or (self.manifest.model_digest if self.manifest.newer else b""),
            local_steps=self.local_steps > 0,
        )
        with refusals():
            return self.stub.Join(request)

    def offer(self, chunks: Iterator[pb.TensorChunk] | None = None) -> pb.OfferModelResponse:
        offer = pb.ModelOffer(worker=self.name, incarnation=self.incarnation, manifest=self.manifest.to_message())
        chunks = (
            tensor_chunks(payload(self.manifest, self.start, buffers=True, frozen=True)) if chunks is None else chunks
        )
        messages = itertools.chain(
            [pb.OfferModelRequest(offer=offer)], (pb.OfferModelRequest(chunk=chunk) for chunk in chunks)
        )
        with refusals():
            return self.stub.OfferModel(messages)

    def requester(self, slot: int = 0, request: int | None = None) -> pb.Requester:
        if request is None:
            self.request += 1
            request = self.request
        return pb.Requester(worker=self.name, incarnation=self.incarnation, slot=slot, request=request)

    def header(self, gradient: Payload, **changes: Any) -> pb.Gradient:
        return pb.Gradient(
            **{
                "ticket": self.ticket,
                "manifest_digest": self.manifest.digest,
                "dtype": gradient.layout.dtype,
                "with_buffers": gradient.layout.with_buffers,
                "payload_bytes": gradient.layout.total_bytes,
                "samples": 4,
                "local_steps": self.local_steps,
            }
            | changes
        )

    def exchange(
        self,
        gradient: Payload | None,
        *,
        wants: bool = True,
        slot: int = 0,
        buffers: bool = False,
        frozen: bool = False,
        **header: Any,
    ) -> pb.PushPullRequest:
        return pb.PushPullRequest(
            exchange=pb.Exchange(
                requester=self.requester(slot),
                gradient=None if gradient is None else self.header(gradient, **header),
                next=pb.DeliveryRequest(dtype=FLOAT32, with_buffers=buffers, with_frozen=frozen) if wants else None,
            )
        )

    def receive(self, delivery: pb.Delivery, chunks: Iterator[pb.TensorChunk]) -> None:
        layout = PayloadLayout.of(
            self.manifest, delivery.dtype, with_buffers=delivery.with_buffers, with_frozen=delivery.with_frozen
        )
        assert delivery.payload_bytes == layout.total_bytes
        receiver = PayloadReceiver(Payload(layout))
        while not receiver.complete:
            receiver.accept(next(chunks))
        self.ticket = delivery.ticket
        self.params, self.float_buffers = receiver.payload.parameters, receiver.payload.float_buffers
        self.int_buffers = receiver.payload.int_buffers
        if delivery.with_frozen:
            self.frozen = receiver.payload.frozen

    def open(self) -> Exchanges:
        return Exchanges(self)

    def push(self, gradient: Payload, **header: Any) -> pb.PushResult:
        """By PushGradient."""
        push = pb.Push(requester=self.requester(), gradient=self.header(gradient, **header))
        return self.push_messages(push, tensor_chunks(gradient))

    def push_messages(self, push: pb.Push, chunks: Iterator[pb.TensorChunk]) -> pb.PushResult:
        messages = itertools.chain(
            [pb.PushGradientRequest(push=push)], (pb.PushGradientRequest(chunk=chunk) for chunk in chunks)
        )
        with refusals():
            return self.stub.PushGradient(messages).result

    def pull(
        self, *, ticket: bool = True, buffers: bool = False, frozen: bool = False, dtype: int = FLOAT32, **more: Any
    ) -> pb.Delivery:
        """By PullParams."""
        request = pb.PullParamsRequest(
            requester=self.requester() if ticket else None,
            delivery=pb.DeliveryRequest(dtype=dtype, with_buffers=buffers, with_frozen=frozen),  # type: ignore[arg-type]
            **more,
        )
        with refusals():
            call = self.stub.PullParams(request)
            delivery = next(call).delivery
            if delivery.payload_bytes:
                self.receive(delivery, (message.chunk for message in call))
        return delivery


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


class Seen(NamedTuple):
    """All of a run's state: what a refusal must leave as it was. Tensors are bytes, so that every bit counts.

    Attributes:
        tickets: keys of those in flight.
        rest: members with their slots' request numbers and kept results, the learning rate, who waits, all counters.
    """

    iteration: int
    params: bytes
    vectors: dict[str, bytes]
    buffers: tuple[bytes, bytes]
    tickets: tuple[TicketKey, ...]
    rest: dict[str, Any]

    @property
    def model(self) -> tuple[Any, ...]:
        """What gradients make, and nothing of who takes part: for refusals that end a worker's or a ticket's time."""
        return self[:4]


def state_of(server: Server) -> Seen:
    with server.host.engine.inspect() as machine:
        taken, tickets = snapshot.take(machine), tuple(machine.state.tickets)
        live_slots = machine.state.live_slots  # which a checkpoint counts anew
    tensors = {name: tensor.numpy().tobytes() for name, tensor in taken.tensors.items()}
    params, buffers = tensors.pop("params"), (tensors.pop("float_buffers"), tensors.pop("int_buffers"))
    vectors = {name: tensors.pop(name) for name in list(tensors) if name.startswith("rule.")}
    rest = taken.fields | tensors | {"live_slots": live_slots}
    return Seen(machine.state.iteration, params, vectors, buffers, tickets, rest)


def kept_files(directory: Path) -> list[str]:
    """Names of the run's files on disk, but for the lock, which only says that a server is there."""
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


def received_bytes(server: Server) -> int:
    """Tensor bytes that a server has received, by whichever method."""
    return int(sum(tally.total() for tally in server.metrics.traffic.received_bytes.values()))
