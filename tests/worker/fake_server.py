"""A parameter server for tests of the worker: honest SGD, in a few lines, that can be told to misbehave.

`faults` is a script: each entry names a point of the protocol and what happens the next time it is reached.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from ormo_protos.limits import MAX_MESSAGE_BYTES
from ormo_protos.manifest import FLOAT32, Manifest
from ormo_protos.refusals import ERROR_DOMAIN, Reason
from ormo_protos.tensors import Payload, PayloadLayout, PayloadReceiver
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerServicer, add_ParameterServerServicer_to_server
from service.wire import tensor_chunks

LEARNING_RATE = 0.5
Fault = Callable[[Any], None]


def refuse(code: str, reason: str | None = None, retry_seconds: float = 0.0, message: str = "as scripted") -> Fault:
    """End the call with this status; without a reason it looks like a failure of the network."""

    def fault(context: grpc.ServicerContext) -> None:
        status = status_pb2.Status(code=code_pb2.Code.Value(code), message=message)
        details: list[Any] = []
        if reason is not None:
            details.append(error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN))
        if retry_seconds:
            delay = duration_pb2.Duration(nanos=int(retry_seconds * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        context.abort_with_status(rpc_status.to_status(status))

    return fault


class _Writing(grpc.ServerInterceptor):
    """Has answers that carry tensors written by the fake server's `written`."""

    def __init__(self, fake: "FakeServer") -> None:
        self._fake = fake

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = continuation(details)
        if handler is None or not handler.response_streaming:
            return handler
        return handler._replace(response_serializer=self._written)

    def _written(self, answer: Any) -> bytes:
        return self._fake.written(answer)


LOST = refuse("UNAVAILABLE", message="the connection broke")


@dataclass
class SlotRecord:
    """What the server remembers of one slot."""

    ticket: int = 0
    request: int = 0
    kept: pb.PushResult | None = None


@dataclass
class FakeServer(ParameterServerServicer):
    """State is as in the real one, without momentum; `asked` lists the requests as they came."""

    manifest: Manifest | None = None
    model: Payload | None = None  # float32 with buffers and frozen tensors
    weight_decay: float = 0.0
    rate: float | None = None  # said with each delivery; None: as servers that say it at the join alone
    stop_after: int = 0
    local_steps: int = 0
    steps_of_tickets: deque[int] = field(default_factory=deque)  # of those to come; when it is empty, `local_steps`
    lease_seconds: float = 30.0
    epoch: int = 7
    iteration: int = 0
    samples: int = 0
    members: dict[str, int] = field(default_factory=dict)
    slots: dict[tuple[str, int], SlotRecord] = field(default_factory=dict)
    faults: deque[tuple[str, Fault]] = field(default_factory=deque)
    asked: list[str] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    announced: list[pb.Gradient] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)  # of all pushes that came whole, retries too
    evaluations: list[pb.Evaluation] = field(default_factory=list)
    answers_to_join: deque[pb.JoinResponse] = field(default_factory=deque)
    # As servers that know of `data`: the first chunk goes with the message that announces it, the result with both.
    takes_data: bool = False
    takes_int8: bool = False
    manifest_version: int = 1  # 0: as servers that do not know frozen tensors, and judge no digest
    # Makes each answer's bytes; a test may have it write others.
    written: Callable[[Any], bytes] = lambda answer: answer.SerializeToString()
    with_data: int = 0  # gradients whose first chunk came so
    with_frozen: int = 0  # deliveries that had the frozen tensors
    # What only the shell around the state needs.
    port: int = 0
    server: Any = None
    pool: Any = None
    lock: Any = field(default_factory=threading.Lock)
    tickets: int = 0

    def start(self) -> "FakeServer":
        self.pool = futures.ThreadPoolExecutor(8)
        self.server = grpc.server(
            self.pool,
            interceptors=[_Writing(self)],
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)],
        )
        add_ParameterServerServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        self.server.start()
        return self

    def stop(self) -> None:
        self.server.stop(None).wait()
        self.pool.shutdown()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def finished(self) -> bool:
        return 0 < self.stop_after <= self.iteration

    def at(self, point: str, context: Any) -> None:
        """Note that the protocol is at this point, and do what the script has for it."""
        if self.faults and self.faults[0][0] == point:
            self.faults.popleft()[1](context)

    def told(self, *faults: tuple[str, Fault]) -> None:
        self.faults.extend(faults)

    def forget_workers(self, *_: Any) -> None:
        self.members.clear()
        self.slots.clear()

    # The service.

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:  # noqa: N802
        self.asked.append("join")
        self.at("join", context)
        if self.local_steps and not request.local_steps:
            refuse("FAILED_PRECONDITION", Reason.LOCAL_STEPS)(context)
        if self.answers_to_join:
            return self.answers_to_join.popleft()
        if self.finished:
            refuse("FAILED_PRECONDITION", Reason.FINISHED)(context)
        if self.manifest is None:
            wanted = pb.ModelWanted(lease_seconds=10, manifest_version=self.manifest_version)
            return pb.JoinResponse(model_wanted=wanted)
        self.members[request.worker] = request.incarnation
        settings = pb.RunSettings(
            method="fake",
            weight_decay=self.weight_decay,
            learning_rate=LEARNING_RATE,
            stop_after_gradients=self.stop_after,
            local_steps=self.local_steps,
        )
        judged = self.manifest_version > 0 and request.model_digest == self.manifest.model_digest
        welcome = pb.Welcome(
            manifest=None if judged else self.manifest.to_message(),
            settings=settings,
            iteration=self._now(),
            lease_seconds=self.lease_seconds,
            rank=len(self.members) - 1,
            data_seed=1234 + len(self.asked),
            takes_data=self.takes_data,
            takes_int8=self.takes_int8,
        )
        return pb.JoinResponse(welcome=welcome)

    def OfferModel(self, requests: Iterator[pb.OfferModelRequest], context: Any) -> pb.OfferModelResponse:  # noqa: N802
        self.asked.append("offer")
        offer = next(requests).offer
        self.at("offer", context)
        manifest = Manifest.from_message(offer.manifest)
        payload = Payload(PayloadLayout.of(manifest, FLOAT32, with_buffers=True, with_frozen=True))
        receiver = PayloadReceiver(payload)
        for message in requests:
            receiver.accept(message.chunk)
        assert receiver.complete
        self.manifest, self.model = manifest, payload
        return pb.OfferModelResponse(iteration=self._now())

    def PullParams(self, request: pb.PullParamsRequest, context: Any) -> Iterator[pb.PullParamsResponse]:  # noqa: N802
        self.asked.append("pull")
        self.at("pull", context)
        if request.HasField("newer_than") and request.newer_than == self._now():
            yield pb.PullParamsResponse(delivery=pb.Delivery(iteration=self._now(), dtype=request.delivery.dtype))
            return
        delivery, payload = self._delivery(request.delivery, None)
        yield pb.PullParamsResponse(delivery=delivery)
        for chunk in tensor_chunks(payload):
            self.at("pull chunk", context)
            yield pb.PullParamsResponse(chunk=chunk)

    def PushPull(self, requests: Iterator[pb.PushPullRequest], context: Any) -> Iterator[pb.PushPullResponse]:  # noqa: N802
        for message in requests:
            exchange = message.exchange
            who = exchange.requester
            kind = "push" if exchange.HasField("gradient") else "ask"
            self.asked.append(f"{kind} {who.request}")
            self.at("exchange", context)
            if self.members.get(who.worker) != who.incarnation:
                refuse("FAILED_PRECONDITION", Reason.NOT_A_MEMBER)(context)
            slot = self.slots.setdefault((who.worker, who.slot), SlotRecord())
            if who.request < slot.request:
                refuse("FAILED_PRECONDITION", Reason.STALE_REQUEST)(context)
            together, result = self.takes_data and exchange.next.takes_data, None
            if exchange.HasField("gradient"):
                gradient = self._received(exchange.gradient, message.data, requests)
                self.at("received", context)
                with self.lock:
                    result = self._result(who, slot, exchange.gradient, gradient)
                self.at("result", context)
                if not together or self.finished:
                    yield pb.PushPullResponse(result=result)
            slot.request = who.request
            if not exchange.HasField("next"):
                continue
            if self.finished:
                yield pb.PushPullResponse(finished=pb.Finished(iteration=self._now()))
                continue
            self.tickets += 1
            slot.ticket = self.tickets
            yield from self._next_ticket(exchange.next, slot.ticket, result, context)

    def _next_ticket(
        self, asked: pb.DeliveryRequest, ticket: int, result: pb.PushResult | None, context: Any
    ) -> Iterator[pb.PushPullResponse]:
        delivery, payload = self._delivery(asked, ticket)
        answer, chunks = pb.PushPullResponse(delivery=delivery), list(tensor_chunks(payload))
        if self.takes_data and asked.takes_data:
            self.at("delivery", context)
            if result is not None:
                answer.delivery.result.CopyFrom(result)
            answer.data = chunks.pop(0).data
        yield answer
        for chunk in chunks:
            self.at("delivery", context)
            yield pb.PushPullResponse(chunk=chunk)

    def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:  # noqa: N802
        self.at("heartbeat", context)
        if self.members.get(request.worker) != request.incarnation:
            refuse("FAILED_PRECONDITION", Reason.NOT_A_MEMBER)(context)
        return pb.HeartbeatResponse(iteration=self._now(), finished=self.finished)

    def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:  # noqa: N802
        self.asked.append("leave")
        self.members.pop(request.worker, None)
        return pb.LeaveResponse()

    def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:  # noqa: N802
        self.at("status", context)
        phase = pb.GetStatusResponse.PHASE_FINISHED if self.finished else pb.GetStatusResponse.PHASE_TRAINING
        return pb.GetStatusResponse(phase=phase, iteration=self._now())

    def ReportEvaluation(self, request: pb.ReportEvaluationRequest, context: Any) -> pb.ReportEvaluationResponse:  # noqa: N802
        self.at("report", context)
        self.evaluations.append(request.evaluation)
        return pb.ReportEvaluationResponse()

    # The state.

    def _now(self) -> pb.Iteration:
        return pb.Iteration(epoch=self.epoch, number=self.iteration)

    def _received(self, announced: pb.Gradient, data: bytes, requests: Iterator[pb.PushPullRequest]) -> Payload:
        assert self.manifest is not None
        assert announced.manifest_digest in self.manifest.digests
        layout = PayloadLayout.of_gradient(self.manifest, announced.dtype, with_buffers=announced.with_buffers)
        assert announced.payload_bytes == layout.total_bytes
        receiver = PayloadReceiver(Payload(layout))
        if data:
            assert self.takes_data, "data came to a server that has not said that it takes any"
            self.with_data += 1
            receiver.accept(pb.TensorChunk(data=data))
        while not receiver.complete:
            message = next(requests)
            assert not message.data
            receiver.accept(message.chunk)
        self.payloads.append(bytes(receiver.payload.memory))
        return receiver.payload

    def _result(self, who: pb.Requester, slot: SlotRecord, announced: pb.Gradient, gradient: Payload) -> pb.PushResult:
        if slot.kept is not None and slot.kept.request == who.request:
            repeated = pb.PushResult()
            repeated.CopyFrom(slot.kept)
            repeated.repeated = True
            return repeated
        reason = self._refusal(slot, announced, gradient)
        if reason:
            return pb.PushResult(request=who.request, refusal=reason, refusal_message="as it must be")
        assert self.model is not None
        slot.ticket = 0
        self.iteration += 1
        self.samples += announced.samples
        self.announced.append(announced)
        self.gradients.append(gradient.gradient[:].float())
        self.model.parameters.sub_(self.gradients[-1], alpha=LEARNING_RATE)
        if announced.with_buffers:
            self.model.float_buffers.copy_(gradient.float_buffers)
            self.model.int_buffers.copy_(gradient.int_buffers)
        slot.kept = pb.PushResult(request=who.request, iteration=self._now(), learning_rate=LEARNING_RATE)
        return slot.kept

    def _refusal(self, slot: SlotRecord, announced: pb.Gradient, gradient: Payload) -> str:
        if self.finished:
            return Reason.FINISHED
        if announced.ticket.epoch != self.epoch or announced.ticket.number != slot.ticket:
            return Reason.TICKET_UNKNOWN
        return "" if torch.isfinite(gradient.gradient[:]).all() else Reason.NON_FINITE

    def _delivery(self, asked: pb.DeliveryRequest, ticket: int | None) -> tuple[pb.Delivery, Payload]:
        assert self.manifest is not None
        assert self.model is not None
        layout = PayloadLayout.of(
            self.manifest, asked.dtype, with_buffers=asked.with_buffers, with_frozen=asked.with_frozen
        )
        payload = Payload(layout)
        if asked.with_frozen:
            self.with_frozen += 1
            payload.frozen.copy_(self.model.frozen)
        payload.parameters.copy_(self.model.parameters)
        if asked.with_buffers:
            payload.float_buffers.copy_(self.model.float_buffers)
            payload.int_buffers.copy_(self.model.int_buffers)
        delivery = pb.Delivery(
            iteration=self._now(),
            dtype=asked.dtype,
            with_buffers=asked.with_buffers,
            with_frozen=asked.with_frozen,
            payload_bytes=layout.total_bytes,
            manifest_digest=self.manifest.digest,
            samples=self.samples,
            learning_rate=self.rate,
        )
        if ticket is not None:
            steps = self.steps_of_tickets.popleft() if self.steps_of_tickets else self.local_steps
            delivery.ticket.CopyFrom(
                pb.Ticket(epoch=self.epoch, number=ticket, iteration=self.iteration, local_steps=steps)
            )
        return delivery, payload
