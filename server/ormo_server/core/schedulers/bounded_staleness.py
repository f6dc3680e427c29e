"""Nobody gets further ahead of the slowest than a bound allows."""

from collections.abc import Iterator

from ormo_server.core.schedulers.base import CountedBuckets
from ormo_server.core.state import State, Ticket


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

    def hand_out(self, state: State, now: float) -> Iterator[Ticket]:
        """See `Scheduler.hand_out`."""
        while state.waiting and self._may_hand_out(state):
            yield self._deliver_new(state, next(iter(state.waiting)), state.issue, now)

    def _may_hand_out(self, state: State) -> bool:
        if not state.tickets:
            return True
        assert self.staleness_bound is not None
        # In the order of handing out, so the first is the oldest.
        oldest = next(iter(state.tickets.values()))
        return state.iteration - oldest.iteration + len(state.tickets) <= self.staleness_bound
