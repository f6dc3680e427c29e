"""No gradient is later than the bound, and nobody waits for more than that takes."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings

from core.driving import Driver, driver_of, run_of, told_by
from core.scripts import START, Command, carry_out, runs, stories
from ormo_server.core.ids import SlotKey
from ormo_server.core.inputs import Join, Leave, Push, Request, Return, Withdraw
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import Run
from ormo_server.core.schedulers import SCHEDULERS
from ormo_server.trace import Recorded


def bounded(bound: int, *workers: str, slots: int = 1, **settings: object) -> Driver:
    """A run with these workers; all of their slots have asked for a ticket, in order."""
    run = run_of("sgd", "bounded-staleness", staleness_bound=bound, **settings)
    driver = driver_of(run, *workers, slots=slots)
    for key in driver.places:
        driver.request(*key)
    return driver


def busy(driver: Driver) -> list[SlotKey]:
    """The slots that hold a ticket, oldest first."""
    return [ticket.slot for ticket in driver.machine.state.tickets.values()]


# A model of the policy that shares nothing with it: it goes by the inputs alone.


class Model:
    """Who holds a ticket of which iteration, oldest first, and who waits."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.iteration = self.handed_out = 0
        self.in_flight: list[tuple[int, SlotKey, int]] = []  # number, slot, iteration
        self.queue: list[SlotKey] = []

    def take(self, taken: Recorded) -> None:
        given, redeemed = taken
        if isinstance(given, Join | Leave):
            self.forget(lambda number, slot: slot[0] == given.worker)
            self.queue = [slot for slot in self.queue if slot[0] != given.worker]
        if isinstance(given, Request):
            self.forget(lambda number, slot: slot == (given.worker, given.slot))
            if (given.worker, given.slot) not in self.queue:
                self.queue.append((given.worker, given.slot))
        if isinstance(given, Withdraw):
            self.queue.remove((given.worker, given.slot))
        if isinstance(given, Return | Push):
            self.forget(lambda number, slot: number == given.ticket)
        if redeemed is not None:
            self.iteration += not redeemed.discarded
        while self.queue and self.allows_one_more():
            self.handed_out += 1
            self.in_flight.append((self.handed_out, self.queue.pop(0), self.iteration))

    def forget(self, is_meant: Callable[[int, SlotKey], bool]) -> None:
        self.in_flight = [each for each in self.in_flight if not is_meant(*each[:2])]

    def allows_one_more(self) -> bool:
        if not self.in_flight:
            return True
        oldest = min(iteration for _, _, iteration in self.in_flight)
        return self.iteration - oldest + len(self.in_flight) <= self.bound


@settings(max_examples=150, deadline=None)
@given(run=runs(schedulers=["bounded-staleness"]), story=stories())
def test_in_every_story_nobody_is_late_by_more_than_the_bound_nor_waits_while_it_allows_more(
    run: Run, story: list[Command]
) -> None:
    bound = run.method.staleness_bound
    driver, model = Driver(StateMachine.fresh(run, START.clone())), Model(bound)
    told = told_by(driver.machine)
    for command in story:
        carry_out(driver, command)
        while told:
            model.take(told.pop(0))
        state = driver.machine.state
        assert [(each.number, each.slot, each.iteration) for each in state.tickets.values()] == model.in_flight
        assert list(state.waiting) == model.queue
        assert state.tickets or not state.waiting
    assert all(each.delay <= bound for each in driver.applied)


# By hand


def test_a_fast_worker_gets_so_far_ahead_that_a_slow_ones_gradient_is_as_late_as_the_bound_allows() -> None:
    driver = bounded(3, "fast", "slow")
    ahead = []
    while ("fast", 0) in busy(driver):
        driver.exchange("fast", 1.0)
        ahead.append(driver.machine.state.iteration)
    assert ahead == [1, 2, 3]
    assert driver.push("slow", 1.0).delay == 3
    assert busy(driver) == [("fast", 0)]


@pytest.mark.parametrize(
    ("slots", "bound", "at_once"), [(1, 0, 1), (4, 0, 1), (4, 1, 2), (4, 2, 3), (4, 3, 4), (4, 9, 4)]
)
def test_as_many_slots_are_busy_at_once_as_the_bound_allows_and_the_others_are_called_idle(
    slots: int, bound: int, at_once: int
) -> None:
    driver = bounded(bound, "a", slots=slots)
    assert len(busy(driver)) == at_once
    assert driver.machine.scheduler.idle_slots(slots) == slots - at_once


@pytest.mark.parametrize("scheduler", sorted(set(SCHEDULERS) - {"bounded-staleness"}))
def test_without_a_bound_no_slot_is_idle(scheduler: str) -> None:
    assert SCHEDULERS[scheduler]().idle_slots(1000) == 0


@pytest.mark.parametrize(("bound", "waits"), [(6, False), (5, True)])
def test_workers_that_take_turns_never_wait_if_the_bound_is_2k_less_2(bound: int, waits: bool) -> None:
    driver = bounded(bound, *"abcd")
    waited = []
    for worker in "abcd" * 3:
        if driver.places[worker, 0].granted is not None:
            driver.exchange(worker, 1.0)
            waited += driver.machine.state.waiting
    assert bool(waited) == waits


def test_a_bound_of_0_is_one_ticket_at_a_time_in_turn() -> None:
    driver = bounded(0, *"abc")
    turns = []
    for _ in range(7):
        ((worker, slot),) = busy(driver)
        turns.append(worker)
        assert driver.exchange(worker, 1.0, slot).delay == 0
    assert "".join(turns) == "abcabca"


def test_who_asked_first_is_served_first_and_asking_again_loses_no_place_but_withdrawing_does() -> None:
    driver = bounded(0, *"abcd")
    driver.request("b")
    driver.withdraw("c")
    driver.request("c")
    served = []
    for _ in range(4):
        ((worker, slot),) = busy(driver)
        served.append(worker)
        driver.push(worker, 1.0, slot)
    assert served == ["a", "b", "d", "c"]


def gone(driver: Driver, how: str) -> None:
    if how == "leaves":
        driver.leave("dead")
    elif how == "is replaced":
        driver.join("dead", incarnation=2)
    else:
        driver.hand_back("dead")  # as its driver does when the ticket was out for too long


@pytest.mark.parametrize("how", ["leaves", "is replaced", "loses its ticket"])
@pytest.mark.parametrize("bound", [0, 1, 4])
def test_a_dead_worker_keeps_others_waiting_only_until_its_ticket_is_void(how: str, bound: int) -> None:
    driver = bounded(bound, "dead", "a", "b")
    while busy(driver) != [("dead", 0)]:
        worker, slot = busy(driver)[-1]
        driver.exchange(worker, 1.0, slot)
    assert {slot for slot, _ in driver.machine.state.waiting} == {"a", "b"}
    gone(driver, how)
    assert len(busy(driver)) == min(2, bound + 1)
    for _ in range(10):
        worker, slot = busy(driver)[0]
        driver.exchange(worker, 1.0, slot)
    assert {each.holder[0] for each in driver.applied[-4:]} == {"a", "b"}
