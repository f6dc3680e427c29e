"""What a slot does next, given what happened: the rules of an exchange, without I/O, clocks or threads.

A shell (`slot.py`, a test, a simulation) sends what `SlotSession.ask` describes, reports each event and does
the `Step` that it is told. Gradients and parameters pass by outside.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from ormo_protos.refusals import UNSOUND_GRADIENT, Reason
from ormo_protos.v1 import parameter_server_pb2 as pb

# What became of a gradient that a slot was given; lost is one whose result was, with the connection or the server.
Fate = Literal["applied", "discarded", "refused", "lost"]


class Step(Enum):
    """What to do next."""

    READ = "read the next answer"
    DONE = "the exchange is complete"
    SEND_AGAIN = "send the same request again, on a new stream, after a pause"
    PULL = "send the new request, which has no gradient, on a new stream"
    JOIN = "join again, then send the same request again"
    FINISHED = "the run is over"
    REPLACED = "stop: a newer process has this worker's place"
    FAIL = "give up with an error"


@dataclass(frozen=True, slots=True)
class Ask:
    """What an exchange sends.

    Attributes:
        request: number of the exchange in its slot; a retry has the same.
        ticket: the right to push the gradient that goes along; None for no gradient.
        wants_next: whether it asks for the next ticket and its parameters.
        wants_buffers: whether these come with the model's buffers.
        wants_frozen: whether they come with its frozen tensors.
    """

    request: int
    ticket: pb.Ticket | None
    wants_next: bool
    wants_buffers: bool
    wants_frozen: bool


# By reason, for calls that the server ended; its words are exact, so they go before the status code.
AFTER_REASON: dict[str, Step] = {reason: Step[reason.then.name] for reason in Reason}

# Without a reason the connection, a proxy or gRPC itself ended the call. These would do so every time.
HOPELESS_CODES = frozenset(
    {
        "ALREADY_EXISTS",
        "DATA_LOSS",
        "FAILED_PRECONDITION",
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "OUT_OF_RANGE",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",  # gRPC's own: a message larger than it lets through
        "UNAUTHENTICATED",
        "UNIMPLEMENTED",
    }
)


def step_after(code: str, reason: str) -> Step:
    """What a call that ended with this status code and reason (empty for none) leads to, in any RPC."""
    if reason in AFTER_REASON:
        return AFTER_REASON[reason]
    return Step.FAIL if code in HOPELESS_CODES else Step.SEND_AGAIN


class SlotSession:
    """One slot's side of the protocol: request numbers, the ticket it holds and the exchange in hand.

    Attributes:
        ask: what to send now: the exchange in hand, or what became of it.
        ticket: the one that came with the last parameters; None if the next exchange can have no gradient.
        result: the server's word on this exchange's gradient, once it came; None if there was none, or it was refused.
        refusal: the server's word on a gradient that it refused, once it came.
        fate: what became of this exchange's gradient, lost until its result came; None if there was none.
    """

    def __init__(self) -> None:
        self.fate: Fate | None = None
        self.ticket: pb.Ticket | None = None
        self.result: pb.PushResult | None = None
        self.refusal: pb.PushResult | None = None
        self.ask = Ask(request=0, ticket=None, wants_next=False, wants_buffers=False, wants_frozen=False)
        self._wants_buffers = self._wants_frozen = True
        self._awaits_result = False  # the exchange has a gradient whose result is still to come

    def begin(self, *, with_gradient: bool, wants_next: bool) -> Ask:
        """Start an exchange; one that was given up earlier is forgotten.

        Raises:
            ValueError: there is no ticket for a gradient, or nothing is given and nothing wanted.
        """
        if with_gradient and self.ticket is None:
            raise ValueError("this slot holds no ticket, so it can't push: pull first (an exchange without gradient)")
        if not with_gradient and not wants_next:
            raise ValueError("an exchange without a gradient must want a ticket")
        self.result = self.refusal = None
        self.fate = "lost" if with_gradient else None
        self._awaits_result = with_gradient
        self.ask = self._asking(self.ask.request + 1, self.ticket if with_gradient else None, wants_next=wants_next)
        return self.ask

    def on_result(self, result: pb.PushResult) -> Step:
        """The gradient was applied or refused; parameters follow if they were wanted."""
        if result.request != self.ask.request or not self._awaits_result:
            return Step.FAIL
        self._awaits_result = False
        if result.refusal:
            self.refusal, self.fate = result, "refused"
            if result.refusal == Reason.FINISHED:
                return self.on_finished()
        else:
            self.result, self.fate = result, "discarded" if result.discarded else "applied"
            self._wants_buffers |= result.buffers_kept
        if not self.ask.wants_next:
            self.ticket = self.ticket if result.refusal in UNSOUND_GRADIENT else None
            return Step.DONE
        return Step.READ

    def on_delivery(self, ticket: pb.Ticket | None) -> Step:
        """The next ticket is here and all bytes of its parameters."""
        if ticket is None or not self.ask.wants_next or self._awaits_result:
            return Step.FAIL
        self.ticket = ticket
        # From now on the worker keeps its own, but for those that the server did not take. It may have said so after
        # it was asked for these parameters, which then came without.
        self._wants_buffers, self._wants_frozen = self._wants_buffers and not self.ask.wants_buffers, False
        return Step.DONE

    def on_finished(self) -> Step:
        """The run is over: by a message on the stream, or known from elsewhere."""
        self.ticket = None
        return Step.FINISHED

    def on_end(self, code: str, reason: str) -> Step:
        """The stream ended with this status: by the server, the network or a time limit, not by us.

        Args:
            code: the status code's name; "OK" for a stream that the server ended in mid-exchange.
            reason: as in `ormo_protos.refusals`; empty for none.
        """
        step = step_after(code, reason)
        if step is Step.FINISHED:
            return self.on_finished()
        has_result = self.ask.ticket is not None and not self._awaits_result
        if step is Step.PULL or (has_result and step in (Step.SEND_AGAIN, Step.JOIN)):
            # The gradient is applied or lost; what is missing are the parameters.
            self._awaits_result = False
            self.ask = self._asking(self.ask.request + 1, None, wants_next=True)
            return Step.JOIN if step is Step.JOIN else Step.PULL
        return step

    def on_joined(self, *, wants_frozen: bool = True) -> None:
        """The worker has joined, or joined again; the exchange in hand stays as it is.

        Args:
            wants_frozen: no other slot has got the frozen tensors of this server.
        """
        self._wants_buffers, self._wants_frozen = True, wants_frozen
        self.ask = self._asking(self.ask.request, self.ask.ticket, wants_next=self.ask.wants_next)

    def _asking(self, request: int, ticket: pb.Ticket | None, *, wants_next: bool) -> Ask:
        return Ask(request, ticket, wants_next, wants_next and self._wants_buffers, wants_next and self._wants_frozen)
