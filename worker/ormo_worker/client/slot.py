"""One of a worker's in-flight places: exchanges a gradient for the next parameters, whatever happens meanwhile."""

import logging
import queue
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import grpc

from ormo_protos.framing import Frame
from ormo_protos.tensors import Chunk
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.logs import Fields, printable
from ormo_worker.client.arguments import Identity, Stage
from ormo_worker.client.connection import Connection
from ormo_worker.client.membership import Membership
from ormo_worker.client.messages import Delivered, DeliveryReceiver, Gradient, Outgoing, PushPullFrame, Wire, understood
from ormo_worker.client.protocol import SlotSession, Step
from ormo_worker.client.retries import CallEnded, TryAgain
from ormo_worker.errors import ProtocolBroken, RunFinished

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExchangeOutcome:
    """What came of an exchange.

    Attributes:
        result: of the gradient; None if there was none, if it was refused, or if its result was lost with
            the end of the run.
        refusal: why the gradient was refused (NON_FINITE, NORM_TOO_LARGE, TICKET_UNKNOWN or FINISHED), with a
            sentence for people; None if it was not.
        delivered: the next parameters; None if none were wanted, or the run is over.
        finished: whether the run is over.
    """

    result: pb.PushResult | None
    refusal: pb.PushResult | None
    delivered: Delivered | None
    finished: bool


class Slot:
    """Holds at most one ticket, and carries out one exchange at a time; for one thread.

    Args:
        number: from 0 up.
        connection: to the server.
        identity: of the worker.
        wire: of its model.
        membership: of the worker, shared by its slots.
    """

    def __init__(
        self, number: int, connection: Connection, identity: Identity, wire: Wire, membership: Membership
    ) -> None:
        self.number = number
        self._connection = connection
        self._identity = identity
        self._wire = wire
        self._membership = membership
        self._session = SlotSession()
        self._receiver = DeliveryReceiver(wire)
        self._stream: _Stream | None = None
        self._joins = 0
        self._since = 0.0
        self._stages: list[tuple[Stage, float]] = []
        self._wanted = pb.DeliveryRequest()

    @property
    def holds_ticket(self) -> bool:
        """Whether the next exchange can have a gradient."""
        return self._session.ticket is not None

    def exchange(self, gradient: Gradient | None, *, wants_next: bool = True) -> ExchangeOutcome:
        """Push a gradient, or nothing, and wait for its result and the next parameters.

        Connections that break, servers that restart and memberships that run out are mended on the way.

        Args:
            gradient: computed at the parameters last delivered; its payload is free again afterwards.
            wants_next: whether to ask for the next ticket and its parameters.

        Raises:
            ValueError: a gradient without a ticket, or neither a gradient nor a wish.
            OrmoError: what waiting and trying again can't mend; the exchange is given up.
        """
        self._session.begin(with_gradient=gradient is not None, wants_next=wants_next)
        if self._membership.finished:
            self._session.on_finished()
            return self._finished()
        try:
            return self._connection.retrying(partial(self._attempt, gradient), "exchanging with the server")
        except BaseException:
            self._drop_stream()  # answers that are still to come belong to an exchange that nobody waits for
            raise
        finally:
            # Once, when nobody waits for the next parameters any more: each figure costs about 1 µs.
            self._connection.observer.stages(self._stages)
            self._stages.clear()

    def taken(self, outcome: ExchangeOutcome) -> None:
        """The caller has what came: if the frozen tensors did, what any slot asks for from now on needs none."""
        if outcome.delivered is not None and outcome.delivered.payload.layout.frozen:
            self._membership.frozen_epoch = outcome.delivered.iteration.epoch

    def close(self) -> None:
        """Let the stream end; an exchange that is under way ends with the connection."""
        stream, self._stream = self._stream, None
        if stream is not None:
            self._connection.remove(stream)
            stream.half_close()

    def _attempt(self, gradient: Gradient | None) -> ExchangeOutcome:
        try:
            joins = self._membership.ensure()
            if joins != self._joins:
                self._joins = joins
                self._session.on_joined(wants_frozen=self._membership.wants_frozen)
                self._drop_stream()  # a server that did not know the worker does not know its stream
            step = self._converse(gradient)
        except RunFinished:
            step = self._session.on_finished()
        except CallEnded as end:
            self._drop_stream()
            step = self._session.on_end(end.code, end.reason)
            if step is Step.JOIN:
                self._membership.lose(self._joins)
            if step in (Step.SEND_AGAIN, Step.PULL, Step.JOIN):
                raise TryAgain.after(end) from None
            if step is not Step.FINISHED:
                raise
        if _LOG.isEnabledFor(logging.DEBUG):
            self._tell(self._session.ask.ticket, self._session.result)
        if step is Step.FINISHED:
            self.close()
            return self._finished()
        delivered = self._receiver.delivered(self._joins) if self._session.ask.wants_next else None
        return ExchangeOutcome(self._session.result, self._session.refusal, delivered, finished=False)

    def _converse(self, gradient: Gradient | None) -> Step:
        ask, membership = self._session.ask, self._membership
        if self._stream is None:
            self._stream = _Stream(self._connection)
            self._connection.add(self._stream)
        stream, self._since = self._stream, time.monotonic()
        self._wanted = self._wire.delivery_request(with_buffers=ask.wants_buffers, with_frozen=ask.wants_frozen)
        stream.send(
            self._wire.exchange(
                self._identity,
                self.number,
                ask,
                self._wanted,
                gradient,
                digest=membership.digest,
                with_data=membership.server_takes_data,
            )
        )
        step = Step.READ
        while step is Step.READ:
            step = self._take(stream.receive())
        if step is Step.FAIL:
            raise ProtocolBroken(
                f"the server answered request {ask.request} of slot {self.number} with what the protocol does not "
                "allow there: are server and worker of the same version?"
            )
        return step

    def _take(self, answer: Frame[pb.PushPullResponse]) -> Step:
        if isinstance(answer, Chunk):
            return self._take_chunk(answer)
        message, data = understood(answer)
        match message.WhichOneof("part"):
            case "result":
                return self._take_result(message.result)
            case "delivery":
                return self._take_delivery(message.delivery, data)
            case "finished":
                return self._session.on_finished()
            case _:
                return Step.FAIL

    def _take_result(self, result: pb.PushResult) -> Step:
        self._over("push")
        if result.refusal:
            result.refusal, result.refusal_message = printable(result.refusal), printable(result.refusal_message)
        return self._session.on_result(result)

    def _take_delivery(self, delivery: pb.Delivery, data: memoryview) -> Step:
        if delivery.HasField("result"):
            step = self._take_result(delivery.result)
            if step is not Step.READ:
                return step
        self._over("wait")
        self._receiver.begin(delivery, self._wanted)
        return self._take_chunk(Chunk(0, data)) if data else Step.READ

    def _take_chunk(self, chunk: Chunk) -> Step:
        if not self._receiver.accept(chunk):
            return Step.READ
        self._over("pull")
        return self._session.on_delivery(self._receiver.ticket)

    def _tell(self, ticket: pb.Ticket | None, result: pb.PushResult | None) -> None:
        if ticket is None or result is None:
            return
        about = Fields(
            worker=self._identity.worker,
            slot=self.number,
            request=result.request,
            ticket=ticket.number,
            iteration=result.iteration.number,
            delay=result.delay,
            lag_buckets=result.lag_buckets,
        )
        _LOG.debug("a gradient was counted with delay %d", result.delay, extra=about)

    def _over(self, stage: Stage) -> None:
        now = time.monotonic()
        self._stages.append((stage, now - self._since))
        self._since = now

    def _finished(self) -> ExchangeOutcome:
        return ExchangeOutcome(self._session.result, self._session.refusal, None, finished=True)

    def _drop_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            self._connection.remove(stream)
            stream.cancel()


class _Stream:
    """One open PushPull call. A thread of gRPC's takes the requests from here as fast as they can be sent."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._exchanges: queue.SimpleQueue[Iterable[PushPullFrame] | None] = queue.SimpleQueue()
        # Until `None`: gRPC's thread waits in here for the next exchange.
        self._outgoing = Outgoing(chain.from_iterable(iter(self._exchanges.get, None)))
        with connection.watched():
            self._call = connection.tensors.push_pull(iter(self._outgoing))

    def send(self, requests: Iterable[PushPullFrame]) -> None:
        self._exchanges.put(requests)

    def receive(self) -> Frame[pb.PushPullResponse]:
        """The next answer.

        Raises:
            CallEnded: there is none.
            Exception: what kept a request from being sent.
        """
        try:
            answer = next(self._call, None)
        except grpc.RpcError as error:
            end = self._connection.end_of(error)
            self._outgoing.check()
            raise end from None
        except ValueError:
            self._connection.check()  # gRPC's way to say that the channel is closed
            raise
        if answer is None:
            self._outgoing.check()
            raise CallEnded("OK", "", "the server ended the stream in the middle of an exchange")
        self._connection.heard()
        return answer

    def half_close(self) -> None:
        """Say that no more exchanges will come."""
        self._exchanges.put(None)

    def cancel(self) -> None:
        self._exchanges.put(None)  # or gRPC's thread would wait for ever
        self._call.cancel()
