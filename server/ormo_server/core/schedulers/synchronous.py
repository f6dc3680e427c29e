"""Rounds: everybody computes at the same parameters, and the next round waits for the slowest."""

from collections.abc import Iterator

import torch

from ormo_server.core import tickets
from ormo_server.core.schedulers.base import Scheduler
from ormo_server.core.state import State, Ticket


class Synchronous(Scheduler):
    """A round is the set of tickets handed out at its opening, one to every live worker.

    It opens only if a worker lives, and closes when each of its tickets is applied, returned or void. All tickets of a
    round carry the parameters of its opening; one that is not yet delivered answers the next request of its worker. A
    worker that joins waits for the next opening. Every ticket in flight belongs to the open round, so the set needs no
    record of its own.
    """

    takes_fixed_bucket_size = False
    max_slots = 1
    others_wait = True
    keeps_opening = True

    def hand_out(self, state: State, now: float) -> Iterator[Ticket]:
        """See `Scheduler.hand_out`."""
        if not state.tickets and state.members:
            self._open_round(state, now)
        if state.round_params is None:
            return  # nothing is left to deliver: whoever waits, waits for the next opening
        for slot in list(state.waiting):
            ticket = tickets.held(state, slot)
            if ticket is not None:
                del state.waiting[slot]
                ticket.delivered = True
                yield ticket
        tickets.drop_delivered_round(state)

    def _open_round(self, state: State, now: float) -> None:
        # A round in which nothing was applied is no bucket: its number is used again.
        bucket = state.newest_bucket + 1 if state.iteration else 0
        params = torch.empty_like(state.params)
        state.rule.write_delivery(state.params, params, state.sending(max(1, state.live_slots)))
        for worker in state.members:
            tickets.hand_out(state, (worker, 0), bucket, now, delivered=False)
        state.round_params = params

    def count_applied(self, state: State, bucket_size: int) -> None:  # noqa: ARG002
        """See `Scheduler.count_applied`. The bucket is the number of the round."""
        state.issue = state.newest_bucket

    def counted_delay(self, delay: int) -> int:  # noqa: ARG002
        """See `Scheduler.counted_delay`. Gradients of one round are at the same parameters: none is late."""
        return 0

    def voids_held_ticket(self, ticket: Ticket) -> bool:
        """See `Scheduler.voids_held_ticket`."""
        return ticket.delivered
