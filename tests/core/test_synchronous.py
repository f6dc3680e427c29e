"""Rounds, and that OrMo in rounds is SGD with momentum."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.driving import Driver, driver_of, fingerprint, run_of
from core.reference import closed_form, round_sums, rounding, torch_sgd
from core.scripts import BETAS, START, Command, carry_out, learning_rates, stories
from ormo_server.core import snapshot
from ormo_server.core.errors import BadRequest, SettingsError, TicketUnknown
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import Method, Run
from ormo_server.core.step_size import LearningRate

SSGDM = Method(rule="ormo", scheduler="synchronous")


def rounds_of(*workers: str, **settings: object) -> Driver:
    """A run in rounds whose first opens when all of these have joined; each has asked for its ticket."""
    driver = driver_of(run_of(scheduler="synchronous", min_workers=len(workers), **settings), *workers)
    for worker in workers:
        driver.request(worker)
    return driver


# Equal to torch.optim.SGD. Both references are in float64, so all of the difference is the core's own rounding, for
# which `rounding` is a bound.


@settings(max_examples=100, deadline=None)
@given(story=stories(), beta=BETAS, lr=st.sampled_from([0.01, 0.3, 1.0]))
def test_rounds_are_torch_sgd_on_what_came_in_while_workers_die_and_join(
    story: list[Command], beta: float, lr: float
) -> None:
    driver = Driver(StateMachine.fresh(Run(LearningRate(lr), SSGDM, beta), START.clone()))
    for command in story:
        carry_out(driver, command)
        *_, expected = torch_sgd(START, [total for _, total in round_sums(driver.applied)], lr, beta)
        difference = (driver.machine.state.params.double() - expected).abs()
        # As much again for the reference's own, far smaller, roundings.
        assert bool((difference <= 2 * rounding(START, driver.applied, beta)).all()), (difference, expected)


@settings(max_examples=60, deadline=None)
@given(story=stories(), beta=st.sampled_from([0.5, 0.9]), lr=st.sampled_from([0.25, 0.3]))
def test_rounds_of_ordered_nesterov_momentum_are_torchs_nesterov_on_what_came_in(
    story: list[Command], beta: float, lr: float
) -> None:
    method = replace(SSGDM, rule="ormo-nesterov")
    driver = Driver(StateMachine.fresh(Run(LearningRate(lr), method, beta), START.clone()))
    for command in story:
        carry_out(driver, command)
        totals = [total for _, total in round_sums(driver.applied)]
        *_, expected = torch_sgd(START, totals, lr, beta, nesterov=True)
        difference = (driver.machine.state.params.double() - expected).abs()
        assert bool((difference <= 2 * rounding(START, driver.applied, beta)).all()), (difference, expected)


@settings(max_examples=60, deadline=None)
@given(story=stories(), beta=BETAS, schedule=learning_rates())
def test_with_a_schedule_a_round_is_one_step_of_momentum_at_the_rate_of_its_opening(
    story: list[Command], beta: float, schedule: LearningRate
) -> None:
    driver = Driver(StateMachine.fresh(Run(schedule, SSGDM, beta), START.clone()))
    for command in story:
        carry_out(driver, command)
    params, momentum = START.double(), torch.zeros_like(START).double()
    for opening, total in round_sums(driver.applied):
        momentum = beta * momentum + schedule.at(opening) * total
        params = params - momentum
    allowed = rounding(START, driver.applied, beta)
    assert bool(((driver.machine.state.params.double() - params).abs() <= allowed).all())
    assert bool(((driver.machine.state.rule.vectors["momentum"].double() - momentum).abs() <= allowed).all())


@pytest.mark.parametrize("waits_for_idle", [False, True])
def test_three_rounds_by_hand_with_a_death_and_a_joiner(waits_for_idle: bool) -> None:
    driver = rounds_of("a", "b", "c", waits_for_idle=waits_for_idle)
    for worker in "abc":
        driver.push(worker, 1.0)
    assert driver.machine.state.params == -3  # u = 3
    driver.join("d")  # after the opening
    for worker in "abc":
        driver.request(worker)
    driver.push("a", 1.0)
    driver.leave("b")
    late = driver.request("d")
    driver.push("c", 1.0)
    if late is not None:
        assert driver.places["d", 0].params == -3
        driver.push("d", 1.0)
        driver.request("d")
    total = 2 if waits_for_idle else 3
    assert driver.machine.state.params == -3 - (1.5 + total)  # u = 1.5 + total
    for worker in "ac":
        driver.request(worker)
    for worker in "acd":
        driver.push(worker, 2.0)
    assert driver.machine.state.params == -4.5 - total - (0.75 + 0.5 * total + 6)


def test_a_round_in_which_nothing_was_applied_is_no_bucket() -> None:
    driver = rounds_of("a", "b")
    for bucket in (0, 1):
        for worker in "ab":
            driver.hand_back(worker)
        for worker in "ab":
            driver.request(worker)
        assert [ticket.bucket for ticket in driver.machine.state.tickets.values()] == [bucket, bucket]
        for worker in "ab":
            driver.push(worker, 1.0)
        for worker in "ab":
            driver.request(worker)


def test_a_round_closes_only_when_each_of_its_tickets_is_applied_returned_or_void() -> None:
    driver = rounds_of("a", "b", "c", "d")
    driver.push("a", 1.0)
    assert driver.request("a") is None
    driver.hand_back("b")
    assert driver.places["a", 0].granted is None
    driver.leave("c")
    assert driver.places["a", 0].granted is None
    driver.push("d", 1.0)
    assert driver.places["a", 0].granted is not None
    assert [ticket.slot[0] for ticket in driver.machine.state.tickets.values()] == ["a", "d"]


# Who comes after a round's opening


def test_a_joiner_comes_into_the_open_round_with_the_parameters_of_its_opening() -> None:
    driver = rounds_of("a", "b")
    driver.push("a", 1.0)
    driver.join("c")
    granted = driver.request("c")
    assert granted is not None
    assert (granted.ticket.bucket, granted.ticket.iteration) == (0, 0)
    assert driver.places["c", 0].params == 0.0
    driver.push("b", 1.0)
    assert driver.request("a") is None  # this round is the joiner's, too
    driver.push("c", 1.0)
    assert [(each.bucket, each.step_size) for each in driver.applied] == [(0, 1.0)] * 3
    assert driver.places["a", 0].params == -3.0


def test_who_has_pushed_in_a_round_waits_for_the_next() -> None:
    driver = rounds_of("a", "b")
    driver.push("a", 1.0)
    assert driver.request("a") is None
    assert driver.request("a") is None
    driver.leave("a")
    driver.join("a")  # the same process
    assert driver.request("a") is None


def test_a_round_takes_in_four_at_most_once_only_those_are_left_who_came_after_its_opening() -> None:
    driver = rounds_of("a")
    driver.join("late")
    driver.request("late")
    driver.push("a", 1.0)
    for worker in ("l2", "l3", "l4"):
        driver.join(worker)
        assert driver.request(worker) is not None
    driver.join("l5")
    assert driver.request("l5") is None
    assert driver.machine.state.round_params is None
    for worker in ("late", "l2", "l3", "l4"):
        driver.push(worker, 1.0)
    granted = driver.places["l5", 0].granted
    assert granted is not None
    assert granted.ticket.bucket == 1


def test_a_joiner_does_not_wait_for_an_idle_one_that_came_into_the_same_round() -> None:
    driver = rounds_of("a")
    driver.join("idle")
    driver.request("idle")
    driver.push("a", 1.0)
    driver.join("b")
    assert driver.request("b") is not None


def test_a_worker_that_asks_again_and_again_keeps_no_round_open() -> None:
    driver = rounds_of("a", "again")
    before = driver.ticket("again")
    granted = driver.request("again")
    assert granted is not None
    assert granted.ticket.key != before
    driver.push("a", 1.0)
    driver.request("a")
    assert driver.places["a", 0].granted is None
    driver.request("again")  # it held the last ticket of the round
    assert driver.places["a", 0].granted is not None


def test_for_files_of_earlier_versions_a_joiner_waits_for_the_next_opening() -> None:
    driver = rounds_of("a", waits_for_idle=True)
    driver.join("b")
    assert driver.request("b") is None
    driver.push("a", 1.0)
    granted = driver.places["b", 0].granted
    assert granted is not None
    assert (granted.ticket.bucket, granted.ticket.iteration) == (1, 1)


# Who is idle


def train(driver: Driver, *workers: str) -> int:
    """Each pushes and asks for the next ticket; says how many got it."""
    for worker in workers:
        driver.exchange(worker, 1.0)
    return sum(driver.places[worker, 0].granted is not None for worker in workers)


def test_a_worker_that_let_its_ticket_lapse_costs_one_round_and_none_until_it_asks() -> None:
    driver = rounds_of("a", "idle", "b")
    assert train(driver, "a", "b") == 0  # they wait for the idle one
    assert driver.hand_back("idle")
    for number in range(1, 5):
        assert driver.machine.state.iteration == 2 * number
        assert [ticket.slot[0] for ticket in driver.machine.state.tickets.values()] == ["a", "b"]
        assert train(driver, "a", "b") == 2
    assert driver.request("idle") is not None  # in the round that is open
    assert train(driver, "a", "b") == 0
    assert train(driver, "idle") == 1
    assert [ticket.slot[0] for ticket in driver.machine.state.tickets.values()] == ["a", "idle", "b"]


def test_a_member_that_never_asked_costs_one_round_too() -> None:
    driver = driver_of(run_of(scheduler="synchronous", min_workers=2), "a", "idle")
    driver.request("a")
    assert train(driver, "a") == 0
    (ticket,) = driver.machine.state.tickets.values()
    assert driver.give_back("idle", ticket.key)
    assert [train(driver, "a") for _ in range(3)] == [1, 1, 1]
    assert "idle" in driver.machine.state.members


def test_with_nobody_but_idle_workers_no_round_opens_until_one_asks() -> None:
    driver = rounds_of("a", "b")
    for worker in "ab":
        driver.hand_back(worker)
    driver.join("c")
    driver.leave("c")
    assert not driver.machine.state.tickets
    granted = driver.request("b")
    assert granted is not None
    assert [ticket.slot[0] for ticket in driver.machine.state.tickets.values()] == ["b"]


def test_who_is_idle_is_so_after_a_restart_and_after_joining_again() -> None:
    driver = rounds_of("a", "idle")
    driver.hand_back("idle")
    driver.leave("idle")
    driver.join("idle")
    run, taken = driver.machine.run, snapshot.take(driver.machine)
    driver.machine = snapshot.restore(run, taken, epoch=1, keep_tickets=True)
    assert [train(driver, "a") for _ in range(2)] == [1, 1]


def test_for_files_of_earlier_versions_every_round_waits_for_every_worker() -> None:
    driver = rounds_of("a", "idle", waits_for_idle=True)
    for _ in range(3):
        assert train(driver, "a") == 0
        (ticket,) = driver.machine.state.tickets.values()
        assert driver.give_back("idle", ticket.key)
        assert driver.places["a", 0].granted is not None


# Where rounds begin and what they keep


def test_a_joiner_opens_a_round_at_once_when_none_is_open() -> None:
    driver = rounds_of("a")
    driver.leave("a")
    assert not driver.machine.state.tickets
    driver.join("b")
    assert driver.request("b") is not None


def test_a_new_process_takes_its_predecessors_place_in_the_open_round() -> None:
    driver = rounds_of("a", "b")
    driver.push("a", 1.0)
    driver.join("a", incarnation=2)
    assert driver.request("a") is not None
    driver.push("b", 1.0)
    assert driver.request("b") is None
    driver.push("a", 1.0)
    assert driver.places["b", 0].granted is not None


def test_all_of_a_round_get_the_parameters_of_its_opening_however_late_they_ask() -> None:
    driver = rounds_of("a", "b", "c")
    for worker in "abc":
        driver.push(worker, 1.0)
    driver.request("a")
    driver.push("a", 5.0)
    assert driver.request("b") is not None
    driver.push("b", 5.0)
    late = driver.request("c")
    assert late is not None
    assert [driver.places[worker, 0].params.item() for worker in "abc"] == [-3.0, -3.0, -3.0]
    assert (late.ticket.iteration, late.ticket.bucket) == (3, 1)
    assert driver.machine.state.params != -3.0


def test_the_openings_parameters_are_kept_as_long_as_somebody_may_come_into_the_round() -> None:
    driver = rounds_of("a", "b")
    driver.join("late")
    driver.request("late")
    driver.push("a", 1.0)
    assert driver.machine.state.round_params is not None
    driver.push("b", 1.0)
    assert driver.machine.state.round_params is not None  # it may take in three more
    driver.push("late", 1.0)
    assert driver.machine.state.round_tickets == (4, 7)  # the next round


@pytest.mark.parametrize("last", ["request", "leave"])
def test_for_files_of_earlier_versions_they_are_kept_until_the_last_ticket_is_delivered_or_void(last: str) -> None:
    driver = rounds_of("a", "b", waits_for_idle=True)
    for worker in "ab":
        driver.push(worker, 1.0)
    driver.request("a")
    assert driver.machine.state.round_params is not None
    getattr(driver, last)("b")
    assert driver.machine.state.round_params is None
    assert driver.machine.state.tickets


def test_an_undelivered_ticket_answers_the_next_request_and_is_not_voided_by_it() -> None:
    driver = rounds_of("a")
    driver.push("a", 1.0)
    (waiting,) = driver.machine.state.tickets.values()
    granted = driver.request("a")
    assert granted is not None
    assert granted.ticket.key == waiting.key


def test_a_delivered_ticket_is_voided_by_a_retry_which_gets_another_of_the_round() -> None:
    driver = rounds_of("a", "b")
    voided = driver.ticket("a")
    assert driver.request("a", number=driver.places["a", 0].request) is not None
    with pytest.raises(TicketUnknown):
        driver.push("a", 1.0, ticket=voided)
    driver.push("b", 1.0)
    driver.push("a", 1.0)
    assert [each.bucket for each in driver.applied] == [0, 0]


def test_for_files_of_earlier_versions_a_retry_waits_for_the_next_round() -> None:
    driver = rounds_of("a", "b", waits_for_idle=True)
    voided = driver.ticket("a")
    assert driver.request("a", number=driver.places["a", 0].request) is None
    driver.push("b", 1.0)
    assert driver.ticket("a") != voided


def test_step_scale_and_discard_see_no_delay_in_a_round() -> None:
    driver = rounds_of("a", "b", "c", scale="inverse", discard_delay=1)
    results = [driver.push(worker, 1.0) for worker in "abc"]
    assert [(result.step_size, result.discarded) for result in results] == [(1.0, False)] * 3


def test_rounds_serve_one_slot_a_worker() -> None:
    driver = rounds_of("a")
    before = fingerprint(driver.machine)
    with pytest.raises(BadRequest, match="2 slots were asked for: this run's scheduler serves 1 to 1"):
        driver.join("b", slots=2)
    assert fingerprint(driver.machine) == before


def test_rounds_refuse_a_fixed_bucket_size() -> None:
    with pytest.raises(SettingsError, match="leave the bucket size out"):
        run_of(scheduler="synchronous", bucket_size=4)


def test_after_a_round_the_momentum_is_the_closed_form_with_one_bucket_a_round() -> None:
    driver = rounds_of("a", "b")
    for step in range(1, 5):
        for worker in "ab":
            driver.push(worker, step)
        for worker in "ab":
            driver.request(worker)
    assert [each.bucket for each in driver.applied] == [0, 0, 1, 1, 2, 2, 3, 3]
    params, momentum = closed_form(torch.zeros(1), driver.applied, 0.5)
    assert (driver.machine.state.params, driver.machine.state.rule.vectors["momentum"]) == (params, momentum)
