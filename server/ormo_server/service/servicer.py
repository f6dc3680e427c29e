"""The service: every method translates, and nothing more."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import grpc

from ormo_protos.framing import Frame, Headed
from ormo_protos.limits import MAX_CHUNK_BYTES
from ormo_protos.manifest import Manifest
from ormo_protos.refusals import Reason
from ormo_protos.tensors import Chunk, PayloadLayout, PayloadReceiver
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.core.errors import BadRequest, Finished, ManifestDigest, OrmoError, ProtocolVersion
from ormo_server.core.inputs import Requester
from ormo_server.security import Access, Caller
from ormo_server.service import messages
from ormo_server.service.admin import Controls, run_settings, status_of
from ormo_server.service.admission import WAIT_SECONDS, room_for
from ormo_server.service.delivery import Delivery
from ormo_server.service.engine import Engine
from ormo_server.service.figures import Outcome
from ormo_server.service.refusals import as_ormo_error, log_refusal, maps_errors, maps_stream_errors
from ormo_server.service.run import RunHost
from ormo_server.service.streams import OpenStream, StreamRegistry
from ormo_server.service.transfers import Transfers

# What a manifest may hold that is offered here; see ModelWanted.
MANIFEST_VERSION = 1

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
        self._transfers = Transfers(
            None if limit is None else int(limit), host.metrics.traffic, takes_int8=host.settings.local_steps > 0
        )

    # Members

    @maps_errors
    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinResponse:
        caller = self._access.caller(context)
        worker = _own(caller, request.worker)
        messages.check_version(request.protocol_version)
        most = self._host.settings.local_steps
        messages.check_local_steps(worker, makes_them=request.local_steps, local_steps=most)
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
                f"{request.slots} slots were asked for, and slots_per_worker is {limit}: raise it or ask for less"
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
                takes_int8=self._transfers.takes_int8,
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
                f"the model has {what}, and this worker's version does not support that: install the server's version "
                "of this package on it"
            )
        return manifest

    @maps_errors
    def Heartbeat(self, request: pb.HeartbeatRequest, context: grpc.ServicerContext) -> pb.HeartbeatResponse:
        worker = _own(self._access.caller(context), request.worker)
        engine = self._host.members_engine
        returned = [messages.ticket_key(ticket) for ticket in request.returned]
        engine.heartbeat(worker, request.incarnation, returned)
        return pb.HeartbeatResponse(iteration=_iteration(engine), finished=engine.finished.is_set())

    @maps_errors
    def Leave(self, request: pb.LeaveRequest, context: grpc.ServicerContext) -> pb.LeaveResponse:
        worker = _own(self._access.caller(context), request.worker)
        try:
            if self._host.has_model:
                self._host.engine.leave(worker, request.incarnation)
        finally:
            self._streams.end_worker(worker, request.incarnation)
        return pb.LeaveResponse()

    @maps_errors
    def ReportEvaluation(
        self,
        request: pb.ReportEvaluationRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.ReportEvaluationResponse:
        self._host.engine.note_evaluation(messages.evaluation(request.evaluation))
        return pb.ReportEvaluationResponse()

    @maps_errors
    def GetStatus(self, request: pb.GetStatusRequest, context: grpc.ServicerContext) -> pb.GetStatusResponse:  # noqa: ARG002
        return status_of(self._host, draining=self._streams.draining)

    @maps_errors
    def Control(self, request: pb.ControlRequest, context: grpc.ServicerContext) -> pb.ControlResponse:
        return self._controls.act(request, self._access.caller(context).name)

    # The model

    @maps_errors
    def OfferModel(
        self, request_iterator: Iterator[Frame[pb.OfferModelRequest]], context: grpc.ServicerContext
    ) -> pb.OfferModelResponse:
        with self._streams.open(context, self._access.caller(context)) as stream:
            self._host.refuse_second_model()  # before a manifest is waited for, and counted
            frames = stream.incoming(request_iterator)
            offer = messages.first_of(frames, "offer").message.offer
            worker = _own(stream.caller, offer.worker)
            try:
                with stream.busy:
                    return self._accept(stream, worker, offer, frames)
            except BaseException:
                self._host.offers.give_up(worker, offer.incarnation)
                raise

    def _accept(
        self, stream: OpenStream, worker: str, offer: pb.ModelOffer, frames: Iterator[Frame[pb.OfferModelRequest]]
    ) -> pb.OfferModelResponse:
        incarnation = offer.incarnation
        self._host.check_wanted(worker, incarnation)  # before a manifest is read, which may take a second
        manifest = Manifest.from_messages(self._read_manifest(offer, frames))
        manifest.check_names()
        layout = self._host.begin_offer(manifest)
        with self._transfers.in_flight.during(stream.caller.name, layout.total_bytes):
            payload = room_for(layout)
            self._transfers.receive(
                PayloadReceiver(payload),
                messages.chunks_of(frames),
                "OfferModel",
                lambda: self._host.offers.renew(worker, incarnation, self._host.clock()),
            )
            self._host.offers.renew(worker, incarnation, self._host.clock())
            stream.mark_received()
            epoch, number = self._host.accept_model(worker, incarnation, manifest, payload)
        return pb.OfferModelResponse(iteration=pb.Iteration(epoch=epoch, number=number))

    def _read_manifest(
        self, offer: pb.ModelOffer, frames: Iterator[Frame[pb.OfferModelRequest]]
    ) -> Iterator[pb.Manifest]:
        yield offer.manifest
        for frame in frames:
            part = messages.require_head(frame, "more").message.more
            self._host.offers.renew(offer.worker, offer.incarnation, self._host.clock())
            yield part

    @maps_stream_errors
    def DescribeModel(
        self,
        request: pb.DescribeModelRequest,  # noqa: ARG002
        context: grpc.ServicerContext,
    ) -> Iterator[pb.DescribeModelResponse]:
        with self._streams.open(context, self._access.caller(context), reader=True) as stream, stream.busy:
            for part in self._host.engine.manifest.to_messages():
                yield pb.DescribeModelResponse(manifest=part)
                stream.touch()

    # Exchanges

    @maps_stream_errors
    def PushPull(self, request_iterator: Iterator[Frame[pb.PushPullRequest]], context: grpc.ServicerContext) -> Answers:
        with self._streams.open(context, self._access.caller(context)) as stream:
            frames = stream.incoming(request_iterator)
            for frame in frames:
                with stream.busy:
                    message, data = messages.require_head(frame, "exchange")
                    messages.check_exchange(message.exchange, data)
                    whole = len(data) >= message.exchange.gradient.payload_bytes
                    chunks = messages.chunks_of(frames, data)
                    del frame, data  # a megabyte, for as long as the exchange goes on
                    yield from self._exchange(stream, message.exchange, chunks, whole=whole)
                self._streams.refuse_if_draining()

    def _exchange(self, stream: OpenStream, exchange: pb.Exchange, chunks: Iterator[Chunk], *, whole: bool) -> Answers:
        pushes, wants = exchange.HasField("gradient"), exchange.HasField("next")
        with self._transfers.lend(stream.caller.name) as borrowed:
            try:
                engine, requester = self._introduce(stream, exchange.requester, nothing_follows=whole)
                layout = _layout_of(exchange.next, engine) if wants else None
                received = None
                if pushes:
                    received = self._transfers.receive_gradient(borrowed, engine, exchange.gradient, chunks)
                wish = borrowed.place(layout, received.payload if received else None) if layout else None
                outcome = engine.exchange(requester, received, wish, lambda: stream.current)
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
            delivery = _with_frozen(self._wait_for_delivery(stream, engine, outcome), engine, asked)
        except Finished:
            engine.wait_durable()
            return iter((_finished(engine),))
        head = pb.PushPullResponse()
        messages.write_delivery(head.delivery, delivery, engine.manifest)
        if result is not None:
            head.delivery.result.CopyFrom(result)
        return self._transfers.send(stream, head, delivery, "PushPull", with_data=asked.takes_data)

    @maps_errors
    def PushGradient(
        self, request_iterator: Iterator[Frame[pb.PushGradientRequest]], context: grpc.ServicerContext
    ) -> pb.PushGradientResponse:
        with self._streams.open(context, self._access.caller(context)) as stream:
            frames = stream.incoming(request_iterator)
            push = messages.first_of(frames, "push").message.push
            chunks = messages.chunks_of(frames)
            with stream.busy, self._transfers.lend(stream.caller.name) as borrowed:
                try:
                    engine, requester = self._introduce(stream, push.requester)
                    received = self._transfers.receive_gradient(borrowed, engine, push.gradient, chunks, "PushGradient")
                    outcome = engine.exchange(requester, received, None, lambda: stream.current)
                except Exception as error:
                    self._count_refused(error, push=True)
                    raise
        if outcome.refusal is not None:
            raise outcome.refusal
        assert outcome.pushed.result is not None
        return pb.PushGradientResponse(result=messages.push_result(outcome.pushed.result))

    @maps_stream_errors
    def PullParams(
        self, request: pb.PullParamsRequest, context: grpc.ServicerContext
    ) -> Iterator[Frame[pb.PullParamsResponse]]:
        reader = not request.HasField("requester")
        with (
            self._streams.open(context, self._access.caller(context), reader=reader) as stream,
            stream.busy,
            self._pulled(stream, request) as (engine, pulled),
        ):
            head, delivery = pb.PullParamsResponse(), _with_frozen(pulled, engine, request.delivery)
            messages.write_delivery(head.delivery, delivery, engine.manifest)
            yield from self._transfers.send(stream, head, delivery, "PullParams")

    @contextlib.contextmanager
    def _pulled(self, stream: OpenStream, request: pb.PullParamsRequest) -> Iterator[tuple[Engine, Delivery]]:
        with self._transfers.lend(stream.caller.name) as borrowed:
            try:
                outcome = None
                if request.HasField("requester"):
                    engine, requester = self._introduce(stream, request.requester)
                else:
                    engine = self._host.engine
                payload = borrowed.take(_layout_of(request.delivery, engine))
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
                yield engine, self._wait_for_delivery(stream, engine, outcome)
            finally:
                engine.withdraw(outcome.waiter)

    def _wait_for_delivery(self, stream: OpenStream, engine: Engine, outcome: Outcome) -> Delivery:
        assert outcome.waiter is not None
        started, at_hand = time.perf_counter(), outcome.waiter.delivery
        try:
            delivery = at_hand or stream.wait(outcome.waiter)
        finally:
            self._metrics.traffic.stage["wait"].note(time.perf_counter() - started)
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

    def _introduce(
        self, stream: OpenStream, message: pb.Requester, *, nothing_follows: bool = False
    ) -> tuple[Engine, Requester]:
        """Whose exchange it is, checked before its tensors come: what would be refused then is refused now.

        Args:
            stream: that brought the message.
            message: who asks.
            nothing_follows: all of the exchange is here, so that nothing is received in vain: where the stream is known
                to be this slot's, the check of the input itself is enough.
        """
        engine = self._host.members_engine
        requester = Requester(message.worker, message.incarnation, message.slot, message.request)
        if not (nothing_follows and stream.serves(requester)):
            messages.check_worker_id(requester.worker)
            stream.caller.check_owns(requester.worker)
            engine.check_requester(requester)
            stream.introduce(requester, engine.renew_lease)
        return engine, requester

    def _count_refused(self, error: Exception, *, push: bool = False, pull: bool = False) -> None:
        """Count what ends a call before a gradient is applied, or parameters are sent."""
        refusal = as_ormo_error(error)
        if isinstance(refusal, OrmoError) and push:
            self._metrics.traffic.push_refused(refusal.reason)
        if isinstance(refusal, OrmoError) and pull:
            self._metrics.traffic.pull_refused(refusal.reason)


def _layout_of(asked: pb.DeliveryRequest, engine: Engine) -> PayloadLayout:
    """How the parameters are wanted, but for frozen tensors, which are sent from where they are."""
    return PayloadLayout.of(engine.manifest, asked.dtype, with_buffers=asked.with_buffers)


def _with_frozen(delivery: Delivery, engine: Engine, asked: pb.DeliveryRequest) -> Delivery:
    """With the frozen tensors, if they were asked for: they never change, so nothing is to be copied under the lock."""
    return replace(delivery, frozen=engine.frozen) if asked.with_frozen else delivery


def _finished(engine: Engine) -> Headed[pb.PushPullResponse]:
    return Headed(pb.PushPullResponse(finished=pb.Finished(iteration=_iteration(engine))))


def _iteration(engine: Engine) -> pb.Iteration:
    epoch, number = engine.iteration()
    return pb.Iteration(epoch=epoch, number=number)


def _own(caller: Caller, text: str) -> str:
    """The worker id in a message, checked, and the caller's own."""
    messages.check_worker_id(text)
    caller.check_owns(text)
    return text
