"""The service: every method translates, and nothing more."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

import grpc

from ormo_protos.manifest import Manifest
from ormo_protos.tensors import Payload, PayloadLayout, PayloadReceiver
from ormo_protos.v1 import PROTOCOL_VERSION
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerServicer
from ormo_server.core.errors import BadRequest, Finished, OrmoError, ProtocolVersion
from ormo_server.core.inputs import Requester
from ormo_server.service import messages
from ormo_server.service.buffers import BufferPool
from ormo_server.service.delivery import Delivery, Waiter
from ormo_server.service.engine import Engine, Push
from ormo_server.service.errors import errors_as_status
from ormo_server.service.host import RunHost
from ormo_server.service.model_offers import WAIT_SECONDS
from ormo_server.service.status import run_settings, status_of
from ormo_server.service.streams import OpenStream, StreamRegistry

Chunks = Iterator[pb.TensorChunk]


class Servicer(ParameterServerServicer):
    """`ormo.v1.ParameterServer`. The methods are documented in `parameter_server.proto`."""

    def __init__(self, host: RunHost, streams: StreamRegistry) -> None:
        self._host = host
        self._streams = streams
        self._metrics = host.metrics
        self._buffers = BufferPool()

    # Members

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinResponse:  # noqa: N802, D102
        with self._answering(context):
            worker = messages.worker_id(request.worker)
            _check_version(request.protocol_version)
            self._streams.refuse_if_draining()
            if not self._host.has_model:
                return self._ask_for_model(worker, request.incarnation)
            return self._welcome(worker, request)
        raise AssertionError("unreachable: refusals raise")

    def _ask_for_model(self, worker: str, incarnation: int) -> pb.JoinResponse:
        if self._host.offers.ask(worker, incarnation, self._host.clock()):
            return pb.JoinResponse(model_wanted=pb.ModelWanted(lease_seconds=self._host.offers.lease_seconds))
        return pb.JoinResponse(wait=pb.Wait(retry_seconds=WAIT_SECONDS))

    def _welcome(self, worker: str, request: pb.JoinRequest) -> pb.JoinResponse:
        engine, limit = self._host.engine, self._host.settings.slots_per_worker
        if request.slots > limit:
            raise BadRequest(
                f"{request.slots} slots were asked for, and slots_per_worker is {limit}: raise it or ask less"
            )
        member = engine.join(worker, request.incarnation, request.slots)
        return pb.JoinResponse(
            welcome=pb.Welcome(
                manifest=engine.manifest.to_message(),
                settings=run_settings(self._host),
                iteration=_iteration(engine),
                lease_seconds=self._host.settings.failure_timeout,
                rank=member.rank,
                data_seed=member.data_seed,
            )
        )

    def Heartbeat(self, request: pb.HeartbeatRequest, context: grpc.ServicerContext) -> pb.HeartbeatResponse:  # noqa: N802, D102
        with self._answering(context):
            engine = self._host.engine
            returned = [messages.ticket_key(ticket) for ticket in request.returned]
            engine.heartbeat(messages.worker_id(request.worker), request.incarnation, returned)
            return pb.HeartbeatResponse(iteration=_iteration(engine), finished=engine.finished.is_set())
        raise AssertionError("unreachable: refusals raise")

    def Leave(self, request: pb.LeaveRequest, context: grpc.ServicerContext) -> pb.LeaveResponse:  # noqa: N802, D102
        with self._answering(context):
            worker = messages.worker_id(request.worker)
            if self._host.has_model:
                self._host.engine.leave(worker, request.incarnation)
            self._streams.end_worker(worker, request.incarnation)
        return pb.LeaveResponse()

    def GetStatus(self, request: pb.GetStatusRequest, context: grpc.ServicerContext) -> pb.GetStatusResponse:  # noqa: ARG002, N802, D102
        with self._answering(context):
            return status_of(self._host, draining=self._streams.draining)
        raise AssertionError("unreachable: refusals raise")

    # The model

    def OfferModel(  # noqa: N802, D102
        self, request_iterator: Iterator[pb.OfferModelRequest], context: grpc.ServicerContext
    ) -> pb.OfferModelResponse:
        with self._answering(context), self._streams.open(context) as stream, stream.exchange():
            offer = _first(request_iterator, "offer").offer
            worker, manifest = messages.worker_id(offer.worker), Manifest.from_message(offer.manifest)
            payload = self._host.begin_offer(worker, offer.incarnation, manifest)
            try:
                for chunk in self._received(payload, _chunks(request_iterator)):
                    self._host.offers.renew(worker, offer.incarnation, self._host.clock())
                    self._metrics.received_bytes.inc(chunk)
                epoch, number = self._host.accept_model(worker, offer.incarnation, manifest, payload)
            except (OrmoError, ValueError, grpc.RpcError):
                self._host.offers.give_up()
                raise
            return pb.OfferModelResponse(iteration=pb.Iteration(epoch=epoch, number=number))
        raise AssertionError("unreachable: refusals raise")

    # Exchanges

    def PushPull(  # noqa: N802, D102
        self, request_iterator: Iterator[pb.PushPullRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.PushPullResponse]:
        with self._answering(context), self._streams.open(context) as stream:
            for message in request_iterator:
                with stream.exchange():
                    yield from self._exchange(stream, _part(message, "exchange").exchange, request_iterator)
                self._streams.refuse_if_draining()

    def _exchange(
        self, stream: OpenStream, exchange: pb.Exchange, request_iterator: Iterator[pb.PushPullRequest]
    ) -> Iterator[pb.PushPullResponse]:
        engine, requester = self._introduced(stream, exchange.requester)
        with self._gradient(engine, requester, exchange, _chunks(request_iterator)) as (push, wish):
            outcome = engine.exchange(requester, push, wish, lambda: stream.current)
            with _withdrawn_at_end(engine, outcome.waiter):
                if outcome.refusal is not None:
                    self._refused(outcome.refusal)
                    result = messages.refused_result(requester.request, outcome.refusal)
                    yield pb.PushPullResponse(result=result)
                if outcome.result is not None:
                    yield pb.PushPullResponse(result=messages.push_result(outcome.result))
                if outcome.waiter is not None:
                    yield from self._next_ticket(stream, engine, outcome.waiter)
                elif outcome.finished:
                    yield _finished(engine)

    def _next_ticket(self, stream: OpenStream, engine: Engine, waiter: Waiter) -> Iterator[pb.PushPullResponse]:
        try:
            delivery = stream.wait(waiter)
        except Finished:
            yield _finished(engine)
            return
        yield pb.PushPullResponse(delivery=messages.delivery_header(delivery, engine.manifest.digest))
        for chunk in self._sent(stream, engine, delivery):
            yield pb.PushPullResponse(chunk=chunk)

    def PushGradient(  # noqa: N802, D102
        self, request_iterator: Iterator[pb.PushGradientRequest], context: grpc.ServicerContext
    ) -> pb.PushGradientResponse:
        with self._answering(context), self._streams.open(context) as stream, stream.exchange():
            push = _first(request_iterator, "push").push
            engine, requester = self._introduced(stream, push.requester)
            exchange = pb.Exchange(gradient=push.gradient)
            with self._gradient(engine, requester, exchange, _chunks(request_iterator)) as (gradient, _):
                outcome = engine.exchange(requester, gradient, None, lambda: stream.current)
            if outcome.refusal is not None:
                raise outcome.refusal
            assert outcome.result is not None
            return pb.PushGradientResponse(result=messages.push_result(outcome.result))
        raise AssertionError("unreachable: refusals raise")

    def PullParams(  # noqa: N802, D102
        self, request: pb.PullParamsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.PullParamsResponse]:
        with (
            self._answering(context),
            self._streams.open(context) as stream,
            stream.exchange(),
            self._pulled(stream, request) as (engine, delivery),
        ):
            yield pb.PullParamsResponse(delivery=messages.delivery_header(delivery, engine.manifest.digest))
            for chunk in self._sent(stream, engine, delivery):
                yield pb.PullParamsResponse(chunk=chunk)

    @contextlib.contextmanager
    def _pulled(self, stream: OpenStream, request: pb.PullParamsRequest) -> Iterator[tuple[Engine, Delivery]]:
        engine = self._host.engine
        layout = messages.delivery_layout(engine.manifest, request.delivery)
        with self._borrowed(layout) as payload:
            if not request.HasField("requester"):
                known = request.newer_than if request.HasField("newer_than") else None
                yield engine, engine.pull(payload, (known.epoch, known.number) if known else None)
                return
            engine, requester = self._introduced(stream, request.requester)
            outcome = engine.exchange(requester, None, payload, lambda: stream.current)
            if outcome.waiter is None:
                raise Finished("the run is over: there are no more tickets")
            with _withdrawn_at_end(engine, outcome.waiter):
                yield engine, stream.wait(outcome.waiter)

    # What the methods share

    @contextlib.contextmanager
    def _answering(self, context: grpc.ServicerContext) -> Iterator[None]:
        with errors_as_status(context, self._refused):
            yield

    def _refused(self, error: OrmoError) -> None:
        self._metrics.refusals.labels(error.reason.value).inc()

    def _introduced(self, stream: OpenStream, message: pb.Requester) -> tuple[Engine, Requester]:
        engine, requester = self._host.engine, messages.requester(message)
        engine.check_member(requester.worker, requester.incarnation)
        stream.introduce(requester)
        return engine, requester

    @contextlib.contextmanager
    def _gradient(
        self, engine: Engine, requester: Requester, exchange: pb.Exchange, chunks: Chunks
    ) -> Iterator[tuple[Push | None, Payload | None]]:
        """The exchange's gradient, received whole, and where the next parameters go: one buffer if it fits both."""
        wanted = messages.delivery_layout(engine.manifest, exchange.next) if exchange.HasField("next") else None
        with contextlib.ExitStack() as borrowed:
            if not exchange.HasField("gradient"):
                yield None, borrowed.enter_context(self._borrowed(wanted)) if wanted else None
                return
            header = exchange.gradient
            layout = messages.gradient_layout(engine.manifest, header)
            payload = borrowed.enter_context(self._borrowed(layout))
            for size in self._received(payload, chunks):
                engine.heard(requester.worker)
                self._metrics.received_bytes.inc(size)
            loss = header.loss if header.HasField("loss") else None
            push = Push(messages.ticket_key(header.ticket), payload, header.samples, loss, header.compute_seconds)
            if wanted is None or wanted == layout:
                yield push, payload if wanted else None
            else:
                yield push, borrowed.enter_context(self._borrowed(wanted))

    @contextlib.contextmanager
    def _borrowed(self, layout: PayloadLayout) -> Iterator[Payload]:
        payload = self._buffers.take(layout)
        try:
            yield payload
        finally:
            self._buffers.give(payload)

    def _received(self, payload: Payload, chunks: Chunks) -> Iterator[int]:
        """Fill a payload; yields the size of each chunk when it is in its place."""
        receiver = PayloadReceiver(payload)
        while not receiver.complete:
            chunk = next(chunks, None)
            if chunk is None:
                raise receiver.missing()
            receiver.accept(chunk)
            yield len(chunk.data)

    def _sent(self, stream: OpenStream, engine: Engine, delivery: Delivery) -> Chunks:
        for chunk in messages.delivered_chunks(delivery.payload):
            # Counted as it is handed over: a reader that has all it wants may never ask for the end.
            self._metrics.sent_bytes.inc(len(chunk.data))
            yield chunk
            if stream.requester is not None:
                engine.heard(stream.requester.worker)


@contextlib.contextmanager
def _withdrawn_at_end(engine: Engine, waiter: Waiter | None) -> Iterator[None]:
    """Before its buffer is lent to somebody else, nobody may write to it any more."""
    try:
        yield
    finally:
        if waiter is not None:
            engine.withdraw(waiter)


M = TypeVar("M", pb.PushPullRequest, pb.PushGradientRequest, pb.OfferModelRequest)


def _part(message: M, wanted: str) -> M:
    got = message.WhichOneof("part")
    if got != wanted:
        raise BadRequest(f"a message with {got or 'nothing'!r} came where {wanted!r} was expected")
    return message


def _first(messages_: Iterator[M], wanted: str) -> M:
    message = next(messages_, None)
    if message is None:
        raise BadRequest(f"the stream ended before its first message, which holds {wanted!r}")
    return _part(message, wanted)


def _chunks(messages_: Iterable[M]) -> Chunks:
    for message in messages_:
        yield _part(message, "chunk").chunk


def _finished(engine: Engine) -> pb.PushPullResponse:
    return pb.PushPullResponse(finished=pb.Finished(iteration=_iteration(engine)))


def _iteration(engine: Engine) -> pb.Iteration:
    epoch, number = engine.position()
    return pb.Iteration(epoch=epoch, number=number)


def _check_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise ProtocolVersion(
            f"the worker speaks version {version} of the protocol, this server version {PROTOCOL_VERSION}: install the "
            "same version of this package on both"
        )
