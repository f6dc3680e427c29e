"""Nobody waits for anybody."""

from collections.abc import Iterator

from ormo_server.core.schedulers.base import CountedBuckets
from ormo_server.core.state import State, Ticket


class Asynchronous(CountedBuckets):
    """A ticket is handed out at once."""

    def hand_out(self, state: State, now: float) -> Iterator[Ticket]:
        """See `Scheduler.hand_out`."""
        while state.waiting:
            yield self._deliver_new(state, next(iter(state.waiting)), state.issue, now)
