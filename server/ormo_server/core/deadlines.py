"""Who has been silent for too long, and which tickets have been out for too long. Time is an argument.

These decide nothing by themselves: what they find, their driver feeds to the state machine as inputs, so that a replay
never has to ask a clock.
"""

from collections import deque
from statistics import median

from ormo_server.core.state import State, Ticket

# The automatic ticket timeout: a gradient that takes this many times longer than the median will not come any more.
TIMES_THE_MEDIAN = 20.0
SHORTEST_AUTOMATIC_SECONDS = 60.0
# Before anybody has pushed there is no median, and first steps are slow: kernels are compiled, data is fetched, caches
# are cold. Ten minutes is more than nearly all of them take, and little is lost either way: who is later loses that one
# gradient, and whoever is quicker has pushed by then, so that there is a median and no need to wait for this. With each
# lapse it doubles, so that steps that do take longer get their time, too.
FIRST_AUTOMATIC_SECONDS = 600.0
_REMEMBERED = 256


class Leases:
    """When each worker was last heard of.

    Attributes:
        lease_seconds: how long a worker may be silent.
    """

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._heard: dict[str, float] = {}

    def grant(self, worker: str, now: float) -> None:
        """The worker joined: its lease runs from now on."""
        self._heard[worker] = now

    def renew(self, worker: str, now: float) -> None:
        """Something came from the worker. Nothing happens if it has no lease."""
        if worker in self._heard:
            self._heard[worker] = now

    def forget(self, worker: str) -> None:
        """The worker is no member any more."""
        self._heard.pop(worker, None)

    def silent_seconds(self, worker: str, now: float) -> float:
        """How long nothing came from the worker; 0 for one that is not known."""
        return now - self._heard.get(worker, now)

    def expired(self, now: float) -> list[str]:
        """Workers that have been silent for longer than their lease."""
        return [worker for worker, heard in self._heard.items() if now - heard > self.lease_seconds]


class TicketTimeout:
    """How long a live worker may keep a ticket.

    Args:
        seconds: a fixed limit, above 0; None for none unless `automatic`.
        automatic: 20 times the median time from ticket to push, at least 60 s; 10 minutes before the first push.
    """

    def __init__(self, seconds: float | None, *, automatic: bool) -> None:
        self._seconds = seconds
        self._automatic = automatic
        self._first_seconds = FIRST_AUTOMATIC_SECONDS
        self._taken: deque[float] = deque(maxlen=_REMEMBERED)

    def redeemed(self, seconds: float) -> None:
        """A ticket was redeemed after this long."""
        self._taken.append(seconds)

    def lapsed(self) -> None:
        """Tickets ran out. If nobody has pushed yet, steps may just take longer than that."""
        self._first_seconds *= 2

    def limit_seconds(self) -> float | None:
        """The limit now; None for none."""
        if self._seconds is not None or not self._automatic:
            return self._seconds
        if not self._taken:
            return self._first_seconds
        return max(SHORTEST_AUTOMATIC_SECONDS, TIMES_THE_MEDIAN * median(self._taken))

    def overdue(self, state: State, now: float) -> list[Ticket]:
        """Tickets in flight that have been out for longer than the limit."""
        limit = self.limit_seconds()
        if limit is None:
            return []
        return [ticket for ticket in state.tickets.values() if now - ticket.handed_out_seconds > limit]
