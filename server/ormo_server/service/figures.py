"""What people see of an engine's work: metrics, per-worker figures, log lines. All of it is told after the lock."""

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Self

from ormo_runtime.logs import Fields
from ormo_server.core.effects import NOTHING, Effects, Redeemed
from ormo_server.core.errors import BadRequest, Finished, OrmoError, TicketUnknown
from ormo_server.core.ids import TicketKey
from ormo_server.core.inputs import Requester
from ormo_server.core.members import PROCESSES_REMEMBERED
from ormo_server.core.schedulers import Scheduler
from ormo_server.core.state import Member, State, Ticket
from ormo_server.metrics import Metrics
from ormo_server.metrics.view import Evaluation, Observations, WorkerObservation
from ormo_server.service.admission import ReceivedGradient
from ormo_server.service.delivery import Waiter

_LOG = logging.getLogger(__name__)
_bad_gradients = logging.getLogger("ormo_server.bad_gradients")


@dataclass(slots=True)
class Outcome:
    """What an exchange led to. Parts that were not asked for are None.

    Attributes:
        requester: whose it was.
        received: the gradient that came.
        refusal: why the gradient was refused; the exchange goes on.
        waiter: for the ticket that was asked for.
        finished: instead of a ticket: the run is over.
        pushed, requested: what followed from the gradient, unless it was refused, and from the wish for a ticket.
        taken_at: when it came to the core, by the run's clock.
        lock_seconds: how long it waited for the lock; None if it did not get it.
        apply_seconds: how long the gradient took to be applied.
        position: of the journal, up to which it is as safe as it will be.
    """

    requester: Requester
    received: ReceivedGradient | None = None
    refusal: OrmoError | None = None
    waiter: Waiter | None = None
    finished: Finished | None = None
    pushed: Effects = NOTHING
    requested: Effects = NOTHING
    taken_at: float = 0.0
    lock_seconds: float | None = None
    apply_seconds: float = 0.0
    position: int = 0


class _Taken(NamedTuple):
    """What is told of a gradient that used its ticket up. No tensors: their memory is lent again meanwhile."""

    worker: str
    redeemed: Redeemed
    bucket_size: int
    learning_rate: float
    taken_at: float
    apply_seconds: float
    samples: int
    local_steps: int
    loss: float | None
    compute_seconds: float
    norm: float

    @classmethod
    def of(cls, outcome: Outcome, received: ReceivedGradient, redeemed: Redeemed) -> Self:
        assert received.norm is not None
        pushed = outcome.pushed
        return cls(
            outcome.requester.worker,
            redeemed,
            pushed.bucket_size,
            pushed.learning_rate,
            outcome.taken_at,
            outcome.apply_seconds,
            received.samples,
            received.local_steps,
            received.loss,
            received.compute_seconds,
            received.norm,
        )


# Few enough for nobody to wait long for whoever counts them.
_MOST_NOTED = 64


class Figures:
    """Counts and tells what happened.

    Args:
        metrics: what to count in.
        members: workers that are there already.

    Attributes:
        observations: of the run and its workers; to be read inside `settled`.
    """

    def __init__(self, metrics: Metrics, members: Iterable[str]) -> None:
        self.observations = Observations()
        self._metrics = metrics
        # Gradients come from many threads, and are counted by whoever looks, or finds many: one after the other, in a
        # loop, takes a third of what it takes in the middle of each exchange.
        self._noted: deque[_Taken] = deque()
        self._lock = threading.Lock()  # of what is counted; nobody waits for the engine's inside it
        self._idle_warning = ""
        self._lost: dict[TicketKey, None] = {}
        for worker in members:
            self.observations.joined(worker)

    def record(self, outcome: Outcome) -> None:
        """An exchange is over, as far as the core has to do with it."""
        if outcome.lock_seconds is None:
            return  # it never came to the core
        self._metrics.traffic.stage["lock"].note(outcome.lock_seconds)
        self.count((outcome.pushed, outcome.requested))
        if outcome.finished is not None:
            self._metrics.traffic.pull_refused(outcome.finished.reason)
        if outcome.received is None:
            return
        if outcome.refusal is not None:
            self._metrics.traffic.push_refused(outcome.refusal.reason)
            if isinstance(outcome.refusal, TicketUnknown):
                self._note_lost(outcome.requester.worker, outcome.received.ticket, outcome.received.local_steps)
        elif outcome.pushed.redeemed is not None:
            self._note_taken(outcome, outcome.received, outcome.pushed.redeemed)
        elif outcome.pushed.result is not None:
            self._metrics.traffic.repeated.note(1)
        if _LOG.isEnabledFor(logging.DEBUG):
            _tell(outcome, outcome.received)

    def count(self, effects: Iterable[Effects]) -> None:
        """Slots got what they waited for, or will not."""
        for each in effects:
            if each.granted:
                self._metrics.traffic.ticketed.note(len(each.granted))
            for released in each.released:
                self._metrics.traffic.pull_refused(released.error.reason)

    def joined(self, worker: str) -> None:
        """A worker is here from now on; what came before was another process's."""
        with self.settled() as observations:
            observations.joined(worker)

    def gone(self, worker: str) -> None:
        """A worker has left."""
        with self.settled() as observations:
            observations.gone(worker)

    @contextmanager
    def settled(self) -> Iterator[Observations]:
        """The observations, with all that has come in them, held still."""
        with self._lock:
            while self._noted:
                self._count_gradient(self._noted.popleft())
            yield self.observations

    def _note_taken(self, outcome: Outcome, received: ReceivedGradient, redeemed: Redeemed) -> None:
        self._noted.append(_Taken.of(outcome, received, redeemed))
        if len(self._noted) >= _MOST_NOTED:
            with self.settled():
                pass
        if redeemed.buffers_kept:
            _warn_of_kept_buffers(outcome.requester.worker, redeemed.iteration_after)

    def _count_gradient(self, taken: "_Taken") -> None:
        metrics, redeemed = self._metrics, taken.redeemed
        metrics.traffic.stage["apply"].note(taken.apply_seconds)
        ticket_seconds = taken.taken_at - redeemed.handed_out_seconds
        metrics.gradients.counted(redeemed.delay, redeemed.lag, taken.bucket_size, ticket_seconds)
        mine = self.observations.workers.get(taken.worker) or WorkerObservation()  # nobody's, if it has left meanwhile
        mine.counted(redeemed.delay, taken.taken_at, ticket_seconds, taken.compute_seconds)
        if redeemed.discarded:
            metrics.traffic.discarded.note(1)
            self.observations.discarded += 1
            return
        rate = taken.learning_rate
        scale = redeemed.step_size / rate if rate else None  # a schedule may end at 0: then no scale can be told
        mine.apply(taken.samples, taken.local_steps, taken.loss, taken.norm)
        self.observations.applied_with(redeemed.delay, redeemed.lag, scale)
        metrics.traffic.applied.note(1)
        metrics.gradients.applied(taken.samples, taken.local_steps, taken.norm, buffers_kept=redeemed.buffers_kept)
        if scale is not None:
            metrics.gradients.scaled(scale)

    def note_evaluation(self, state: State, evaluation: Evaluation) -> None:
        """An evaluation was reported. One of another epoch says nothing of this run as it is now.

        Raises:
            BadRequest: the run has not come so far.
        """
        if evaluation.epoch != state.epoch:
            return
        if evaluation.iteration > state.iteration:
            raise BadRequest(
                f"an evaluation of iteration {evaluation.iteration}, and the run is at {state.iteration}: report "
                "an iteration that was pulled"
            )
        self.observations.evaluated(evaluation)

    # Workers

    def warn_of_idle_slots(self, scheduler: Scheduler, slots: int) -> None:
        """Say once that some of the slots can never be busy."""
        warning = scheduler.idle_warning(slots)
        if warning and warning != self._idle_warning:
            _LOG.warning("%s", warning)
        self._idle_warning = warning

    def count_join(self, effects: Effects, held: Iterable[Ticket]) -> None:
        """A process asked to join, where another of the same worker may have held these tickets."""
        self.count([effects])
        if effects.changed:
            self._metrics.upkeep.joins.inc()
            self._note_void(held)

    def note_join(self, member: Member, iteration: int, bucket_size: int, caller: str) -> None:
        """A process has become a member. Nobody's name is that of a caller in this process."""
        about = Fields(
            worker=member.worker, incarnation=f"{member.incarnation:016x}", iteration=iteration, caller=caller
        )
        slots = f"{len(member.slots)} slot{'s' * (len(member.slots) != 1)}"
        said = "worker %s joined (rank %d, %s) from %r; K is %d"
        _LOG.info(said, member.worker, member.rank, slots, caller or "here", bucket_size, extra=about)

    def note_leave(self, worker: str, incarnation: int, iteration: int) -> None:
        """A worker has given up its lease."""
        about = Fields(worker=worker, incarnation=f"{incarnation:016x}", iteration=iteration)
        _LOG.info("worker %s left", worker, extra=about)

    def note_expired_lease(
        self, worker: str, lease_seconds: float, iteration: int, *, voided: Iterable[Ticket]
    ) -> None:
        """A worker has lost its lease, and with it its tickets."""
        self._metrics.upkeep.expired_workers.inc()
        about = Fields(worker=worker, iteration=iteration)
        _LOG.warning("worker %s was silent for %g s and lost its lease", worker, lease_seconds, extra=about)
        self._note_void(voided)

    def note_overdue_ticket(self, ticket: Ticket, iteration: int) -> None:
        """A ticket is void."""
        self._metrics.upkeep.expired_tickets.inc()
        worker, slot = ticket.slot
        about = Fields(worker=worker, slot=slot, ticket=ticket.number, iteration=iteration)
        _LOG.warning(
            "a ticket of worker %s was out for too long and is void; the worker stays a member, and nobody waits for "
            "it until it asks for another",
            worker,
            extra=about,
        )
        self._note_void([ticket])

    def _note_void(self, tickets: Iterable[Ticket]) -> None:
        """Nobody will ever know how much had been done for these."""
        for ticket in tickets:
            self._note_lost(ticket.slot[0], ticket.key, ticket.local_steps, "up to ")

    def _note_lost(self, worker: str, ticket: TicketKey, local_steps: int, known: str = "") -> None:
        """Count local steps whose ticket is void, once: they may still come, and come again."""
        with self._lock:
            if not local_steps or ticket in self._lost:
                return
            self._lost[ticket] = None
            if len(self._lost) > PROCESSES_REMEMBERED:
                del self._lost[next(iter(self._lost))]
        self._metrics.gradients.lost(local_steps)
        said = "worker %s has lost %s%d local steps: their ticket is void, and they can't count under another one"
        _LOG.warning(said, worker, known, local_steps, extra=Fields(worker=worker, ticket=ticket[1]))

    def note_sent_away(self, requester: Requester, seen: WorkerObservation) -> None:
        """A worker's gradients are unsound too often."""
        about = Fields(worker=requester.worker, incarnation=f"{requester.incarnation:016x}")
        said = "worker %s is sent away: %d of its gradients were refused, %.0f %% of the latest"
        _LOG.warning(said, requester.worker, seen.refused, 100 * seen.refused_share, extra=about)


def _tell(outcome: Outcome, received: ReceivedGradient) -> None:
    """What became of a gradient, of which there are many."""
    requester, result = outcome.requester, outcome.pushed.result
    about = Fields(
        worker=requester.worker,
        incarnation=f"{requester.incarnation:016x}",
        slot=requester.slot,
        request=requester.request,
        ticket=received.ticket[1],
        epoch=f"{received.ticket[0]:016x}",
        samples=received.samples,
        loss=received.loss,
    )
    if outcome.refusal is not None:
        about["reason"] = outcome.refusal.reason
        _LOG.debug("refused a gradient of worker %s: %s", requester.worker, outcome.refusal, extra=about)
    elif result is not None:
        about["iteration"], about["delay"] = result.iteration, result.delay
        about["lag_buckets"], about["step_size"] = result.lag_buckets, result.step_size
        what = "repeated the result of" if result.repeated else "discarded" if result.discarded else "applied"
        _LOG.debug("%s a gradient of worker %s with delay %d", what, requester.worker, result.delay, extra=about)


def _warn_of_kept_buffers(worker: str, iteration: int) -> None:
    said = (
        "worker %s sent buffers with NaN or infinity beside a gradient that counts: the server keeps its own and tells "
        "the worker, whose log names them"
    )
    _bad_gradients.warning(said, worker, extra=Fields(worker=worker, iteration=iteration))
