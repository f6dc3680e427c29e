"""The service: every method translates, and nothing more."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import grpc

from ormo_protos.framing import Frame, Headed
from ormo_protos.manifest import Manifest
from ormo_protos.refusals import Reason
from ormo_protos.tensors import MAX_CHUNK_BYTES, Chunk, PayloadReceiver
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.core.errors import BadRequest, Finished, ManifestDigest, NotAMember, OrmoError, ProtocolVersion
from ormo_server.core.inputs import Requester
from ormo_server.security.access import Access, Caller
from ormo_server.service import messages
from ormo_server.service.admin import Controls, run_settings, status_of
from ormo_server.service.delivery import Delivery
from ormo_server.service.engine import Engine
from ormo_server.service.figures import Outcome
from ormo_server.service.offers import WAIT_SECONDS, room_for
from ormo_server.service.refusals import answers, log_refusal, named, streams_answers
from ormo_server.service.run import RunHost
from ormo_server.service.streams import OpenStream, StreamRegistry
from ormo_server.service.transfers import BufferPool, BytesInFlight, FiniteNorm, Loans, ReceivedGradient

R = TypeVar("R", pb.PushPullResponse, pb.PullParamsResponse)

# What a manifest may hold that is offered here; see ModelWanted.
MANIFEST_VERSION = 1

Chunks = Iterator[Chunk]
Answers = Iterator[Frame[pb.PushPullResponse]]


class Servicer:
    """`ormo.v1.ParameterServer`. The methods are documented in `parameter_server.proto`.

    Args:
        host: of the run.
        streams: that are open.
        access: knows callers; `Guard` has asked it before whether the method is theirs to call.
        controls: what operators may do.
    """

    def __init__(self, host: RunHost, streams: StreamRegistry, access: Access, controls: Controls) -> None:
        self._host = host
        self._streams = streams
        self._access = access
        self._controls = controls
        self._metrics = host.metrics
        limit = host.settings.max_bytes_in_flight
        self._in_flight = BytesInFlight(None if limit is None else int(limit))
        self._buffers = BufferPool(self._in_flight)

    # Members

    @answers
    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinResponse:
        caller = self._access.caller(context)
        worker = _own(caller, request.worker)
        messages.check_version(request.protocol_version)
        self._streams.refuse_if_draining()
        if not self._host.has_model:
            return self._ask_for_model(worker, request.incarnation)
        return self._welcome(worker, request, caller)

    def _ask_for_model(self, worker: str, incarnation: int) -> pb.JoinResponse:
        if self._host.offers.ask(worker, incarnation, self._host.clock()):
            lease_seconds = self._host.offers.lease_seconds
            wanted = pb.ModelWanted(lease_seconds=lease_seconds, manifest_version=MANIFEST_VERSION)
            return pb.JoinResponse(model_wanted=wanted)
        return pb.JoinResponse(wait=pb.Wait(retry_seconds=WAIT_SECONDS))

    def _welcome(self, worker: str, request: pb.JoinRequest, caller: Caller) -> pb.JoinResponse:
        engine, limit = self._host.engine, self._host.settings.slots_per_worker
        manifest = self._manifest_for(request.model_digest)  # first: a worker with another model must not count
        if request.slots > limit:
            raise BadRequest(
                f"{request.slots} slots were asked for, and slots_per_worker is {limit}: raise it or ask less"
            )
        try:
            member, replaced = engine.join(worker, request.incarnation, request.slots, caller.name)
        except Finished:
            engine.wait_durable()
            raise
        if replaced is not None:
            self._streams.end_worker(worker, replaced)
        return pb.JoinResponse(
            welcome=pb.Welcome(
                manifest=manifest,
                settings=run_settings(self._host),
                iteration=_iteration(engine),
                lease_seconds=self._host.settings.failure_timeout_seconds,
                rank=member.rank,
                data_seed=member.data_seed,
                takes_data=True,
            )
        )

    def _manifest_for(self, model_digest: bytes) -> pb.Manifest | None:
        """What a worker is told of the model: nothing, if it has said that it has the same.

        Raises:
            ManifestDigest: it has another one.
            ProtocolVersion: it is older than what this model has in it.
        """
        held = self._host.engine.manifest
        if model_digest:
            if model_digest not in held.digests:
                raise ManifestDigest(
                    f"the worker's model is not that of the run in {self._host.settings.directory}: start the "
                    "worker with the server's task, name another server, or begin a new run: start the server with "
                    "another --directory, or with --fresh, which moves the run in this one aside"
                )
            return None
        manifest = held.without_merges.to_message()
        if held.newer is not None or manifest.ByteSize() > MAX_CHUNK_BYTES:
            what = "a manifest larger than a message" if held.newer is None else held.newer.described()
            raise ProtocolVersion(
                f"the model has {what}, and this worker is of a version that does not know such a thing: install the "
                "server's version of this package on it"
            )
        return manifest

    @answers
    def Heartbeat(self, request: pb.HeartbeatRequest, context: grpc.ServicerContext) -> pb.HeartbeatResponse:
        worker = _own(self._access.caller(context), request.worker)
        engine = self._members_engine()
        returned = [messages.ticket_key(ticket) for ticket in request.returned]
        engine.heartbeat(worker, request.incarnation, returned)
        return pb.HeartbeatResponse(iteration=_iteration(engine), finished=engine.finished.is_set())

    @answers
    def Leave(self, request: pb.LeaveRequest, context: grpc.ServicerContext) -> pb.LeaveResponse:
        worker = _own(self._access.caller(context), request.worker)
        try:
            if self._host.has_model:
                self._host.engine.leave(worker, request.incarnation)
        finally:
            self._streams.end_worker(worker, request.incarnation)
        return pb.LeaveResponse()

    @answers
    def ReportEvaluation(
        self,
        request: pb.ReportEvaluationRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.ReportEvaluationResponse:
        self._host.engine.evaluated(messages.evaluation(request.evaluation))
        return pb.ReportEvaluationResponse()

    @answers
    def GetStatus(self, request: pb.GetStatusRequest, context: grpc.ServicerContext) -> pb.GetStatusResponse:  # noqa: ARG002
        return status_of(self._host, draining=self._streams.draining)

    @answers
    def Control(self, request: pb.ControlRequest, context: grpc.ServicerContext) -> pb.ControlResponse:
        return self._controls.act(request, self._access.caller(context).name)

    # The model

    @answers
    def OfferModel(
        self, request_iterator: Iterator[Frame[pb.OfferModelRequest]], context: grpc.ServicerContext
    ) -> pb.OfferModelResponse:
        with self._streams.open(context, self._access.caller(context)) as stream:
            self._host.refuse_second_model()  # before a manifest is waited for, and counted
            offer = messages.first_of(request_iterator, "offer").message.offer
            worker = _own(stream.caller, offer.worker)
            try:
                with stream.exchange():
                    return self._accepted(stream, worker, offer, request_iterator)
            except BaseException:
                self._host.offers.give_up(worker, offer.incarnation)
                raise

    def _accepted(
        self, stream: OpenStream, worker: str, offer: pb.ModelOffer, frames: Iterator[Frame[pb.OfferModelRequest]]
    ) -> pb.OfferModelResponse:
        incarnation = offer.incarnation
        self._host.check_wanted(worker, incarnation)  # before a manifest is read, which may take a second
        manifest = Manifest.from_messages(self._manifest_parts(stream, offer, frames))
        manifest.check_names()
        layout = self._host.begin_offer(manifest)
        with self._in_flight.during(stream.caller.name, layout.total_bytes):
            payload = room_for(layout)
            for _ in self._received(stream, PayloadReceiver(payload), messages.chunks_of(frames), "OfferModel"):
                self._host.offers.renew(worker, incarnation, self._host.clock())
            stream.has_all()
            epoch, number = self._host.accept_model(worker, incarnation, manifest, payload)
        return pb.OfferModelResponse(iteration=pb.Iteration(epoch=epoch, number=number))

    def _manifest_parts(
        self, stream: OpenStream, offer: pb.ModelOffer, frames: Iterator[Frame[pb.OfferModelRequest]]
    ) -> Iterator[pb.Manifest]:
        yield offer.manifest
        for frame in frames:
            part = messages.require_head(frame, "more").message.more
            self._host.offers.renew(offer.worker, offer.incarnation, self._host.clock())
            stream.moved()
            yield part

    @streams_answers
    def DescribeModel(
        self,
        request: pb.DescribeModelRequest,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> Iterator[pb.DescribeModelResponse]:
        with self._streams.open(context, self._access.caller(context), reader=True) as stream, stream.exchange():
            for part in self._host.engine.manifest.to_messages():
                yield pb.DescribeModelResponse(manifest=part)
                stream.moved()

    # Exchanges

    @streams_answers
    def PushPull(self, request_iterator: Iterator[Frame[pb.PushPullRequest]], context: grpc.ServicerContext) -> Answers:
        with self._streams.open(context, self._access.caller(context)) as stream:
            for frame in request_iterator:
                with stream.exchange():
                    message, data = messages.require_head(frame, "exchange")
                    messages.check_exchange(message.exchange, data)
                    yield from self._exchange(stream, message.exchange, data, request_iterator)
                self._streams.refuse_if_draining()

    def _exchange(
        self, stream: OpenStream, exchange: pb.Exchange, data: memoryview, more: Iterator[Frame[pb.PushPullRequest]]
    ) -> Answers:
        chunks, pushes, wants = messages.chunks_of(more, data), exchange.HasField("gradient"), exchange.HasField("next")
        with self._buffers.loans(stream.caller.name) as borrowed:
            try:
                whole = len(data) >= exchange.gradient.payload_bytes
                engine, requester = self._introduced(stream, exchange.requester, nothing_follows=whole)
                layout = messages.delivery_layout(engine.manifest, exchange.next) if wants else None
                push = self._gradient(borrowed, stream, engine, exchange.gradient, chunks) if pushes else None
                wish = borrowed.place(layout, push.payload if push else None) if layout else None
                outcome = engine.exchange(requester, push, wish, lambda: stream.current)
            except Exception as error:
                self._count_refused(error, push=pushes, pull=wants)
                raise
            waiter = outcome.waiter
            try:
                result = self._result(stream, requester, outcome)
                together = exchange.next.takes_data and waiter is not None and waiter.delivery is not None
                if result is not None and not together:
                    yield Headed(pb.PushPullResponse(result=result))
                if waiter is not None:
                    yield from self._next_ticket(stream, engine, outcome, exchange.next, result if together else None)
                elif outcome.finished is not None:
                    yield _finished(engine)
            finally:
                # Before its buffer is lent to somebody else, nobody may write to it any more.
                if waiter is not None:
                    engine.withdraw(waiter)

    def _result(self, stream: OpenStream, requester: Requester, outcome: Outcome) -> pb.PushResult | None:
        if outcome.refusal is not None:
            self.count_refusal(outcome.refusal.reason)
            log_refusal(outcome.refusal, stream.peer, stream.caller.name)
            return messages.refused_result(requester.request, outcome.refusal)
        result = outcome.pushed.result
        return None if result is None else messages.push_result(result)

    def _next_ticket(
        self,
        stream: OpenStream,
        engine: Engine,
        outcome: Outcome,
        asked: pb.DeliveryRequest,
        result: pb.PushResult | None,
    ) -> Answers:
        """The delivery, with the exchange's result if that was not sent before."""
        try:
            delivery = _whole(self._waited(stream, engine, outcome), engine, asked)
        except Finished:
            engine.wait_durable()
            yield _finished(engine)
            return
        head = pb.PushPullResponse()
        messages.write_delivery(head.delivery, delivery, engine.manifest)
        if result is not None:
            head.delivery.result.CopyFrom(result)
        yield from self._sent(stream, engine, head, delivery, "PushPull", with_data=asked.takes_data)

    @answers
    def PushGradient(
        self, request_iterator: Iterator[Frame[pb.PushGradientRequest]], context: grpc.ServicerContext
    ) -> pb.PushGradientResponse:
        with self._streams.open(context, self._access.caller(context)) as stream:
            push = messages.first_of(request_iterator, "push").message.push
            chunks = messages.chunks_of(request_iterator)
            with stream.exchange(), self._buffers.loans(stream.caller.name) as borrowed:
                try:
                    engine, requester = self._introduced(stream, push.requester)
                    gradient = self._gradient(borrowed, stream, engine, push.gradient, chunks, "PushGradient")
                    outcome = engine.exchange(requester, gradient, None, lambda: stream.current)
                except Exception as error:
                    self._count_refused(error, push=True)
                    raise
        if outcome.refusal is not None:
            raise outcome.refusal
        assert outcome.pushed.result is not None
        return pb.PushGradientResponse(result=messages.push_result(outcome.pushed.result))

    @streams_answers
    def PullParams(
        self, request: pb.PullParamsRequest, context: grpc.ServicerContext
    ) -> Iterator[Frame[pb.PullParamsResponse]]:
        reader = not request.HasField("requester")
        with (
            self._streams.open(context, self._access.caller(context), reader=reader) as stream,
            stream.exchange(),
            self._pulled(stream, request) as (engine, pulled),
        ):
            head, delivery = pb.PullParamsResponse(), _whole(pulled, engine, request.delivery)
            messages.write_delivery(head.delivery, delivery, engine.manifest)
            yield from self._sent(stream, engine, head, delivery, "PullParams")

    @contextlib.contextmanager
    def _pulled(self, stream: OpenStream, request: pb.PullParamsRequest) -> Iterator[tuple[Engine, Delivery]]:
        with self._buffers.loans(stream.caller.name) as borrowed:
            try:
                outcome = None
                if request.HasField("requester"):
                    engine, requester = self._introduced(stream, request.requester)
                else:
                    engine = self._host.engine
                payload = borrowed.take(messages.delivery_layout(engine.manifest, request.delivery))
                if request.HasField("requester"):
                    outcome = engine.exchange(requester, None, payload, lambda: stream.current)
            except Exception as error:
                self._count_refused(error, pull=True)
                raise
            if outcome is None:
                known = request.newer_than if request.HasField("newer_than") else None
                delivery = engine.pull(payload, (known.epoch, known.number) if known else None)
                engine.wait_durable(delivery.position)
                yield engine, delivery
                return
            if outcome.waiter is None:
                raise Finished("the run is over: there are no more tickets")
            try:
                yield engine, self._waited(stream, engine, outcome)
            finally:
                engine.withdraw(outcome.waiter)

    def _waited(self, stream: OpenStream, engine: Engine, outcome: Outcome) -> Delivery:
        assert outcome.waiter is not None
        started, at_hand = time.perf_counter(), outcome.waiter.delivery
        try:
            delivery = at_hand or stream.wait(outcome.waiter)
        finally:
            self._metrics.traffic.stage["wait"].observe(time.perf_counter() - started)
        if at_hand is None or delivery.position > outcome.position:
            # Another exchange made it possible: that one's inputs must be safe, too, before anybody hears of it.
            engine.wait_durable(delivery.position)
        return delivery

    # What the methods share

    def count_refusal(self, reason: Reason) -> None:
        """Count what was refused, by reason."""
        self._metrics.traffic.refusals.labels(reason.value).inc()

    def name_of(self, context: grpc.ServicerContext) -> str:
        """Who calls, for the log; empty for nobody that is known."""
        try:
            return self._access.caller(context).name
        except OrmoError:
            return ""

    def _members_engine(self) -> Engine:
        # Workers of a server that was started again without its files have a model to offer, once they join: told to
        # come back later, as readers are, they would do so for ever.
        if not self._host.has_model:
            raise NotAMember("this server has no model yet, and so no members: join, and it will be asked for")
        return self._host.engine

    def _introduced(
        self, stream: OpenStream, message: pb.Requester, *, nothing_follows: bool = False
    ) -> tuple[Engine, Requester]:
        engine, requester = self._members_engine(), messages.requester(message)
        if nothing_follows and stream.serves(requester):
            engine.heard(requester.worker)  # the input itself is checked, and nothing is received in vain
        else:
            stream.caller.check_owns(requester.worker)
            engine.check_requester(requester)
            stream.introduce(requester)
        return engine, requester

    def _count_refused(self, error: Exception, *, push: bool = False, pull: bool = False) -> None:
        """Count what ends a call before a gradient is applied, or parameters are sent."""
        refusal = named(error)
        if isinstance(refusal, OrmoError) and push:
            self._metrics.traffic.push_refused(refusal.reason)
        if isinstance(refusal, OrmoError) and pull:
            self._metrics.traffic.pull_refused(refusal.reason)

    def _gradient(
        self,
        borrowed: Loans,
        stream: OpenStream,
        engine: Engine,
        header: pb.Gradient,
        chunks: Chunks,
        method: str = "PushPull",
    ) -> ReceivedGradient:
        """A gradient, received whole into a buffer that is given back with `borrowed`."""
        started = time.perf_counter()
        payload = borrowed.take(messages.gradient_layout(engine.manifest, header))
        assert stream.requester is not None
        receiver, finite = PayloadReceiver(payload), FiniteNorm(payload)
        for _ in self._received(stream, receiver, chunks, method):
            finite.arrived(receiver.received_bytes)
            engine.heard(stream.requester.worker)
        norm = finite.norm()
        self._metrics.traffic.stage["receive"].observe(time.perf_counter() - started - finite.seconds)
        self._metrics.traffic.stage["check"].observe(finite.seconds)
        return messages.push(header, payload, norm)

    def _received(self, stream: OpenStream, receiver: PayloadReceiver, chunks: Chunks, method: str) -> Iterator[None]:
        """Fill a payload; yields after each chunk."""
        counter = self._metrics.traffic.received_bytes[method]
        while not receiver.complete:
            chunk = next(chunks, None)
            if chunk is None:
                raise receiver.missing()
            receiver.accept(chunk)
            counter.inc(len(chunk.data))
            stream.moved()
            yield
        if method != "PushPull":  # which goes on with the next exchange
            for chunk in chunks:
                receiver.accept(chunk)  # refuses it: all is there

    def _sent(
        self, stream: OpenStream, engine: Engine, head: R, delivery: Delivery, method: str, *, with_data: bool = False
    ) -> Iterator[Frame[R]]:
        """The messages of a delivery."""
        started, counter = time.perf_counter(), self._metrics.traffic.sent_bytes[method]
        for frame in messages.frames_of(head, delivery, with_data=with_data):
            # Counted as it is handed over: a reader that has all it wants may never ask for the end.
            counter.inc(len(frame.data))
            yield frame
            stream.moved()
            if stream.requester is not None:
                engine.heard(stream.requester.worker)
        if delivery.payload is not None:
            self._metrics.traffic.stage["send"].observe(time.perf_counter() - started)


def _whole(delivery: Delivery, engine: Engine, asked: pb.DeliveryRequest) -> Delivery:
    """With the frozen tensors, if they were asked for: they never change, so nothing is to be copied under the lock."""
    return replace(delivery, frozen=engine.frozen) if asked.with_frozen else delivery


def _finished(engine: Engine) -> Headed[pb.PushPullResponse]:
    return Headed(pb.PushPullResponse(finished=pb.Finished(iteration=_iteration(engine))))


def _iteration(engine: Engine) -> pb.Iteration:
    epoch, number = engine.iteration()
    return pb.Iteration(epoch=epoch, number=number)


def _own(caller: Caller, text: str) -> str:
    """The worker id in a message, checked, and the caller's own."""
    worker = messages.worker_id(text)
    caller.check_owns(worker)
    return worker
