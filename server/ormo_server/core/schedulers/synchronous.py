"""Rounds: everybody computes at the same parameters, and the next round waits for the slowest of those who compute."""

from collections.abc import Iterator

import torch

from ormo_server.core import tickets
from ormo_server.core.keys import SlotKey
from ormo_server.core.schedulers.base import Scheduler
from ormo_server.core.state import State, Ticket


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

    def hand_out(self, state: State, now: float) -> Iterator[Ticket]:
        """See `Scheduler.hand_out`."""
        if not state.tickets:
            self._open_round(state, now)
        if state.round_params is None:
            return  # nobody can get a ticket of this round any more: whoever waits, waits for the next opening
        for slot in list(state.waiting):
            ticket = tickets.held(state, slot) or self._late_ticket(state, slot, now)
            if ticket is not None:
                del state.waiting[slot]
                ticket.delivered = True
                yield ticket
        tickets.drop_delivered_round(state)

    def _open_round(self, state: State, now: float) -> None:
        slots = [(worker, 0) for worker in state.members if self.waits_for_idle or not state.slot((worker, 0)).idle]
        if not slots:
            return
        # A round in which nothing was applied is no bucket: its number is used again.
        bucket = state.newest_bucket + 1 if state.iteration else 0
        params = torch.empty_like(state.params)
        state.rule.write_delivery(state.params, params, state.sending(max(1, state.live_slots)))
        first = state.next_ticket
        for slot in slots:
            tickets.hand_out(state, slot, bucket, now, delivered=False)
        state.round_params = params
        state.round_tickets = (0, 0) if self.waits_for_idle else (first, state.next_ticket)

    def _late_ticket(self, state: State, slot: SlotKey, now: float) -> Ticket | None:
        """One of the open round, for a slot that has not pushed in it; None if the round takes nobody in any more."""
        of_round, redeemed = tickets.to_come_in(state), state.slot(slot).redeemed
        if of_round is None or (redeemed is not None and redeemed[1] >= state.round_tickets[0]):
            return None
        return tickets.hand_out(state, slot, of_round.bucket, now, delivered=False, iteration=of_round.iteration)

    def count_applied(self, state: State, bucket_size: int) -> None:  # noqa: ARG002
        """See `Scheduler.count_applied`. The bucket is the number of the round."""
        state.issue = state.newest_bucket

    def counted_delay(self, delay: int) -> int:  # noqa: ARG002
        """See `Scheduler.counted_delay`. Gradients of one round are at the same parameters: none is late."""
        return 0

    def voids_held_ticket(self, ticket: Ticket) -> bool:
        """See `Scheduler.voids_held_ticket`."""
        return ticket.delivered
