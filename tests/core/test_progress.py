"""A model of what workers may do to a run, driven at random: nobody ever waits for something that can't happen."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core.driving import Driver, driver_of, fingerprint, replay, run_of, told_by
from ormo_server.core.errors import Finished, NotAMember, Replaced, StaleRequest, TicketUnknown, TooManyWorkers
from ormo_server.core.ids import SlotKey, TicketKey
from ormo_server.core.inputs import Gradient, Join, Leave, Push, Request, Requester
from ormo_server.core.machine import StateMachine

NAMES = st.sampled_from(["a", "b", "c", "d"])
WHICH = st.integers(0, 20)  # taken modulo the number of what there is to choose from
WORK = ["everybody"] * 3 + ["exchange"] * 12 + ["push", "request", "request_again", "push_again"]
LOSSES = ["give_back", "time_out", "stop_listening"]
MISBEHAVIOUR = ["replaced_one", "stranger", "older_request", "used_ticket", "foreign_ticket"]
MAX_WORKERS = 3
RESULT_FIELDS = ("request", "epoch", "iteration", "delay", "lag_buckets", "step_size", "discarded")


class Workers(RuleBasedStateMachine):
    """Joins, deaths, replacements, requests, retries, pushes, returns and timeouts, legal and not.

    Two rules with many verbs, not one rule a verb: hypothesis leaves whole rules out of a run, and a run in which
    nobody works shows nothing. A run of 50 steps applies about 10 gradients.
    """

    scheduler = ""

    @initialize(
        min_workers=st.sampled_from([1, 1, 2]),
        discard=st.sampled_from([None, 2]),
        stop=st.sampled_from([0, 0, 12]),
        bound=st.sampled_from([0, 1, 2, 4]),
        waits_for_idle=st.booleans(),
    )
    def start(self, min_workers: int, discard: int | None, stop: int, bound: int, waits_for_idle: bool) -> None:
        self.driver: Driver = driver_of(
            run_of(
                scheduler=self.scheduler,
                min_workers=min_workers,
                max_workers=MAX_WORKERS,
                discard_delay=discard,
                stop_after_gradients=stop,
                staleness_bound=bound if self.scheduler == "bounded-staleness" else None,
                waits_for_idle=waits_for_idle and self.scheduler == "synchronous",
            )
        )
        self.machine, self.state = self.driver.machine, self.driver.machine.state
        self.inputs = told_by(self.machine)
        self.next_incarnation = 1
        self.replaced: list[tuple[str, int]] = []
        self.redeemed: set[TicketKey] = set()
        self.joined_at_once = False  # min_workers have been there
        self.join("a", 2)

    # Legal

    @rule(verb=st.sampled_from(["join", "join", "join_again", "replace", "die"]), name=NAMES, slots=st.integers(1, 3))
    def come_or_go(self, verb: str, name: str, slots: int) -> None:
        if verb == "join":
            self.join(name, slots)
        elif name in self.driver.incarnations:
            getattr(self, verb)(name)

    def join(self, name: str, slots: int) -> None:
        if name in self.driver.incarnations:
            return
        slots = 1 if self.scheduler == "synchronous" else slots
        self.next_incarnation += 1
        incarnation = self.next_incarnation
        if self.state.finished:
            self.refused(Finished, lambda: self.driver.join(name, slots, incarnation))
        elif len(self.driver.incarnations) == MAX_WORKERS:
            self.refused(TooManyWorkers, lambda: self.driver.join(name, slots, incarnation))
        else:
            self.driver.join(name, slots, incarnation)
        self.joined_at_once |= len(self.driver.incarnations) >= self.machine.run.min_workers

    def join_again(self, name: str) -> None:
        before = self.everything()
        member = self.state.members[name]
        assert self.driver.join(name, len(member.slots), member.incarnation) == member
        assert self.everything() == before

    def replace(self, name: str) -> None:
        self.next_incarnation += 1
        if self.state.finished:
            self.refused(Finished, lambda: self.driver.join(name, 1, self.next_incarnation))
        else:
            self.replaced.append((name, self.driver.incarnations[name]))
            self.driver.join(name, 1, self.next_incarnation)

    def die(self, name: str) -> None:
        self.driver.leave(name)

    @rule(verb=st.sampled_from(WORK + LOSSES + MISBEHAVIOUR), which=WHICH)
    def act(self, verb: str, which: int) -> None:
        if verb not in WORK:
            getattr(self, verb)(which)
        elif self.driver.places:
            getattr(self, verb)(self.place(which))

    def exchange(self, key: SlotKey) -> None:
        self.push(key)
        self.request(key)

    def everybody(self, key: SlotKey) -> None:
        for each in self.driver.places:
            self.exchange(each)

    def request(self, key: SlotKey) -> None:
        if self.state.finished:
            self.refused(Finished, lambda: self.driver.request(*key))
        else:
            self.driver.request(*key)
            assert self.state.slot(key).result is None

    def request_again(self, key: SlotKey) -> None:
        if self.driver.places[key].request and not self.state.finished:
            kept = self.state.slot(key).result
            self.driver.request(*key, number=self.driver.places[key].request)
            assert self.state.slot(key).result == kept

    def push(self, key: SlotKey) -> None:
        if self.driver.places[key].granted is None:
            return
        ticket, before = self.driver.ticket(*key), self.state.iteration
        if self.state.finished:
            self.refused(Finished, lambda: self.driver.push(key[0], 1.0, key[1]))
        elif self.state.slot(key).ticket != ticket:  # it timed out
            self.refused(TicketUnknown, lambda: self.driver.push(key[0], 1.0, key[1]))
            self.driver.places[key].granted = None
        else:
            result = self.driver.push(key[0], 1.0, key[1])
            assert ticket not in self.redeemed
            self.redeemed.add(ticket)
            assert result.lag_buckets >= 0
            assert result.delay >= 0
            assert result.iteration == self.state.iteration == before + (not result.discarded)
            assert not result.repeated

    def push_again(self, key: SlotKey) -> None:
        first = self.driver.places[key].result
        if first is not None:
            before, ticket = self.everything(), self.driver.machine.state.slot(key).redeemed
            again = self.driver.push(key[0], 7.0, key[1], number=first.request, ticket=ticket)
            assert again.repeated
            assert [getattr(again, name) for name in RESULT_FIELDS] == [getattr(first, name) for name in RESULT_FIELDS]
            assert self.everything() == before

    def give_back(self, which: int) -> None:
        holders = [key for key, place in self.driver.places.items() if place.granted is not None]
        if holders:
            key = holders[which % len(holders)]
            in_flight = self.state.slot(key).ticket == self.driver.ticket(*key)
            assert self.driver.hand_back(*key) == in_flight

    def time_out(self, which: int) -> None:
        tickets = list(self.state.tickets.values())
        if tickets:
            ticket = tickets[which % len(tickets)]
            worker = ticket.slot[0]
            assert self.driver.give_back(worker, ticket.key)

    def stop_listening(self, which: int) -> None:
        waiting = list(self.state.waiting)
        if waiting:
            self.driver.withdraw(*waiting[which % len(waiting)])

    # Not legal

    def replaced_one(self, which: int) -> None:
        if self.replaced:
            worker, incarnation = self.replaced[which % len(self.replaced)]
            self.refused(Replaced, lambda: self.machine.step(Join(0.0, worker, incarnation, 1)))
            self.refused(Replaced, lambda: self.machine.step(Leave(0.0, worker, incarnation)))
            self.asks_and_pushes(Requester(worker, incarnation, 0, 99), Replaced)

    def stranger(self, which: int) -> None:
        self.asks_and_pushes(Requester("abcd"[which % 4], 0, 0, 1), NotAMember)

    def older_request(self, which: int) -> None:
        used = [key for key, place in self.driver.places.items() if place.request > 1]
        if used:
            key = used[which % len(used)]
            older = self.driver.requester(*key, number=self.driver.places[key].request - 1)
            self.asks_and_pushes(older, StaleRequest)

    def asks_and_pushes(self, requester: Requester, error: type[Exception]) -> None:
        self.refused(error, lambda: self.machine.step(Request(0.0, *requester)))
        epoch, number = next(iter(self.state.tickets), (0, 1))
        gradient = Gradient(self.state.params + 1.0)
        self.refused(error, lambda: self.machine.step(Push(0.0, *requester, number, epoch), gradient))

    def used_ticket(self, which: int) -> None:
        if self.redeemed and self.driver.places:
            ticket = sorted(self.redeemed)[which % len(self.redeemed)]
            self.is_not_redeemed(ticket, self.place(which))

    def foreign_ticket(self, which: int) -> None:
        if self.state.tickets and len(self.driver.places) > 1:
            ticket = list(self.state.tickets.values())[which % len(self.state.tickets)]
            others = [key for key in self.driver.places if key != ticket.slot]
            self.is_not_redeemed(ticket.key, others[which % len(others)])

    def is_not_redeemed(self, ticket: TicketKey, by: SlotKey) -> None:
        error = Finished if self.state.finished else TicketUnknown
        self.refused(error, lambda: self.driver.push(by[0], 1.0, by[1], ticket=ticket))

    def refused(self, error: type[Exception], attempt: Callable[[], object]) -> None:
        """The attempt raises this, so that nobody hears of it, and leaves all of the state as it was."""
        before = self.everything()
        with pytest.raises(error):
            attempt()
        assert self.everything() == before

    def everything(self) -> object:
        """All of the state, and how many inputs took effect."""
        return fingerprint(self.machine), len(self.inputs)

    # What must hold after every step

    @invariant()
    def iteration_counts_the_applied_gradients(self) -> None:
        assert self.state.iteration == len(self.driver.applied)

    @invariant()
    def k_is_the_number_of_live_slots(self) -> None:
        assert self.machine.bucket_size == max(1, len(self.driver.places))

    @invariant()
    def slots_and_tickets_in_flight_agree(self) -> None:
        held = {key: self.state.slot(key).ticket for key in self.driver.places}
        in_flight = {ticket.slot: key for key, ticket in self.state.tickets.items()}
        assert {key: ticket for key, ticket in held.items() if ticket is not None} == in_flight
        assert not set(self.state.waiting) & set(in_flight)

    @invariant()
    def no_ticket_before_min_workers_and_none_after_the_end(self) -> None:
        if not self.joined_at_once or self.state.finished:
            assert not self.state.tickets
        if self.state.finished:
            assert not self.state.waiting

    @invariant()
    def an_undelivered_ticket_has_its_parameters(self) -> None:
        undelivered = any(not ticket.delivered for ticket in self.state.tickets.values())
        needed = undelivered or self.may_come_in()
        assert needed == (self.state.round_params is not None)

    def may_come_in(self) -> bool:
        end = self.state.round_tickets[1]
        of_opening = any(ticket.number < end for ticket in self.state.tickets.values())
        return of_opening or (bool(self.state.tickets) and end > 0 and self.state.next_ticket < end + 4)

    @invariant()
    def somebody_can_go_on(self) -> None:
        if not self.joined_at_once or self.state.finished or not self.state.members:
            return
        if self.scheduler == "asynchronous":
            assert not self.state.waiting
        elif self.scheduler == "bounded-staleness":
            # Who holds a ticket can push: it does not wait itself.
            assert self.state.tickets or not self.state.waiting
        else:
            # A round is open, and the holder of each of its tickets can push (delivered) or ask (not delivered): it
            # does not wait itself, which `slots_and_tickets_in_flight_agree` sees to. Or all who live are idle: whoever
            # asks is not.
            idle = all(self.state.slot(key).idle for key in self.driver.places)
            assert self.state.tickets or (idle and not self.machine.run.waits_for_idle)

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.everybody_goes_on()
            other = StateMachine.fresh(self.machine.run, torch.zeros(1))
            replay(other, self.inputs, self.driver.gradients)
            assert fingerprint(other) == fingerprint(self.machine)

    def everybody_goes_on(self) -> None:
        """All who live do what they can, twice: that is enough to close a round and to push in the next."""
        if self.joined_at_once and self.state.members and not self.state.finished:
            before = self.state.iteration
            for key in [*self.driver.places] * 2:
                self.do_what_it_can(key)
            assert self.state.iteration > before

    def do_what_it_can(self, key: SlotKey) -> None:
        if self.state.finished or key in self.state.waiting:
            return
        self.push(key)
        if not self.state.finished and self.driver.places[key].granted is None:
            self.driver.request(*key)
            self.push(key)

    def place(self, which: int) -> SlotKey:
        return list(self.driver.places)[which % len(self.driver.places)]


class AsynchronousWorkers(Workers):
    scheduler = "asynchronous"


class SynchronousWorkers(Workers):
    scheduler = "synchronous"

    @invariant()
    def nobody_is_kept_out_of_a_round_that_may_be_come_into_but_who_has_pushed_in_it(self) -> None:
        if self.may_come_in():
            redeemed = [self.state.slot(key).redeemed for key in self.state.waiting]
            assert all(key is not None and key[1] >= self.state.round_tickets[0] for key in redeemed)

    @invariant()
    def all_of_a_round_have_its_bucket_and_the_iteration_of_its_opening(self) -> None:
        assert len({(ticket.bucket, ticket.iteration) for ticket in self.state.tickets.values()}) <= 1


class BoundedWorkers(Workers):
    scheduler = "bounded-staleness"

    @invariant()
    def no_gradient_was_later_than_the_bound(self) -> None:
        bound = self.machine.run.method.staleness_bound
        assert all(each.delay <= bound for each in self.driver.applied)


EFFORT = settings(max_examples=100, stateful_step_count=50, deadline=None)
AsynchronousWorkers.TestCase.settings = EFFORT
SynchronousWorkers.TestCase.settings = EFFORT
BoundedWorkers.TestCase.settings = EFFORT
TestNobodyIsStuckAsynchronously = AsynchronousWorkers.TestCase
TestNobodyIsStuckInRounds = SynchronousWorkers.TestCase
TestNobodyIsStuckUnderABound = BoundedWorkers.TestCase


def test_waiting_ones_hear_why_they_wait_no_longer() -> None:
    driver = driver_of(run_of(scheduler="bounded-staleness", staleness_bound=0), "a")
    driver.request("a")
    for worker in ("leaver", "twin"):
        driver.join(worker)
        driver.request(worker)
    effects = [driver.machine.step(each) for each in (Leave(0.0, "leaver", 1), Join(0.0, "twin", 2, 1))]
    assert not any(each.granted for each in effects)
    released = [event for each in effects for event in each.released]
    assert [(event.slot[0], type(event.error)) for event in released] == [("leaver", NotAMember), ("twin", Replaced)]
