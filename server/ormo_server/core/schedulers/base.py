"""What every scheduler decides: who gets a ticket when, and which bucket the ticket counts in."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from ormo_server.core import tickets
from ormo_server.core.errors import BadRequest
from ormo_server.core.keys import SlotKey
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
    max_slots: ClassVar[int] = 16
    others_wait: ClassVar[bool] = False
    keeps_opening: ClassVar[bool] = False

    def __init__(self, staleness_bound: int | None = None, *, waits_for_idle: bool = False) -> None:
        self.staleness_bound = staleness_bound
        self.waits_for_idle = waits_for_idle

    @abstractmethod
    def hand_out(self, state: State, now: float) -> Iterator[Ticket]:
        """Deliver tickets to waiting slots, as far as the policy allows now; each is yielded as it is delivered."""

    @abstractmethod
    def count_applied(self, state: State, bucket_size: int) -> None:
        """A gradient was applied: move the bucket being issued."""

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

    def _deliver_new(self, state: State, slot: SlotKey, bucket: int, now: float) -> Ticket:
        del state.waiting[slot]
        return tickets.hand_out(state, slot, bucket, now, delivered=True)


class CountedBuckets(Scheduler):
    """Buckets by the number of applied gradients: for a constant K the paper's ⌈ite / K⌉.

    Only applied gradients move the bucket being issued, so nobody who merely pulls can disturb the momentum.
    """

    def count_applied(self, state: State, bucket_size: int) -> None:
        """See `Scheduler.count_applied`."""
        if state.issue == 0 or state.filled >= bucket_size:
            state.issue += 1
            state.filled = 0
        state.filled += 1
