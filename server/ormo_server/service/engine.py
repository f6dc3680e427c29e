"""The engine: owns the one lock, gives the core its inputs one after the other, and hands on what follows.

An exchange passes three parts, in this order. Before the lock: the gradient is in memory, judged, and its bytes are
written for the journal. Under it: the machine takes the inputs, each is put in the journal's order as it takes effect,
and what it grants is delivered before the next input changes the parameters. After it: the wait until the journal has
them on the disk, one for all who wait, and all that is for people: metrics, figures and log lines.

So the lock is never held across a network or disk wait: deliveries are copied under it and sent after it, checkpoints
are copied under it and written after it.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

import torch

from ormo_protos.manifest import Manifest
from ormo_protos.tensors import Payload
from ormo_server.core import inputs, members
from ormo_server.core.deadlines import Leases, TicketTimeout
from ormo_server.core.effects import Effects, superseded
from ormo_server.core.errors import Finished, NonFinite, NormTooLarge, NotReady, OrmoError, TicketUnknown
from ormo_server.core.ids import TicketKey
from ormo_server.core.inputs import Gradient, Input, Requester
from ormo_server.core.machine import StateMachine
from ormo_server.core.snapshot import Snapshot, take
from ormo_server.core.state import Member
from ormo_server.core.vectors import all_finite
from ormo_server.journal import Journal, KeptGradient, Storing, gradient_in
from ormo_server.metrics import Metrics
from ormo_server.metrics.view import Evaluation, RunView
from ormo_server.service.admission import Bounds, ReceivedGradient, non_finite, sent_away
from ormo_server.service.delivery import Copies, Delivery, Waiter, Waiting, copy_buffers
from ormo_server.service.figures import Figures, Outcome
from ormo_server.service.lock import MachineLock
from ormo_server.trace.rows import Recorded, Refused
from ormo_server.trace.writer import TraceWriter

_LOG = logging.getLogger(__name__)


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
        trace: what they are written to besides, and gradients that are refused, in order.
        refuse_if_not_ours: is asked after the journal whether the next server will find it; see `RunHost`.
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
        journal: Journal | None = None,
        trace: TraceWriter | None = None,
        refuse_if_not_ours: Callable[[], None] = lambda: None,
    ) -> None:
        self.manifest = manifest
        self.frozen = frozen
        self.finished = threading.Event()
        self._machine = machine
        self._clock = clock
        self._metrics = metrics
        self._lock = MachineLock(machine, metrics.upkeep)
        self.broken = self._lock.broken
        self._waiting = Waiting(machine, copies, metrics.traffic.stage["copy"], journal)
        self._copies = copies
        self._bounds = bounds
        self._journal = journal
        self.begin_storing: Callable[[Payload], Storing | None] = journal.begin if journal else lambda _: None
        self._trace = trace
        self._refuse_if_not_ours = refuse_if_not_ours
        self._sent_away: dict[str, int] = {}  # the incarnation of each worker whose gradients were unsound too often
        self._leases = Leases(lease_seconds)
        self._ticket_timeout = TicketTimeout(ticket_timeout, automatic=machine.scheduler.others_wait)
        for worker in machine.state.members:
            self._leases.grant(worker, clock())
        self._figures = Figures(metrics, machine.state.members)
        self.settled = self._figures.settled
        # The journal's position at the run's end.
        self._end: int | None = None
        if machine.state.finished:
            self.finished.set()
        self._figures.warn_of_idle_slots(machine.scheduler, machine.state.live_slots)

    # Members

    def join(self, worker: str, incarnation: int, slots: int, caller: str = "") -> tuple[Member, int | None]:
        """Let a worker join, or renew what it joined with. The caller's name is for the log.

        Returns:
            The member, and the incarnation that it replaced, if it did.
        """
        with self._lock as machine:
            self._refuse_if_sent_away(worker, incarnation)
            known = machine.state.members.get(worker)
            held = [] if known is None else machine.state.tickets_of(known)
            effects = self._take(inputs.Join(self._clock(), worker, incarnation, slots))
            self._leases.grant(worker, self._clock())
            if effects.changed:
                self._figures.joined(worker)
            size, live_slots, position = machine.bucket_size, machine.state.live_slots, self.position
        self._figures.count_join(effects, held)
        self.wait_durable(position)
        member = effects.member
        assert member is not None
        if effects.changed:
            self._figures.note_join(member, self.iteration()[1], size, caller)
            self._figures.warn_of_idle_slots(self._machine.scheduler, live_slots)
        return member, known.incarnation if known is not None and effects.changed else None

    def check_requester(self, requester: Requester) -> None:
        """Refuse early what would be refused after its tensors have come; see `StateMachine.requesting_slot`."""
        with self._lock as machine:
            self._refuse_if_sent_away(requester.worker, requester.incarnation)
            machine.requesting_slot(requester)
            self._leases.renew(requester.worker, self._clock())

    def renew_lease(self, worker: str) -> None:
        """Bytes came from, or went to, a worker. Takes no lock: it is called for every chunk."""
        self._leases.renew(worker, self._clock())

    def heartbeat(self, worker: str, incarnation: int, returned: Sequence[TicketKey]) -> None:
        """Keep a lease, and take back tickets that will not be used."""
        with self._lock as machine:
            self._refuse_if_sent_away(worker, incarnation)
            members.find(machine.state, worker, incarnation)
            self._leases.renew(worker, self._clock())
            returns = (inputs.Return(self._clock(), worker, incarnation, number, epoch) for epoch, number in returned)
            effects = [self._take(each) for each in returns]
            position = self.position
        if returned:
            self._figures.count(effects)
            self.wait_durable(position)

    def set_learning_rate(self, peak: float) -> None:
        """Set η after the warm-up, as `SetLearningRate` says; durable when this returns."""
        with self._lock:
            self._take(inputs.SetLearningRate(self._clock(), peak))
            position = self.position
        self.wait_durable(position)

    def leave(self, worker: str, incarnation: int) -> None:
        """A worker gives up its lease."""
        with self._lock:
            effects = self._let_go(worker, incarnation)
            position = self.position
        self._figures.count([effects])
        self.wait_durable(position)
        if effects.changed:
            self._figures.note_leave(worker, incarnation, self.iteration()[1])

    def expire(self) -> list[tuple[str, int]]:
        """Take silent workers for dead, and tickets that were out for too long for lost.

        Returns:
            (id, incarnation) of the workers that lost their lease.
        """
        with self._lock as machine:
            now, live = self._clock(), machine.state.members
            lapsed = [live[worker] for worker in self._leases.expired(now) if worker in live]
            held = [machine.state.tickets_of(member) for member in lapsed]
            effects = [self._let_go(member.worker, member.incarnation) for member in lapsed]
            overdue = self._ticket_timeout.overdue(machine.state, now)
            for ticket in overdue:
                holder = live[ticket.slot[0]]
                back = inputs.Return(now, holder.worker, holder.incarnation, ticket.number, ticket.epoch)
                effects.append(self._take(back))
            if overdue:
                self._ticket_timeout.lapsed()
        self._figures.count(effects)
        for member, voided in zip(lapsed, held, strict=True):
            note = self._figures.note_expired_lease
            note(member.worker, self._leases.lease_seconds, self.iteration()[1], voided=voided)
        for ticket in overdue:
            self._figures.note_overdue_ticket(ticket, self.iteration()[1])
        return [(member.worker, member.incarnation) for member in lapsed]

    def _refuse_if_sent_away(self, worker: str, incarnation: int) -> None:
        if self._sent_away.get(worker) == incarnation:
            self._figures.count([self._let_go(worker, incarnation)])
            raise sent_away(worker)

    def _let_go(self, worker: str, incarnation: int) -> Effects:
        effects = self._take(inputs.Leave(self._clock(), worker, incarnation))
        if effects.changed:
            self._leases.forget(worker)
            self._figures.gone(worker)
        return effects

    # Exchanges

    def exchange(
        self,
        requester: Requester,
        received: ReceivedGradient | None,
        wish: Payload | None,
        is_current: Callable[[], bool] = lambda: True,
    ) -> Outcome:
        """Apply a gradient, if there is one, and ask for the next ticket, if it is wanted.

        Under the asynchronous scheduler both happen under one hold of the lock, so that the parameters that come with
        the ticket are exactly those after this gradient.

        Args:
            requester: whose exchange it is.
            received: the gradient; its payload may be the wish's.
            wish: where the parameters of the next ticket go.
            is_current: whether no newer stream of the slot has taken over.

        Raises:
            Superseded: a newer stream of the slot has taken over.
            OrmoError: as `Push` and `Request`, but for what `Outcome` holds.
        """
        # Before the lock, for both walk over the gradient: scaling it down, and the rest of writing it for the journal.
        too_long = received is not None and self._bounds.exceeded_by(received)
        if too_long and received is not None and self._bounds.clips:
            received, too_long = self._bounds.clip(received, self.begin_storing), False
            self._metrics.gradients.clipped()
        stored = None
        if self._journal and received and received.storing and received.norm is not None and not too_long:
            stored = self._journal.store(received.storing)
        outcome = Outcome(requester, received)
        try:
            with self._lock:
                outcome.lock_seconds = self._lock.waited_seconds + (self._copies.finish() if received else 0.0)
                if not is_current():
                    raise superseded(requester.slot_key)
                self._refuse_if_sent_away(requester.worker, requester.incarnation)
                outcome.taken_at = self._clock()
                if received is not None:
                    self._push(outcome, received, stored, too_long=too_long)
                if wish is not None:
                    self._request(outcome, wish)
                outcome.position = self.position
        finally:
            # Also if the request raised: the push before it has taken effect.
            if self._journal is not None and stored is not None:
                self._journal.release(stored)
            self._figures.record(outcome)
        try:
            self.wait_durable(outcome.position)
        except OrmoError:
            if outcome.waiter is not None:
                self.withdraw(outcome.waiter)
            raise
        return outcome

    def _push(
        self, outcome: Outcome, received: ReceivedGradient, stored: KeptGradient | None, *, too_long: bool
    ) -> None:
        requester, (epoch, number) = outcome.requester, received.ticket
        try:
            if received.norm is None or too_long:
                self._refuse_gradient(requester, received)
            given = inputs.Push(outcome.taken_at, *requester, number, epoch, received.samples, received.local_steps)
            started = time.perf_counter()
            outcome.pushed = effects = self._take(given, gradient_in(received.payload, received.norm), stored)
            outcome.apply_seconds = time.perf_counter() - started
        except (NonFinite, NormTooLarge, TicketUnknown, Finished) as refusal:
            outcome.refusal = refusal
            if not isinstance(refusal, Finished):
                self._note_refused(requester, received, refusal)
            return
        if effects.redeemed is not None:
            # What decides about later inputs, so under the lock.
            self._ticket_timeout.redeemed(outcome.taken_at - effects.redeemed.handed_out_seconds)
            self._figures.observations.of(requester.worker).note_taken()

    def _refuse_gradient(self, requester: Requester, received: ReceivedGradient) -> NoReturn:
        self._machine.requesting_slot(requester)  # whose gradient is refused has a place and a number to be told by
        if received.norm is None:
            self._fail_unless_finite()
            raise non_finite(requester)
        raise self._bounds.too_large(requester, received)

    def _fail_unless_finite(self) -> None:
        """Of parameters that are not finite come gradients that are not, so with the first of these it is found out.

        No gradient that is taken leads there, but an earlier version's state may.
        """
        if not all_finite(self._machine.state.params):
            self.fail("the model has NaN or infinite values")
            raise self._lock.refusal()

    def _note_refused(self, requester: Requester, received: ReceivedGradient, refusal: OrmoError) -> None:
        seen = self._figures.observations.of(requester.worker)
        # Numbers rise with each gradient, so whoever sends one again and again does not fill the disk.
        if seen.refuses_anew(requester.slot, requester.request) and self._trace is not None:
            self._trace.append(Refused.of(self._clock(), requester, received.ticket, refusal.reason))
        if isinstance(refusal, NonFinite | NormTooLarge):
            seen.refuse()
            limit = self._bounds.refused_share
            if limit is not None and seen.refused_share > limit:
                # From its next call on: this one has its answer.
                self._sent_away[requester.worker] = requester.incarnation
                self._figures.note_sent_away(requester, seen)

    def _request(self, outcome: Outcome, wish: Payload) -> None:
        waiter = Waiter(outcome.requester.slot_key, wish)
        older = self._waiting.enter(waiter)
        try:
            outcome.requested = self._take(inputs.Request(outcome.taken_at, *outcome.requester))
        except OrmoError as error:
            self._waiting.put_back(waiter, older)
            if not isinstance(error, Finished):
                raise
            outcome.finished = error
            return
        self._waiting.supersede(older)
        outcome.waiter = waiter

    def withdraw(self, waiter: Waiter) -> None:
        """Nobody listens any more: after this the waiter's payload is not written to."""
        if waiter.delivery is not None:
            if waiter.delivery.copy is not None:
                waiter.delivery.copy.wait()
            return
        with self._lock.reading():
            # Once the lock is closed nothing may change any more, and whoever comes after finds nobody waiting.
            if self._waiting.leave(waiter) and not self._lock.closed:
                self._take(inputs.Withdraw(*waiter.slot))

    def pull(self, payload: Payload, newer_than: tuple[int, int] | None) -> Delivery:
        """The newest parameters for a reader, copied into `payload`.

        Args:
            payload: where they go.
            newer_than: (epoch, iteration) that the reader has; if nothing is newer, the answer has no payload.
        """
        with self._lock as machine:
            state, position = machine.state, self.position
            known = newer_than == (state.epoch, state.iteration)
            if not known:
                payload.parameters.copy_(state.params)
                if payload.layout.with_buffers:
                    copy_buffers(machine, payload)
            sent, counted, rate = None if known else payload, state.samples, state.learning_rate
            pulled = Delivery(state.epoch, state.iteration, counted, rate, None, sent, position=position)
        (self._metrics.traffic.not_modified if known else self._metrics.traffic.read).note(1)
        return pulled

    # Inputs and what follows from them: under the lock

    def _take(self, given: Input, gradient: Gradient | None = None, stored: KeptGradient | None = None) -> Effects:
        """Give the machine an input, and record it and pass its effects on before the next one can come."""
        effects = self._machine.step(given, gradient)
        if not effects.changed:
            return effects
        position = 0 if self._journal is None else self._journal.append(given, effects.redeemed, stored)
        if self._trace is not None:
            self._trace.append(Recorded(given, effects.redeemed))
        if self._end is None and self._machine.state.finished:
            self._end = position
        self._waiting.answer(effects, position)
        return effects

    # What is on the disk

    @property
    def position(self) -> int:
        """How many entries the journal has; 0 without one."""
        return 0 if self._journal is None else self._journal.position

    def wait_durable(self, position: int | None = None) -> None:
        """Return when all up to here is as safe as it will be: no earlier may anybody be told of it.

        Args:
            position: of the journal; None for its newest.

        Raises:
            DiskFull, NotReady: see `Journal.wait_durable`.
        """
        position = self.position if position is None else position
        if self._journal is not None:
            self._journal.wait_durable(position)
        # After it: a server that starts from now on finds what is settled.
        self._refuse_if_not_ours()
        if self._end is not None and position >= self._end:
            self.finished.set()

    def close(self) -> None:
        """Refuse every input from now on."""
        with self._lock.reading():
            self._lock.closed = True
        self._copies.close()

    def fail(self, why: str) -> None:
        """The state is of no use any more, or can't be recorded: refuse every input, and let the server stop."""
        self._lock.fail(why)

    @property
    def why_broken(self) -> str:
        """Why `broken` is set, in a sentence."""
        return self._lock.why_broken

    def snapshot(self) -> tuple[Snapshot, float, int | None]:
        """A copy of the state, the run's clock at that moment, and the log of the journal that begins with it.

        Raises:
            NotReady: the state is broken.
            MemoryError: there is none for a copy. Once the engine is closed nothing changes, and none is made.
        """
        with self._lock.reading() as machine:
            if self.broken.is_set():
                raise NotReady("the state is damaged and will not be saved; the server stops")
            begun = None if self._journal is None else self._journal.begin_log()
            return take(machine, copied=not self._lock.closed), self._clock(), begun

    # What people see

    def iteration(self) -> tuple[int, int]:
        """(epoch, iteration) now."""
        return (self._machine.state.epoch, self._machine.state.iteration)

    def inspect(self) -> AbstractContextManager[StateMachine]:
        """The machine to read from, held still; do not keep it."""
        return self._lock.reading()

    def note_evaluation(self, evaluation: Evaluation) -> None:
        """An evaluation was reported; see `Figures.note_evaluation`."""
        with self._lock.reading() as machine:
            self._figures.note_evaluation(machine.state, evaluation)

    def view(self) -> RunView:
        """The run at this moment."""
        with self._lock.reading() as machine, self.settled() as observations:
            return RunView.of(machine, observations, self._leases, self._clock())
