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
from ormo_protos.parsing import Malformed
from ormo_protos.tensors import Chunk
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.logs import Fields, printable
from ormo_runtime.process import interrupted_safely
from ormo_worker.client.arguments import Identity, Stage
from ormo_worker.client.connection import Connection
from ormo_worker.client.membership import Membership
from ormo_worker.client.messages import Delivered, DeliveryReceiver, Gradient, Outgoing, PushPullFrame, Wire, malformed
from ormo_worker.client.protocol import Fate, SlotSession, Step
from ormo_worker.client.retries import BODY_LIMIT, CallEnded, TryAgain
from ormo_worker.errors import ProtocolBroken, Refused, RunFinished

_LOG = logging.getLogger(__name__)

# nginx ends a stream that it let begin where the client has sent 1 MiB. It counts the heads of messages, too, and not
# what gRPC still holds, while we count gradients as they are given to gRPC.
_CUT_BYTES, _HEADS_BYTES, _HELD_BYTES = 1 << 20, 1 << 18, 8 << 20
_CUTS_THAT_TELL = 3


@dataclass(frozen=True, slots=True)
class ExchangeOutcome:
    """What came of an exchange.

    Attributes:
        slot: number of the slot that made it.
        fate: what became of its gradient; None if it had none, and parameters alone were asked for.
        result: the server's word on the gradient; None if there was none, if it was refused, or if its result was
            lost with the end of the run.
        refusal: why the gradient was refused (NON_FINITE, NORM_TOO_LARGE, TICKET_UNKNOWN or FINISHED), with a
            sentence for people; None if it was not.
        delivered: the next parameters; None if none were wanted, or the run is over.
        finished: whether the run is over.
    """

    slot: int
    fate: Fate | None
    result: pb.PushResult | None
    refusal: pb.PushResult | None
    delivered: Delivered | None
    finished: bool


class Slot:
    """Holds at most one ticket, and carries out one exchange at a time.

    Not locked: each slot belongs to the one thread that calls `exchange`. What slots share is locked where it is kept,
    in `Membership` and `Connection`.

    Args:
        number: the slot's, from 0 up; the server counts requests for each slot on its own.
        connection: to the server, shared by the worker's slots.
        identity: the worker's.
        wire: the messages of the worker's model.
        membership: the worker's place in the run, shared by its slots.
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
        self._wanted = wire.wanted[False, False]
        self._cuts = 0  # streams in a row that ended as behind a proxy with a limit

    @property
    def holds_ticket(self) -> bool:
        """Whether the next exchange can have a gradient."""
        return self._session.ticket is not None

    @property
    def awaits_result(self) -> bool:
        """Whether the last exchange had a gradient, and was given up before its result was known."""
        return self._session.fate == "lost"

    @interrupted_safely
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
        self._stages = [] if gradient is None else [("compute", gradient.compute_seconds)]
        fate: Fate | None = None
        try:
            if self._membership.finished:  # a heartbeat has said so: the server would wait for nothing more
                self._session.on_finished()
                outcome = self._finished()
            else:
                outcome = self._connection.retry(partial(self._attempt, gradient), "exchanging with the server")
            fate = outcome.fate
        except BaseException:
            self._drop_stream()  # answers that are still to come belong to an exchange that nobody waits for
            fate = None if self.awaits_result else self._session.fate
            raise
        finally:
            # Once, when nobody waits for the next parameters any more: each figure costs about 1 µs.
            self._note(gradient, fate)
        return outcome

    def push_last(self, gradient: Gradient) -> ExchangeOutcome:
        """Push a gradient and want nothing more, in a program that is about to end: one attempt, whatever signal came.

        Only `Connection.close` ends it, in another thread.

        Args:
            gradient: as for `exchange`.

        Raises:
            OrmoError, CallEnded, TryAgain: it is not known to have arrived.
        """
        if not self._membership.lasts:
            raise TryAgain("the lease is over, and the ticket with it")
        self._session.begin(with_gradient=True, wants_next=False)
        self._stages = [("compute", gradient.compute_seconds)]
        fate: Fate | None = "lost"
        try:
            self.close()
            # A new stream, for the old one may have broken unnoticed; and one that `cancel_open` does not know of, for
            # there is no other attempt.
            self._stream = _Stream(self._connection)
            outcome = self._attempt(gradient)
            fate = outcome.fate
        finally:
            self._note(gradient, fate)
        return outcome

    def note_loaded(self, delivered: Delivered) -> None:
        """The caller has what came: if the frozen tensors did, what any slot asks for from now on needs none.

        Not noted when they arrive, in the slot's thread: until the caller's thread has come to load them, another
        slot's parameters must bring them, too, for theirs may be loaded first.
        """
        if delivered.payload.layout.frozen:
            self._membership.frozen_epoch = delivered.iteration.epoch

    def _note(self, gradient: Gradient | None, fate: Fate | None) -> None:
        local_steps = 0 if gradient is None else gradient.local_steps
        self._connection.observer.note_exchange(self._stages, fate, local_steps)

    def close(self) -> None:
        """Let the stream end; an exchange that is under way ends with the connection."""
        stream, self._stream = self._stream, None
        if stream is not None:
            self._connection.remove(stream)
            stream.half_close()

    def _attempt(self, gradient: Gradient | None) -> ExchangeOutcome:
        session = self._session
        try:
            joins = self._membership.ensure()
            if joins != self._joins:
                self._joins = joins
                session.on_joined(wants_frozen=self._membership.wants_frozen)
                self._drop_stream()  # a server that did not know the worker does not know its stream
            step = self._converse(gradient)
        except RunFinished:
            step = session.on_finished()
        except CallEnded as end:
            # The session decides: whether the gradient goes out once more depends on whether its result has come.
            self._note_cut(end)
            self._drop_stream()
            step = session.on_end(end.code, end.reason)
            if step is Step.JOIN:
                self._membership.lose(self._joins)  # this slot's join only: another slot may have joined again since
            if step in (Step.SEND_AGAIN, Step.PULL, Step.JOIN):
                raise TryAgain.after(end) from None
            if step is not Step.FINISHED:
                raise
        if _LOG.isEnabledFor(logging.DEBUG):
            self._log_result(session.ask.ticket, session.result)
        if step is Step.FINISHED:
            self.close()
            return self._finished()
        delivered = self._receiver.finish(self._joins) if session.ask.wants_next else None
        return ExchangeOutcome(self.number, session.fate, session.result, session.refusal, delivered, finished=False)

    def _converse(self, gradient: Gradient | None) -> Step:
        ask, membership = self._session.ask, self._membership
        if self._stream is None:
            self._stream = _Stream(self._connection)
            self._connection.add(self._stream)
        stream, self._since = self._stream, time.monotonic()
        self._wanted = self._wire.wanted[ask.wants_buffers, ask.wants_frozen]
        stream.count(0 if ask.ticket is None or gradient is None else gradient.payload.layout.total_bytes)
        stream.send(
            self._wire.exchange_messages(
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
            step = self._on_answer(stream.receive())
        if step is Step.FAIL:
            raise ProtocolBroken(
                f"the server answered request {ask.request} of slot {self.number} with what the protocol does not "
                "allow there: are server and worker of the same version?"
            )
        return step

    def _on_answer(self, answer: Frame[pb.PushPullResponse]) -> Step:
        if isinstance(answer, Chunk):
            return self._on_chunk(answer)
        if isinstance(answer, Malformed):
            raise malformed(answer)
        message, data = answer
        match message.WhichOneof("part"):
            case "result":
                return self._on_result(message.result)
            case "delivery":
                return self._on_delivery(message.delivery, data)
            case "finished":
                return self._session.on_finished()
            case _:
                return Step.FAIL

    def _on_result(self, result: pb.PushResult) -> Step:
        self._end_stage("push")
        if result.refusal:
            result.refusal, result.refusal_message = printable(result.refusal), printable(result.refusal_message)
        return self._session.on_result(result)

    def _on_delivery(self, delivery: pb.Delivery, data: memoryview) -> Step:
        if delivery.HasField("result"):  # in one message with the parameters: a hand-off between threads less
            step = self._on_result(delivery.result)
            if step is not Step.READ:
                return step
        self._end_stage("wait")
        self._receiver.begin(delivery, self._wanted)
        return self._on_chunk(Chunk(0, data)) if data else Step.READ

    def _on_chunk(self, chunk: Chunk) -> Step:
        if not self._receiver.accept(chunk):
            return Step.READ
        self._end_stage("pull")
        return self._session.on_delivery(self._receiver.ticket)

    def _log_result(self, ticket: pb.Ticket | None, result: pb.PushResult | None) -> None:
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

    def _end_stage(self, stage: Stage) -> None:
        now = time.monotonic()
        self._stages.append((stage, now - self._since))
        self._since = now

    def _finished(self) -> ExchangeOutcome:
        session = self._session
        return ExchangeOutcome(self.number, session.fate, session.result, session.refusal, None, finished=True)

    def _note_cut(self, end: CallEnded) -> None:
        """Find out whether a proxy cuts the streams, by how much they had sent.

        Raises:
            Refused: it does, and this gradient will never get through.
        """
        sent, largest = (0, 0) if self._stream is None else (self._stream.sent_bytes, self._stream.largest_bytes)
        cut = end.code == "INTERNAL" and not end.reason and _CUT_BYTES - _HEADS_BYTES <= sent <= _HELD_BYTES + largest
        self._cuts = self._cuts + 1 if cut else 0
        if self._cuts != _CUTS_THAT_TELL:
            return
        found = f"each stream ends when it has sent about {sent / 2**20:.1f} MiB ({end.message}): {BODY_LIMIT}"
        if sent == largest:  # one gradient is too much
            raise Refused(found) from None
        _LOG.warning("%s; until then each exchange may take several streams", found)

    def _drop_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            self._connection.remove(stream)
            stream.cancel()


class _Stream:
    """One open PushPull call, kept from exchange to exchange: opening one costs a round trip.

    Two threads meet here. The slot's thread puts in what each exchange sends, and reads the answers; a thread of
    gRPC's takes the messages out as fast as the network does, and waits in the queue between exchanges. A message with
    a chunk is a view of the gradient's payload: it is not copied before gRPC's thread has come to it, which is why the
    payload must not change until the exchange is over.

    Attributes:
        send: gives gRPC's thread the messages of one exchange; `None` ends the thread.
        sent_bytes: of all gradients that were given to it.
        largest_bytes: of one of them.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.sent_bytes = self.largest_bytes = 0
        exchanges: queue.SimpleQueue[Iterable[PushPullFrame] | None] = queue.SimpleQueue()
        self.send = exchanges.put
        # Until `None`: gRPC's thread waits in here for the next exchange.
        self._outgoing = Outgoing(chain.from_iterable(iter(exchanges.get, None)))
        with connection.errors_as_call_ended():
            self._call = connection.tensors.push_pull(iter(self._outgoing))

    def count(self, gradient_bytes: int) -> None:
        """Note how much the next exchange sends."""
        self.sent_bytes += gradient_bytes
        self.largest_bytes = max(self.largest_bytes, gradient_bytes)

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
            self._outgoing.check()  # before: what kept a message from being made ended the call, too, and is the cause
            raise end from None
        except ValueError:
            self._connection.check()  # gRPC's way to say that the channel is closed
            raise
        if answer is None:
            self._outgoing.check()
            raise CallEnded("OK", "", "the server ended the stream in the middle of an exchange")
        self._connection.mark_alive()
        return answer

    def half_close(self) -> None:
        """Say that no more exchanges will come."""
        self.send(None)

    def cancel(self) -> None:
        self.send(None)  # or gRPC's thread would wait in the queue for ever
        self._call.cancel()
