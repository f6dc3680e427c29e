"""The state machine of the parameter server: `step` is the only way to move a run.

All checks of an input come before its first change, so a refusal leaves the state as it was. What an input makes
possible for others (a ticket for a slot that waited, the end of a wait) comes out with its effects.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from ormo_server.core import members, pace
from ormo_server.core.buffers import Buffers, Merging
from ormo_server.core.effects import NOTHING, Effects, Granted, Redeemed, Released
from ormo_server.core.errors import (
    BadRequest,
    Finished,
    NormTooLarge,
    NotAMember,
    OrmoError,
    Replaced,
    SettingsError,
    StaleRequest,
    TooManyWorkers,
)
from ormo_server.core.inputs import (
    Gradient,
    Input,
    Join,
    Leave,
    Push,
    Request,
    Requester,
    Return,
    SetLearningRate,
    Withdraw,
)
from ormo_server.core.method import Run
from ormo_server.core.rules import UPDATE_RULES, Landing
from ormo_server.core.schedulers import SCHEDULERS
from ormo_server.core.state import Member, PushResult, Slot, State, Ticket
from ormo_server.core.step_size import STEP_SCALES, LearningRate, Timing, Tuning


class StateMachine:
    """Moves a `State` by inputs. Not thread-safe: whoever drives it gives it one input after the other.

    Args:
        run: see below.
        state: see below.
        buffers: of the model; None for one whose floats are averaged, and whose integers grow.

    Attributes:
        run: what decides how the state moves.
        state: where the run is.
        scheduler: who gets a ticket when.
    """

    def __init__(self, run: Run, state: State, buffers: Buffers | None = None) -> None:
        self.run = run
        self.state = state
        self.scheduler = SCHEDULERS[run.method.scheduler](run.method.staleness_bound, waits_for_idle=run.waits_for_idle)
        self._scale = STEP_SCALES[run.method.scale]
        sizes = state.float_buffers.numel(), state.int_buffers.numel()
        self._merging = Merging(Buffers.unnamed(*sizes) if buffers is None else buffers)

    @classmethod
    def fresh(
        cls,
        run: Run,
        params: torch.Tensor,
        float_buffers: torch.Tensor | None = None,
        int_buffers: torch.Tensor | None = None,
        *,
        epoch: int = 0,
        buffers: Buffers | None = None,
    ) -> "StateMachine":
        """A run at its start.

        Args:
            run: what decides how the state moves.
            params: w_0, shape (d,), float32; taken over, not copied.
            float_buffers: shape (f,), float32; None for none.
            int_buffers: shape (i,), int64, or the bits of float64; None for none.
            epoch: of the server.
            buffers: how they are merged; see above.
        """
        rule = UPDATE_RULES[run.method.rule](params.numel(), run.coefficients)
        floats = torch.zeros(0, dtype=torch.float32, device="cpu") if float_buffers is None else float_buffers
        ints = torch.zeros(0, dtype=torch.int64, device="cpu") if int_buffers is None else int_buffers
        return cls(run, State(params, floats, ints, rule, epoch, run.learning_rate.at(0)), buffers)

    @property
    def bucket_size(self) -> int:
        """K: fixed, or the number of slots of the live workers, at least 1."""
        return self.run.bucket_size or max(1, self.state.live_slots)

    @property
    def learning_rate(self) -> LearningRate:
        """The schedule in force: the settings', with the peak that the operator has set since."""
        schedule, tuning = self.run.learning_rate, self.state.tuning
        return schedule if tuning is None else replace(schedule, peak=tuning.peak)

    # Inputs

    def step(self, given: Input, gradient: Gradient | None = None) -> Effects:
        """Take one input, and say what followed from it. What each means, and raises, stands with the inputs.

        The same inputs, given to another machine that started alike, lead to the same state, if every `Granted` is
        followed by the same `write_delivery`, in the same dtype: what was sent is state of the rule `dc`.

        Args:
            given: the input.
            gradient: of a `Push`.

        Raises:
            OrmoError: the input is refused. Nothing has changed.
        """
        match given:
            case Push():
                assert gradient is not None
                return self._push(given, gradient)
            case Request():
                return self._request_ticket(given)
            case Join():
                return self._join(given)
            case Leave():
                return self._leave(given)
            case Withdraw():
                return self._withdraw_request(given)
            case Return():
                return self._return_ticket(given)
            case SetLearningRate():
                return self._set_learning_rate(given)

    def _join(self, given: Join) -> Effects:
        state, worker = self.state, given.worker
        known = state.members.get(worker)
        members.refuse_replaced(state, worker, given.incarnation)
        if known is not None and known.incarnation == given.incarnation:
            self._refuse_other_slots(known, given.slots)
            return Effects(changed=False, member=known)
        self._refuse_newcomer(worker, given.slots)
        replaced = Replaced(f"a newer process joined as worker {worker!r}")
        released = self._remove(known, replaced) if known is not None else ()
        member = members.add(state, worker, given.incarnation, given.slots, run_seed=self.run.seed)
        state.started = state.started or len(state.members) >= self.run.min_workers
        return Effects(member=member, released=released, granted=self._hand_out(given.seconds))

    def _leave(self, given: Leave) -> Effects:
        members.refuse_replaced(self.state, given.worker, given.incarnation)
        member = self.state.members.get(given.worker)
        if member is None or member.incarnation != given.incarnation:
            return NOTHING
        gone = NotAMember(f"worker {given.worker!r} has left or its lease ran out: join again")
        return Effects(released=self._remove(member, gone), granted=self._hand_out(given.seconds))

    def _request_ticket(self, given: Request) -> Effects:
        slot = self.requesting_slot(given)
        self._refuse_finished()
        if given.request > slot.request:
            slot.request, slot.result = given.request, None
        slot.idle = False
        if slot.ticket is not None and self.scheduler.voids_held_ticket(self.state.tickets[slot.ticket]):
            members.close(self.state, self.state.tickets[slot.ticket])
        self.state.waiting[given.worker, given.slot] = None
        return Effects(granted=self._hand_out(given.seconds))

    def _withdraw_request(self, given: Withdraw) -> Effects:
        key = (given.worker, given.slot)
        if key not in self.state.waiting:
            return NOTHING
        del self.state.waiting[key]
        return Effects()

    def _return_ticket(self, given: Return) -> Effects:
        ticket = self.state.tickets.get((given.ticket_epoch, given.ticket))
        member = self.state.members.get(given.worker)
        if ticket is None or member is None or ticket.slot[0] != given.worker:
            return NOTHING
        if member.incarnation != given.incarnation:
            return NOTHING
        members.close(self.state, ticket)
        self.state.slot(ticket.slot).idle = True
        return Effects(granted=self._hand_out(given.seconds))

    def _set_learning_rate(self, given: SetLearningRate) -> Effects:
        try:
            replace(self.run.learning_rate, peak=given.learning_rate)
        except SettingsError as error:
            raise BadRequest(str(error)) from error
        self._refuse_finished()
        self.state.tuning = Tuning(given.learning_rate, self.run.learning_rate.peak)
        if self.state.iteration == 0:  # the first bucket has opened, and has no gradient yet
            self.state.learning_rate = self.learning_rate.at(0)
        return Effects()

    def _push(self, given: Push, gradient: Gradient) -> Effects:
        slot = self.requesting_slot(given)
        if slot.result is not None and slot.result.request == given.request:
            self._refuse_other_gradient(slot, given)
            return Effects(changed=False, result=replace(slot.result, repeated=True))
        self._refuse_finished()
        # First the ticket: who was away while the server was given other settings has lost its push, and may go on.
        ticket = members.in_flight(self.state, slot, given)
        self._refuse_other_kind(given)
        self._assert_sizes(gradient)
        seconds, bucket_size = given.seconds - ticket.handed_out_seconds, self.bucket_size
        slot.result = result = self._count(given, slot, ticket, gradient, seconds, bucket_size)
        slot.request, slot.redeemed, slot.ticket_seconds = given.request, slot.ticket, seconds
        members.close(self.state, ticket)
        if self.run.local_steps_by_speed:
            member = self.state.members[given.worker]
            member.pace = pace.after_push(member.pace, given.local_steps, ticket.handed_out_seconds, given.seconds)
        return Effects(
            result=result,
            redeemed=_redeemed(ticket, result),
            bucket_size=bucket_size,
            learning_rate=self.state.learning_rate,
            released=self.finish() if self.reached_end() else (),
            granted=self._hand_out(given.seconds),
        )

    def _count(
        self, given: Push, slot: Slot, ticket: Ticket, gradient: Gradient, seconds: float, bucket_size: int
    ) -> PushResult:
        state = self.state
        delay = state.iteration - ticket.iteration
        counted_delay = self.scheduler.counted_delay(delay)
        limit = self.run.method.discard_limit(bucket_size)
        if limit is not None and counted_delay >= limit:
            lag = max(0, state.newest_bucket - ticket.bucket)
            return PushResult(given.request, state.epoch, state.iteration, delay, lag, 0.0, discarded=True)
        learning_rate, landing = self._land(slot, ticket, counted_delay, seconds, bucket_size)
        if gradient.norm is not None and not state.rule.stays_finite(state.params, gradient.norm, landing):
            raise _too_large(given, gradient.norm, landing)
        state.newest_bucket += landing.opened_buckets
        state.learning_rate = learning_rate
        state.rule.apply(state.params, gradient.values, landing)
        kept = gradient.float_buffers is not None and self._merge_buffers(gradient, bucket_size)
        state.iteration += 1
        state.samples += given.samples
        self.scheduler.count_applied(state, landing.bucket_size)
        return PushResult(
            given.request,
            state.epoch,
            state.iteration,
            delay,
            landing.lag_buckets,
            landing.step_size,
            buffers_kept=kept,
        )

    def _assert_sizes(self, gradient: Gradient) -> None:
        # A driver that gets this wrong would change the state by half.
        assert gradient.values.shape == self.state.params.shape
        assert gradient.float_buffers is None or gradient.float_buffers.shape == self.state.float_buffers.shape
        assert gradient.int_buffers is None or gradient.int_buffers.shape == self.state.int_buffers.shape

    def _land(self, slot: Slot, ticket: Ticket, counted_delay: int, seconds: float, size: int) -> tuple[float, Landing]:
        """η from then on, and where the gradient would count."""
        state = self.state
        opened = max(0, ticket.bucket - state.newest_bucket)
        lag = max(0, state.newest_bucket - ticket.bucket)
        learning_rate = self.learning_rate.at(state.iteration) if opened else state.learning_rate
        of_slots = partial(state.seconds_of_slots, slot, seconds)
        step_size = learning_rate * self._scale(
            Timing(counted_delay, size, self.run.method.delay_threshold, seconds, of_slots)
        )
        if self.run.method.bucket == "mean":
            step_size *= self.scheduler.weight_in_mean(state, ticket, size)
        return learning_rate, Landing(step_size, opened, lag, size, ticket.slot)

    def _merge_buffers(self, gradient: Gradient, bucket_size: int) -> bool:
        """Whether a tensor that came with NaN or infinity was not taken."""
        # Averages of averages: with weight 1/K the last K workers' statistics count about alike.
        weight, kept = 1.0 / bucket_size, False
        if gradient.float_buffers is not None:
            kept |= self._merging.merge_floats(self.state.float_buffers, gradient.float_buffers, weight)
        if gradient.int_buffers is not None:
            kept |= self._merging.merge_ints(self.state.int_buffers, gradient.int_buffers, weight)
        return kept

    # Deliveries

    def write_delivery(self, granted: Granted, out: torch.Tensor) -> None:
        """Write what the ticket's delivery carries into `out`, shape (d,), float32 or bfloat16.

        Call it before the next input, so that these are the parameters of the ticket's iteration.
        """
        if granted.params is None:
            state = self.state
            state.rule.write_delivery(state.params, out, state.sending(self.bucket_size))
        else:
            out.copy_(granted.params)
        if self.state.rule.keeps_deliveries:
            self.state.rule.ticket_delivered(granted.slot, out)

    def delivery(self, granted: Granted) -> Callable[[torch.Tensor, slice], object]:
        """As `write_delivery`, for rules that keep no deliveries: writes one part, and may be called until `push` is.

        Call it before the next input; what it returns is called with `out` and the part of it to write.
        """
        params = granted.params
        if params is not None:
            return lambda out, part: out[part].copy_(params[part])
        state, sending = self.state, self.state.sending(self.bucket_size)
        return lambda out, part: state.rule.write_delivery(state.params, out, sending, part)

    # What follows from inputs

    def _hand_out(self, now: float) -> Sequence[Granted]:
        if self.state.finished or not self.state.started:
            return ()
        granted, bucket_size = [], self.bucket_size if self.run.method.bucket == "mean" else 0
        for ticket in self.scheduler.hand_out(self.state, bucket_size, now):
            ticket.local_steps = self._local_steps_of(ticket.slot[0])
            granted.append(Granted(ticket.slot, ticket, self.state.round_params))
        return granted

    def _local_steps_of(self, worker: str) -> int:
        most, everyone = self.run.local_steps, self.state.members
        if not self.run.local_steps_by_speed:
            return most
        return pace.steps_for(most, everyone[worker].pace, (member.pace for member in everyone.values()))

    def reached_end(self) -> bool:
        """Whether the run has as many gradients or samples as it should."""
        gradients, samples = self.run.stop_after_gradients, self.run.stop_after_samples
        return bool((gradients and self.state.iteration >= gradients) or (samples and self.state.samples >= samples))

    def finish(self) -> Sequence[Released]:
        """End the run: all tickets are void and nobody waits any more."""
        state = self.state
        state.finished = True
        for ticket in list(state.tickets.values()):
            members.close(state, ticket)
        released = [Released(slot, self._over()) for slot in state.waiting]
        state.waiting.clear()
        return released

    def _remove(self, member: Member, why: OrmoError) -> Sequence[Released]:
        return [Released(slot, why) for slot in members.remove(self.state, member)]

    # Checks

    def requesting_slot(self, requester: Requester | Request | Push) -> Slot:
        """The slot that asks.

        Raises:
            Replaced: a newer incarnation of the worker has joined.
            NotAMember: the worker never joined, has left, or its lease ran out.
            BadRequest: it joined with fewer slots, or the request number is below 1.
            StaleRequest: the slot has used a higher request number.
        """
        member = self.state.members.get(requester.worker)
        if member is None or member.incarnation != requester.incarnation:
            member = members.find(self.state, requester.worker, requester.incarnation)  # says why there is none
        if not 0 <= requester.slot < len(member.slots) or requester.request < 1:
            raise BadRequest(
                f"slot {requester.slot}, request {requester.request} of worker {requester.worker!r}: it joined with "
                f"{len(member.slots)} slots, counted from 0, and requests count from 1"
            )
        slot = member.slots[requester.slot]
        if requester.request < slot.request:
            raise StaleRequest(
                f"request {requester.request} of slot {requester.slot} of worker {requester.worker!r} came after "
                f"request {slot.request}: request numbers only rise, and only the newest may be retried"
            )
        return slot

    def _refuse_other_gradient(self, slot: Slot, given: Push) -> None:
        # Who begins to count anew must not take another gradient's result for its own, and lose its gradient.
        if slot.redeemed is not None and slot.redeemed != given.ticket_key:
            raise StaleRequest(
                f"request {given.request} of slot {given.slot} of worker {given.worker!r} was for ticket "
                f"{slot.redeemed[1]} and comes again for ticket {given.ticket}: numbers rise with every new gradient"
            )

    def _refuse_other_kind(self, given: Push) -> None:
        most = self.run.local_steps
        if not (1 <= given.local_steps <= most if most else given.local_steps == 0):
            expected = f"1 to {most}, as the server has --local-steps {most}" if most else "0, a gradient"
            raise BadRequest(
                f"request {given.request} of slot {given.slot} of worker {given.worker!r} holds {given.local_steps} "
                f"local steps: this run takes {expected}"
            )

    def _refuse_finished(self) -> None:
        if self.state.finished:
            raise self._over()

    def _over(self) -> Finished:
        state = self.state
        return Finished(f"the run is over after {state.iteration} gradients and {state.samples} samples")

    def _refuse_other_slots(self, member: Member, slots: int) -> None:
        if slots != len(member.slots):
            raise BadRequest(
                f"worker {member.worker!r} joined with {len(member.slots)} slots and now asks for {slots}: leave first"
            )

    def _refuse_newcomer(self, worker: str, slots: int) -> None:
        self._refuse_finished()
        self.scheduler.check_slots(slots)
        members = self.state.members
        if worker not in members and len(members) >= self.run.max_workers:
            raise TooManyWorkers(
                f"{len(members)} workers have joined and max_workers is {self.run.max_workers}: raise it or wait until "
                "one leaves",
                retry_seconds=5.0,
            )


def _too_large(given: Push, norm: float, landing: Landing) -> NormTooLarge:
    return NormTooLarge(
        f"the gradient of worker {given.worker!r}, request {given.request}, has norm {norm:.4g}: with a "
        f"step size of {landing.step_size:.4g} the parameters might become infinite, so it was not applied; its "
        "ticket stays valid, unless the exchange asked for the next one. Lower the learning rate, or clip or "
        "rescale the gradient",
        worker=given.worker,
    )


def _redeemed(ticket: Ticket, result: PushResult) -> Redeemed:
    return Redeemed(
        ticket.iteration,
        ticket.bucket,
        ticket.handed_out_seconds,
        result.delay,
        result.lag_buckets,
        result.step_size,
        result.discarded,
        result.iteration,
        result.buffers_kept,
    )
