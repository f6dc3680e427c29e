"""The communication schedulers by name: who gets a ticket when, and which bucket the ticket counts in.

A new one is a class and a row here.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from typing_extensions import override

from ormo_protos.limits import MAX_SLOTS
from ormo_server.core import members
from ormo_server.core.errors import BadRequest
from ormo_server.core.ids import SlotKey
from ormo_server.core.state import State, Ticket


class Scheduler(ABC):
    """A policy without a state of its own: all it goes by is in the `State`.

    Args:
        staleness_bound: s, for a policy that `takes_staleness_bound`.
        waits_for_idle: see `Run`; for a policy of rounds.

    Attributes:
        takes_fixed_bucket_size: whether K may be fixed.
        takes_staleness_bound: whether it goes by a bound on the delay.
        max_slots: in-flight places that a worker may have.
        others_wait: whether a worker that holds a ticket for long keeps others waiting.
        keeps_opening: whether it keeps the parameters of a round's opening, one vector more.
    """

    takes_fixed_bucket_size: ClassVar[bool] = True
    takes_staleness_bound: ClassVar[bool] = False
    max_slots: ClassVar[int] = MAX_SLOTS
    others_wait: ClassVar[bool] = False
    keeps_opening: ClassVar[bool] = False

    def __init__(self, staleness_bound: int | None = None, *, waits_for_idle: bool = False) -> None:
        self.staleness_bound = staleness_bound
        self.waits_for_idle = waits_for_idle

    @abstractmethod
    def hand_out(self, state: State, bucket_size: int, now: float) -> Iterator[Ticket]:
        """Deliver tickets to waiting slots, as far as the policy allows now; each is yielded as it is delivered.

        Args:
            state: that it goes by, and changes.
            bucket_size: K now, which is stamped on them; 0 where nobody will ask for it.
            now: seconds of the driver's clock.
        """

    @abstractmethod
    def count_applied(self, state: State, bucket_size: int) -> None:
        """A gradient was applied: move the bucket being issued."""

    def weight_in_mean(self, state: State, ticket: Ticket, bucket_size: int) -> float:  # noqa: ARG002
        """What a gradient counts where a bucket's mean is wanted: 1/K, by the larger of K now and at its hand-out.

        By K now alone, sixteen workers that leave one after the other with a last gradient would move the parameters by
        1/16 + 1/15 + … + 1 = 3.4 means; by K at hand-out alone, so would sixteen that come one after the other.
        """
        return 1.0 / max(ticket.bucket_size, bucket_size)

    def counted_delay(self, delay: int) -> int:
        """What step scale and discard see as the delay of a gradient."""
        return delay

    def voids_held_ticket(self, ticket: Ticket) -> bool:  # noqa: ARG002
        """Whether a new request of the ticket's slot makes it void."""
        return True

    def idle_slots(self, slots: int) -> int:
        """How many of so many slots can never be busy at the same time as the others, whatever their speed."""
        return 0 if self.staleness_bound is None else max(0, slots - 1 - self.staleness_bound)

    def idle_warning(self, slots: int) -> str:
        """One sentence about those of so many slots that are always idle; empty if none is."""
        idle = self.idle_slots(slots)
        if not idle:
            return ""
        return (
            f"a staleness bound of {self.staleness_bound} keeps {idle} of {slots} slots idle: set it to at least "
            f"{slots - 1} for all to be busy"
        )

    def check_slots(self, slots: int) -> None:
        """Refuse a worker with more slots than the policy can serve.

        Raises:
            BadRequest: fewer than 1, or more than `max_slots`.
        """
        if not 1 <= slots <= self.max_slots:
            raise BadRequest(f"{slots} slots were asked for: this run's scheduler serves 1 to {self.max_slots}")

    def _deliver_new(self, state: State, slot: SlotKey, bucket_size: int, now: float) -> Ticket:
        del state.waiting[slot]
        state.rule.ticket_handed_out(slot)
        return members.hand_out(state, slot, state.issue, bucket_size, now, delivered=True)


class CountedBuckets(Scheduler):
    """Buckets by the number of applied gradients: for a constant K the paper's ⌈ite / K⌉.

    Only applied gradients move the bucket being issued, so nobody who merely pulls can disturb the momentum.
    """

    @override
    def count_applied(self, state: State, bucket_size: int) -> None:
        if state.issue == 0 or state.filled >= bucket_size:
            state.issue += 1
            state.filled = 0
        state.filled += 1


class Synchronous(Scheduler):
    """A round begins with a set of tickets, one for every live worker that is not idle.

    It opens only if there is such a worker, and closes when each of its tickets is applied, returned or void. All of
    them carry the parameters of its opening; one that is not yet delivered answers the next request of its worker.

    Nobody can tell a worker that is idle from one that computes for long, but by the time limit of tickets: it ends one
    round for the idle one, and the rounds after that do without it until it asks. So that whoever joins waits for
    nobody, it comes into the open round, and so does whoever asks anew for a ticket that was lost. That makes the round
    longer, so it takes in only some once all tickets are gone that it began with: else processes that come and go, or
    many that come one after the other, would keep it open for ever.

    Every ticket in flight belongs to the open round, so the set needs no record of its own.
    """

    takes_fixed_bucket_size = False
    max_slots = 1
    others_wait = True
    keeps_opening = True

    @override
    def hand_out(self, state: State, bucket_size: int, now: float) -> Iterator[Ticket]:
        if not state.tickets:
            self._open_round(state, bucket_size, now)
        if state.round_params is None:
            return  # nobody can get a ticket of this round any more: whoever waits, waits for the next opening
        for slot in list(state.waiting):
            ticket = members.held(state, slot) or self._late_ticket(state, slot, bucket_size, now)
            if ticket is not None:
                del state.waiting[slot]
                ticket.delivered = True
                yield ticket
        members.drop_delivered_round(state)

    def _open_round(self, state: State, bucket_size: int, now: float) -> None:
        slots = [(worker, 0) for worker in state.members if self.waits_for_idle or not state.slot((worker, 0)).idle]
        if not slots:
            return
        # A round in which nothing was applied is no bucket: its number is used again.
        bucket = state.newest_bucket + 1 if state.iteration else 0
        params = torch.empty_like(state.params)
        state.rule.write_delivery(state.params, params, state.sending(max(1, state.live_slots)))
        first = state.next_ticket
        for slot in slots:
            members.hand_out(state, slot, bucket, len(slots) if bucket_size else 0, now, delivered=False)
        state.round_params = params
        state.round_tickets = (0, 0) if self.waits_for_idle else (first, state.next_ticket)

    def _late_ticket(self, state: State, slot: SlotKey, bucket_size: int, now: float) -> Ticket | None:
        """One of the open round, for a slot that has not pushed in it; None if the round takes nobody in any more."""
        of_round, redeemed = members.to_come_in(state), state.slot(slot).redeemed
        if of_round is None or (redeemed is not None and redeemed[1] >= state.round_tickets[0]):
            return None
        tickets = 1 + state.next_ticket - state.round_tickets[0] if bucket_size else 0
        return members.hand_out(
            state, slot, of_round.bucket, tickets, now, delivered=False, iteration=of_round.iteration
        )

    @override
    def weight_in_mean(self, state: State, ticket: Ticket, bucket_size: int) -> float:
        """By the tickets that the round has had: one that is lost counts as a gradient of 0."""
        first, end = state.round_tickets
        return 1.0 / max(1, ticket.bucket_size, state.next_ticket - first if end else 0)

    @override
    def count_applied(self, state: State, bucket_size: int) -> None:
        """The bucket is the number of the round."""
        state.issue = state.newest_bucket

    @override
    def counted_delay(self, delay: int) -> int:
        """Gradients of one round are at the same parameters: none is late."""
        return 0

    @override
    def voids_held_ticket(self, ticket: Ticket) -> bool:
        return ticket.delivered


class Asynchronous(CountedBuckets):
    """A ticket is handed out at once."""

    @override
    def hand_out(self, state: State, bucket_size: int, now: float) -> Iterator[Ticket]:
        while state.waiting:
            yield self._deliver_new(state, next(iter(state.waiting)), bucket_size, now)


class BoundedStaleness(CountedBuckets):
    """No applied gradient has a delay above s.

    A ticket is handed out, first come first served, if none is in flight or

        t − (smallest ite in flight) + (tickets in flight) ≤ s

    Each ticket in flight can move t by 1 at most before the oldest one's gradient comes, so that gradient's delay is at
    most t − ite + (others in flight) as it was when the last ticket was handed out. With s < K − 1 some slots are
    always idle.
    """

    takes_staleness_bound = True
    others_wait = True

    @override
    def hand_out(self, state: State, bucket_size: int, now: float) -> Iterator[Ticket]:
        while state.waiting and self._may_hand_out(state):
            yield self._deliver_new(state, next(iter(state.waiting)), bucket_size, now)

    def _may_hand_out(self, state: State) -> bool:
        if not state.tickets:
            return True
        assert self.staleness_bound is not None
        # In the order of handing out, so the first is the oldest.
        oldest = next(iter(state.tickets.values()))
        return state.iteration - oldest.iteration + len(state.tickets) <= self.staleness_bound


SCHEDULERS: dict[str, type[Scheduler]] = {
    "asynchronous": Asynchronous,
    "synchronous": Synchronous,
    "bounded-staleness": BoundedStaleness,
}
