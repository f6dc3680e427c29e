"""The state of a run, as plain data, and the questions that can be asked of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ormo_server.core.ids import SlotKey, TicketKey
from ormo_server.core.pace import Pace
from ormo_server.core.rules import Sending, UpdateRule
from ormo_server.core.step_size import Tuning


@dataclass(slots=True)
class Ticket:
    """The right to push one gradient. Its key only identifies it.

    Attributes:
        epoch, number: the key.
        slot: who may redeem it.
        iteration: ite, the value of t when it was handed out.
        bucket: where its gradient will count; stamped when it is handed out, never recomputed.
        handed_out_seconds: when, by the clock that is passed in.
        bucket_size: K when it was handed out; under the synchronous scheduler the tickets of its round by then; 0 where
            a sum is wanted, or a checkpoint does not say.
        local_steps: how many its worker is to make for it, stamped when it is delivered; 0 in a run without.
        delivered: its parameters have been given to a request of its slot. Only the synchronous scheduler hands
            tickets out before they are asked for.
    """

    epoch: int
    number: int
    slot: SlotKey
    iteration: int
    bucket: int
    handed_out_seconds: float
    delivered: bool
    bucket_size: int = 0
    local_steps: int = 0

    @property
    def key(self) -> TicketKey:
        """(epoch, number)."""
        return (self.epoch, self.number)


@dataclass(frozen=True, slots=True)
class PushResult:
    """What became of a gradient.

    Attributes:
        request: the slot's request number that it answers.
        epoch, iteration: where the run was after it.
        delay: τ, gradients applied between the ticket's parameters and this gradient.
        lag_buckets: newest bucket less the gradient's, never negative.
        step_size: η times the step scale used; 0 if discarded.
        discarded: counted, not applied.
        repeated: an earlier result, given again to a retry.
        buffers_kept: a buffer that came with it had NaN or infinity, and the server's stayed as it was.
    """

    request: int
    epoch: int
    iteration: int
    delay: int
    lag_buckets: int
    step_size: float
    discarded: bool = False
    repeated: bool = False
    buffers_kept: bool = False


@dataclass(slots=True)
class Slot:
    """One in-flight place of a worker.

    Attributes:
        request: the highest request number that took effect; 0 before the first.
        ticket: the one that it holds.
        result: of its last redeemed ticket, kept until a new request confirms it.
        redeemed: that ticket; None before the first, or if a checkpoint of an earlier version does not say.
        ticket_seconds: how long its last redeemed ticket was out; None before the first.
        idle: its last ticket came back unused or ran out, and it has not asked since: rounds do without it.
    """

    request: int = 0
    ticket: TicketKey | None = None
    result: PushResult | None = None
    redeemed: TicketKey | None = None
    ticket_seconds: float | None = None
    idle: bool = False


@dataclass(slots=True)
class Member:
    """A live worker.

    Attributes:
        worker: its id.
        incarnation: which process of that id.
        rank: the smallest number that was free when it joined.
        data_seed: for its data order.
        slots: its in-flight places.
        pace: what its pushes showed of its speed; None before the first, and where nobody asks for it.
    """

    worker: str
    incarnation: int
    rank: int
    data_seed: int
    slots: list[Slot]
    pace: Pace | None = None


@dataclass(slots=True)
class Departed:
    """A process that has left or was taken for dead. It may come back, and try its last push again.

    Attributes:
        incarnation: which process of its worker id.
        slots: as it left them, without tickets; empty if a checkpoint of an earlier version does not say.
    """

    incarnation: int
    slots: list[Slot]


@dataclass(slots=True)
class State:
    """All that a checkpoint must hold, and nothing else.

    Attributes:
        params: w, shape (d,), float32.
        float_buffers: shape (f,), float32, such as running means.
        int_buffers: shape (i,), int64, such as counters, or the bits of float64.
        rule: the update rule with its vectors.
        epoch: of the server, for new tickets.
        learning_rate: η in force, set when the newest bucket opened.
        tuning: what the operator has set the learning rate to; None: it is as the settings say.
        iteration: t, gradients applied so far.
        samples: samples in them.
        newest_bucket: b, the newest bucket of any applied gradient.
        issue: the bucket being issued.
        filled: gradients applied since `issue` opened.
        next_ticket: number of the next ticket.
        joins: how often workers have joined so far.
        started: `min_workers` have been there once.
        finished: the end of the run was reached.
        members: live workers by id.
        live_slots: how many slots they have.
        tickets: those in flight, in the order in which they were handed out.
        waiting: slots that wait for a ticket, first come first; the values mean nothing.
        replaced: incarnations that a newer one replaced, oldest first; bounded.
        departed: the last process of each worker that has left or was taken for dead, oldest first; bounded.
        round_params: what all tickets of the open round carry, shape (d,); None once nobody can get one any more.
        round_tickets: numbers of those that the open round began with, from the first to before the second; (0, 0) as
            long as no round was opened that others may come into.
    """

    params: torch.Tensor
    float_buffers: torch.Tensor
    int_buffers: torch.Tensor
    rule: UpdateRule
    epoch: int
    learning_rate: float
    tuning: Tuning | None = None
    iteration: int = 0
    samples: int = 0
    newest_bucket: int = 0
    issue: int = 0
    filled: int = 0
    next_ticket: int = 1
    joins: int = 0
    started: bool = False
    finished: bool = False
    members: dict[str, Member] = field(default_factory=dict)
    live_slots: int = 0
    tickets: dict[TicketKey, Ticket] = field(default_factory=dict)
    waiting: dict[SlotKey, None] = field(default_factory=dict)
    replaced: dict[tuple[str, int], None] = field(default_factory=dict)
    departed: dict[str, Departed] = field(default_factory=dict)
    round_params: torch.Tensor | None = None
    round_tickets: tuple[int, int] = (0, 0)

    def slot(self, key: SlotKey) -> Slot:
        """The slot with this key; its worker must be a member."""
        worker, number = key
        return self.members[worker].slots[number]

    def tickets_of(self, member: Member) -> list[Ticket]:
        """Those that a worker holds."""
        return [self.tickets[slot.ticket] for slot in member.slots if slot.ticket is not None]

    def sending(self, bucket_size: int) -> Sending:
        """What a delivery now depends on."""
        return Sending(self.learning_rate, bucket_size)

    def seconds_of_slots(self, redeeming: Slot, seconds: float) -> Iterator[float]:
        """How long the last redeemed ticket of every live slot was out, of those that have redeemed one.

        Args:
            redeeming: the slot that redeems another one now.
            seconds: how long that was out.
        """
        for member in self.members.values():
            for slot in member.slots:
                if slot is redeeming:
                    yield seconds
                elif slot.ticket_seconds is not None:
                    yield slot.ticket_seconds
