"""The engine: owns the one lock, gives the core its inputs one after the other, and hands on what follows.

The lock is never held across a network or disk wait: gradients are in memory before it is taken, deliveries are
copied under it and sent after it, checkpoints are copied under it and written after it.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from ormo_protos.manifest import Manifest
from ormo_protos.tensors import CHUNK_BYTES, Payload
from ormo_server.core import membership
from ormo_server.core.blocks import all_finite
from ormo_server.core.deadlines import Leases, TicketTimeout
from ormo_server.core.errors import BadRequest, Finished, NonFinite, NormTooLarge, NotReady, OrmoError, TicketUnknown
from ormo_server.core.events import Granted, superseded
from ormo_server.core.inputs import Gradient, Input, Requester
from ormo_server.core.keys import SlotKey, TicketKey
from ormo_server.core.snapshot import Snapshot, take
from ormo_server.core.state import Member, PushResult, Ticket
from ormo_server.core.state_machine import StateMachine
from ormo_server.journal import Journal, NoJournal, StoredGradient
from ormo_server.metrics import Metrics
from ormo_server.service import reports
from ormo_server.service.copies import Copies
from ormo_server.service.delivery import Delivery, Waiter
from ormo_server.service.exchange import Outcome
from ormo_server.service.gradients import Push, non_finite
from ormo_server.service.inputs import Inputs
from ormo_server.service.observations import Evaluation, Observations, WorkerObservation
from ormo_server.service.soundness import Bounds, UnsoundWorkers
from ormo_server.service.timed_lock import TimedLock
from ormo_server.service.view import RunView
from ormo_server.trace import Refused

log = logging.getLogger(__name__)

# Handing a copy to another thread costs as much as copying some 2 MiB.
_COPIED_UNDER_LOCK = 2 * CHUNK_BYTES


class Engine:
    """One run being served.

    Args:
        machine: the core, which must not be touched by anyone else from now on.
        manifest: of its model.
        frozen: the model's tensors that are not trained, shape (z,), float32; they never change.
        clock: the run's.
        metrics: what to count in.
        lease_seconds: how long a worker may be silent.
        ticket_timeout: seconds that a live worker may keep a ticket; None: the scheduler's choice.
        bounds: of gradients.
        copies: what fills large deliveries; it ends with the engine.
        journal: what inputs are recorded in, and waited for before anybody hears of what followed from them.
        refuse_if_not_ours: is asked after that whether the next server will find it; see `RunHost`.
        on_refused: is told of each gradient that is refused, in order with the machine's inputs.
    """

    def __init__(
        self,
        machine: StateMachine,
        manifest: Manifest,
        frozen: torch.Tensor,
        clock: Callable[[], float],
        metrics: Metrics,
        *,
        copies: Copies,
        lease_seconds: float,
        ticket_timeout: float | None = None,
        bounds: Bounds = Bounds(),  # noqa: B008 - it is frozen
        journal: Journal | NoJournal = NoJournal(),  # noqa: B008 - it has no state
        refuse_if_not_ours: Callable[[], None] = lambda: None,
        on_refused: Callable[[Refused], None] = lambda _: None,
    ) -> None:
        self.manifest = manifest
        self.frozen = frozen
        self.observations = Observations()
        self.finished = threading.Event()
        self._machine = machine
        self._clock = clock
        self._metrics = metrics
        self._lock = TimedLock(metrics.upkeep)
        self._inputs = Inputs(machine, self._lock)
        self.broken = self._inputs.broken
        self._waiters: dict[SlotKey, Waiter] = {}
        self._copies = copies
        self._bounds = bounds
        self._journal = journal
        self._refuse_if_not_ours = refuse_if_not_ours
        self._on_refused = on_refused
        if isinstance(journal, Journal):
            machine.listener = _both(machine.listener, journal.take)
        self._unsound = UnsoundWorkers()
        self._leases = Leases(lease_seconds)
        self._ticket_timeout = TicketTimeout(ticket_timeout, automatic=machine.scheduler.others_wait)
        for worker in machine.state.members:
            self._leases.grant(worker, clock())
        self._idle_warning = ""
        # The journal's position at the run's end.
        self._end: int | None = None
        if machine.state.finished:
            self.finished.set()
        self._warn_of_idle_slots(machine.state.live_slots)

    # Members

    def join(self, worker: str, incarnation: int, slots: int, caller: str = "") -> tuple[Member, int | None]:
        """See `StateMachine.join`. The caller's name is for the log.

        Returns:
            The member, and the incarnation that it replaced, if it did.
        """
        with self._inputs as machine:
            self._refuse_unsound(worker, incarnation)
            known = machine.state.members.get(worker)
            member = machine.join(self._clock(), worker, incarnation, slots)
            self._leases.grant(worker, self._clock())
            if member is not known:
                self.observations.joined(worker)
                self._metrics.upkeep.joins.inc()
            self._pass_on()
            size, live_slots, position = machine.bucket_size, machine.state.live_slots, self._journal.position
        self._settled(position)
        if member is not known:
            reports.joined(member, self.position()[1], size, caller)
            self._warn_of_idle_slots(live_slots)
        return member, known.incarnation if known is not None and known is not member else None

    def _warn_of_idle_slots(self, slots: int) -> None:
        warning = self._machine.scheduler.idle_warning(slots)
        if warning and warning != self._idle_warning:
            log.warning("%s", warning)
        self._idle_warning = warning

    def check_requester(self, requester: Requester) -> None:
        """Refuse early what would be refused after its tensors have come; see `StateMachine.requesting_slot`."""
        with self._inputs as machine:
            self._refuse_unsound(requester.worker, requester.incarnation)
            machine.requesting_slot(requester)
            self._leases.heard(requester.worker, self._clock())

    def heard(self, worker: str) -> None:
        """Bytes came from, or went to, a worker. Takes no lock: it is called for every chunk."""
        self._leases.heard(worker, self._clock())

    def heartbeat(self, worker: str, incarnation: int, returned: Sequence[TicketKey]) -> None:
        """Keep a lease, and take back tickets that will not be used."""
        with self._inputs as machine:
            self._refuse_unsound(worker, incarnation)
            membership.find(machine.state, worker, incarnation)
            self._leases.heard(worker, self._clock())
            for key in returned:
                machine.return_ticket(self._clock(), worker, incarnation, key)
            self._pass_on()
            position = self._journal.position
        if returned:
            self._settled(position)

    def set_learning_rate(self, peak: float) -> None:
        """See `StateMachine.set_learning_rate`."""
        with self._inputs as machine:
            machine.set_learning_rate(self._clock(), peak)
            position = self._journal.position
        self._settled(position)

    def leave(self, worker: str, incarnation: int) -> None:
        """A worker gives up its lease."""
        with self._inputs as machine:
            left = machine.leave(self._clock(), worker, incarnation)
            if left:
                self._forget(worker)
            self._pass_on()
            position = self._journal.position
        self._settled(position)
        if left:
            reports.left(worker, incarnation, self.position()[1])

    def expire(self) -> list[tuple[str, int]]:
        """Take silent workers for dead, and tickets that were out for too long for lost.

        Returns:
            (id, incarnation) of the workers that lost their lease.
        """
        with self._inputs as machine:
            now = self._clock()
            members = machine.state.members
            lapsed = [members[worker] for worker in self._leases.lapsed(now) if worker in members]
            for member in lapsed:
                machine.leave(now, member.worker, member.incarnation)
                self._forget(member.worker)
                self._pass_on()
            overdue = self._ticket_timeout.overdue(machine.state, now)
            for ticket in overdue:
                holder = members[ticket.slot[0]]
                machine.return_ticket(now, holder.worker, holder.incarnation, ticket.key)
                self._pass_on()
            if overdue:
                self._ticket_timeout.lapsed()
        self._report_expired([member.worker for member in lapsed], overdue)
        return [(member.worker, member.incarnation) for member in lapsed]

    def _refuse_unsound(self, worker: str, incarnation: int) -> None:
        if not self._unsound.has(worker, incarnation):
            return
        if self._machine.leave(self._clock(), worker, incarnation):
            self._forget(worker)
            self._pass_on()
        raise self._unsound.refusal(worker)

    def _forget(self, worker: str) -> None:
        self._leases.forget(worker)
        self.observations.gone(worker)

    def _report_expired(self, workers: list[str], tickets: Sequence[Ticket]) -> None:
        for worker in workers:
            reports.lapsed(worker, self._leases.lease_seconds, self.position()[1])
            self._metrics.upkeep.expired_workers.inc()
        for ticket in tickets:
            reports.overdue(ticket, self.position()[1])
            self._metrics.upkeep.expired_tickets.inc()

    # Exchanges

    def exchange(
        self,
        requester: Requester,
        push: Push | None,
        wish: Payload | None,
        still_current: Callable[[], bool] = lambda: True,
    ) -> Outcome:
        """Apply a gradient, if there is one, and ask for the next ticket, if it is wanted.

        Under the asynchronous scheduler both happen under one hold of the lock, so that the parameters that come with
        the ticket are exactly those after this gradient.

        Args:
            requester: whose exchange it is.
            push: the gradient; its payload may be the wish's.
            wish: where the parameters of the next ticket go.
            still_current: whether no newer stream of the slot has taken over.

        Raises:
            Superseded: a newer stream of the slot has taken over.
            OrmoError: as `StateMachine.push` and `request_ticket`, but for what `Outcome` holds.
        """
        if push is not None and self._bounds.clips and self._bounds.exceeded_by(push):
            push = self._bounds.clipped(push)  # before the lock: it is a walk over the gradient
            self._metrics.gradients.clipped()
        stored = self._stored(push)
        try:
            outcome, position = self._exchange(requester, push, stored, wish, still_current)
        finally:
            self._journal.release(stored)
        self._settle(outcome, position)
        if push is not None:
            reports.gradient(requester, push, outcome)
        return outcome

    def _stored(self, push: Push | None) -> StoredGradient | None:
        if push is None or push.norm is None or self._bounds.exceeded_by(push):
            return None
        return self._journal.store(push.payload)

    def _settle(self, outcome: Outcome, position: int) -> None:
        try:
            self._settled(position)
        except OrmoError:
            if outcome.waiter is not None:
                self.withdraw(outcome.waiter)
            raise

    def settle(self, delivery: Delivery) -> None:
        """Return when all that led to this delivery is as safe as it will be: no earlier may it be sent.

        Raises:
            DiskFull, NotReady: see `Journal.settle`.
        """
        self._settled(delivery.position)

    def settle_all(self) -> None:
        """Return when all that happened is as safe as it will be; nobody may be told of the run's end earlier.

        Raises:
            DiskFull, NotReady: see `Journal.settle`.
        """
        self._settled(self._journal.position)

    def _settled(self, position: int) -> None:
        self._journal.settle(position)
        # After it: a server that starts from now on finds what is settled.
        self._refuse_if_not_ours()
        if self._end is not None and position >= self._end:
            self.finished.set()

    def _exchange(
        self,
        requester: Requester,
        push: Push | None,
        stored: StoredGradient | None,
        wish: Payload | None,
        still_current: Callable[[], bool],
    ) -> tuple[Outcome, int]:
        with self._inputs:
            waited = self._lock.waited_seconds + (self._copies.finish() if push else 0.0)
            self._metrics.traffic.stage["lock"].observe(waited)
            if not still_current():
                raise superseded(requester.slot_key)
            self._refuse_unsound(requester.worker, requester.incarnation)
            self._journal.announce(stored)
            result, refusal = self._push(requester, push) if push else (None, None)
            try:
                outcome = Outcome(result, refusal, self._request(requester, wish) if wish else None)
            except Finished as over:
                self._metrics.traffic.pull_refused(over.reason)
                outcome = Outcome(result, refusal, finished=True)
            return outcome, self._journal.position

    def _push(self, requester: Requester, push: Push) -> tuple[PushResult | None, OrmoError | None]:
        self._machine.requesting_slot(requester)  # whose gradient is refused has a place and a number to be told by
        try:
            if push.norm is None:
                self._fail_unless_finite()
                raise non_finite(requester)
            if self._bounds.exceeded_by(push):
                raise self._bounds.too_large(requester, push)
            return self._apply(requester, push, push.norm), None
        except (NonFinite, NormTooLarge, TicketUnknown, Finished) as refusal:
            self._metrics.traffic.push_refused(refusal.reason)
            if not isinstance(refusal, Finished):
                self._note_refused(requester, push, refusal)
            return None, refusal

    def _fail_unless_finite(self) -> None:
        """Of parameters that are not finite come gradients that are not, so with the first of these it is found out.

        No gradient that is taken leads there, but an earlier version's state may.
        """
        if not all_finite(self._machine.state.params):
            self.fail("the model has NaN or infinite values")
            raise self._inputs.refusal()

    def _note_refused(self, requester: Requester, push: Push, refusal: OrmoError) -> None:
        seen = self.observations.of(requester.worker)
        # Numbers rise with each gradient, so whoever sends one again and again does not fill the disk.
        if seen.refuses_anew(requester.slot, requester.request):
            self._on_refused(Refused(self._clock(), requester, push.ticket, refusal.reason.value))
        if isinstance(refusal, NonFinite | NormTooLarge):
            seen.refuse()
            self._send_away_if_unsound(requester, seen)

    def _send_away_if_unsound(self, requester: Requester, seen: WorkerObservation) -> None:
        limit = self._bounds.refused_share
        if limit is not None and seen.refused_share > limit:
            # From its next call on: this one has its answer.
            self._unsound.add(requester)
            reports.sent_away(requester, seen)

    def _apply(self, requester: Requester, push: Push, norm: float) -> PushResult:
        payload, layout = push.payload, push.payload.layout
        gradient = Gradient(
            push.ticket,
            payload.parameters,
            push.samples,
            payload.float_buffers if layout.with_buffers else None,
            payload.int_buffers if layout.with_buffers else None,
            norm,
        )
        now = self._clock()
        ticket = self._machine.state.tickets.get(push.ticket)
        started = time.perf_counter()
        result = self._machine.push(now, requester, gradient)
        if result.repeated:
            self._metrics.traffic.repeated.inc()
        else:
            self._metrics.traffic.stage["apply"].observe(time.perf_counter() - started)
            assert ticket is not None
            self._observe(requester.worker, push, norm, result, ticket, now)
        self._pass_on()
        self._note_end()
        return result

    def _observe(self, worker: str, push: Push, norm: float, result: PushResult, ticket: Ticket, now: float) -> None:
        ticket_seconds = now - ticket.handed_out_seconds
        self._ticket_timeout.redeemed(ticket_seconds)
        size = self._machine.bucket_size
        self._metrics.gradients.counted(result.delay, result.lag_buckets, size, ticket_seconds)
        mine = self.observations.of(worker)
        mine.counted(push, result.delay, now, ticket_seconds)
        if result.discarded:
            self._metrics.traffic.discarded.inc()
            self.observations.discarded += 1
            return
        self._metrics.traffic.applied.inc()
        self._metrics.gradients.applied(push.samples, norm, buffers_kept=result.buffers_kept)
        mine.apply(push, norm)
        self.observations.applied_with(result.delay)
        rate = self._machine.state.learning_rate
        if rate:  # a schedule may end at 0: then no scale can be told
            self._metrics.gradients.scaled(result.step_size / rate)
            self.observations.scaled(result.step_size / rate)

    def _request(self, requester: Requester, wish: Payload) -> Waiter:
        waiter = Waiter(requester.slot_key, wish)
        older = self._waiters.get(waiter.slot)
        self._waiters[waiter.slot] = waiter
        try:
            self._machine.request_ticket(self._clock(), requester)
        except OrmoError:
            del self._waiters[waiter.slot]
            if older is not None:
                self._waiters[waiter.slot] = older
            raise
        if older is not None:
            older.fail(superseded(waiter.slot))
        self._pass_on()
        return waiter

    def withdraw(self, waiter: Waiter) -> None:
        """Nobody listens any more: after this the waiter's payload is not written to."""
        if waiter.delivery is not None:
            if waiter.delivery.copy is not None:
                waiter.delivery.copy.wait()
            return
        with self._lock:
            if self._waiters.get(waiter.slot) is waiter:
                del self._waiters[waiter.slot]
                self._machine.withdraw_request(waiter.slot)

    def pull(self, payload: Payload, newer_than: tuple[int, int] | None) -> Delivery:
        """The newest parameters for a reader, copied into `payload`.

        Args:
            payload: where they go.
            newer_than: (epoch, iteration) that the reader has; if nothing is newer, the answer has no payload.
        """
        with self._inputs as machine:
            state = machine.state
            if newer_than == (state.epoch, state.iteration):
                self._metrics.traffic.not_modified.inc()
                return Delivery(state.epoch, state.iteration, state.samples, None, None)
            payload.parameters.copy_(state.params)
            self._copy_buffers(payload)
            self._metrics.traffic.read.inc()
            position = self._journal.position
            return Delivery(state.epoch, state.iteration, state.samples, None, payload, position=position)

    # What follows from inputs

    def _pass_on(self) -> None:
        for event in self._machine.take_events():
            waiter = self._waiters.pop(event.slot)
            if isinstance(event, Granted):
                self._fill(waiter, event)
            else:
                self._metrics.traffic.pull_refused(event.error.reason)
                waiter.fail(event.error)

    def _fill(self, waiter: Waiter, granted: Granted) -> None:
        state, ticket, payload = self._machine.state, granted.ticket, waiter.payload
        self._copy_buffers(payload)
        copy = None
        if payload.layout.total_bytes > _COPIED_UNDER_LOCK and not state.rule.keeps_deliveries:
            copy = self._copies.begin(payload, self._machine.delivery(granted))
        else:
            started = time.perf_counter()
            self._machine.write_delivery(granted, payload.parameters)
            self._metrics.traffic.stage["copy"].observe(time.perf_counter() - started)
            if state.rule.keeps_deliveries:
                self._journal.delivered(granted.slot, payload.layout.dtype)
        self._metrics.traffic.ticketed.inc()
        position = self._journal.position
        waiter.resolve(Delivery(ticket.epoch, ticket.iteration, state.samples, ticket, payload, copy, position))

    def _copy_buffers(self, payload: Payload) -> None:
        if payload.layout.with_buffers:
            payload.float_buffers.copy_(self._machine.state.float_buffers)
            payload.int_buffers.copy_(self._machine.state.int_buffers)

    def _note_end(self) -> None:
        if self._machine.state.finished and self._end is None:
            self._end = self._journal.position

    # The lock

    def close(self) -> None:
        """Refuse every input from now on."""
        with self._lock:
            self._inputs.closed = True
        self._copies.close()

    def fail(self, why: str) -> None:
        """The state is of no use any more, or can't be recorded: refuse every input, and let the server stop."""
        self._inputs.fail(why)

    @property
    def why_broken(self) -> str:
        """Why `broken` is set, in a sentence."""
        return self._inputs.why_broken

    def snapshot(self) -> tuple[Snapshot, float, int | None]:
        """A copy of the state, the run's clock at that moment, and the log of the journal that begins with it.

        Raises:
            NotReady: the state is broken.
            MemoryError: there is none for a copy. Once the engine is closed nothing changes, and none is made.
        """
        with self._lock:
            if self.broken.is_set():
                raise NotReady("the state is broken and must not be kept; the server stops")
            return take(self._machine, copied=not self._inputs.closed), self._clock(), self._journal.begin_log()

    # What people see

    def position(self) -> tuple[int, int]:
        """(epoch, iteration) now."""
        return (self._machine.state.epoch, self._machine.state.iteration)

    @contextlib.contextmanager
    def inspect(self) -> Iterator[StateMachine]:
        """The machine to read from, held still; do not keep it."""
        with self._lock:
            yield self._machine

    def evaluated(self, evaluation: Evaluation) -> None:
        """An evaluation was reported. One of another epoch says nothing of this run as it is now.

        Raises:
            BadRequest: the run has not come so far.
        """
        with self._lock:
            state = self._machine.state
            if evaluation.epoch != state.epoch:
                return
            if evaluation.iteration > state.iteration:
                raise BadRequest(
                    f"an evaluation of iteration {evaluation.iteration}, and the run is at {state.iteration}: expected "
                    "one that was pulled"
                )
            self.observations.evaluated(evaluation)

    def view(self) -> RunView:
        """The run at this moment."""
        with self._lock:
            return RunView.of(self._machine, self.observations, self._leases, self._clock())


def _both(first: Callable[[Input], None] | None, second: Callable[[Input], None]) -> Callable[[Input], None]:
    if first is None:
        return second

    def tell(taken: Input) -> None:
        first(taken)
        second(taken)

    return tell
