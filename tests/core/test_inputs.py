"""The inputs that took effect are enough to do it all again."""

import pytest
import torch
from hypothesis import given, settings

from core.driving import Driver, driver_of, fingerprint, replay, run_of, told_by
from core.scripts import START, Command, carry_out, runs, stories
from ormo_server.core import snapshot
from ormo_server.core.effects import Redeemed
from ormo_server.core.errors import BadRequest, Finished, NotAMember, OrmoError, Replaced, StaleRequest, TicketUnknown
from ormo_server.core.inputs import Gradient, Input, Join, Leave, Push, Request, Return, Withdraw
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import Run
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.trace import Recorded


def fresh(run: Run) -> StateMachine:
    return StateMachine.fresh(run, START.clone(), torch.zeros(2), torch.zeros(1, dtype=torch.int64))


@settings(max_examples=200, deadline=None)
@given(run=runs(UPDATE_RULES), story=stories("tune"))
def test_the_inputs_of_any_story_lead_another_machine_to_the_same_bits(run: Run, story: list[Command]) -> None:
    driver = Driver(fresh(run))
    told = told_by(driver.machine)
    for command in story:
        carry_out(driver, command)
    other = fresh(run)
    replay(other, told, driver.gradients)
    assert fingerprint(other) == fingerprint(driver.machine)


@settings(max_examples=60, deadline=None)
@given(run=runs(UPDATE_RULES), before=stories("tune"), after=stories("tune"))
def test_the_inputs_since_a_restore_do_so_from_the_same_snapshot(
    run: Run, before: list[Command], after: list[Command]
) -> None:
    driver = Driver(fresh(run))
    for command in before:
        carry_out(driver, command)
    taken = snapshot.take(driver.machine)
    driver.machine, other = (
        snapshot.restore(run, snapshot.Snapshot(clones(taken.tensors), taken.fields), epoch=1, keep_tickets=True)
        for _ in range(2)
    )
    told = told_by(driver.machine)
    for command in after[4:]:  # without its joins
        carry_out(driver, command)
    replay(other, told, driver.gradients)
    assert fingerprint(other) == fingerprint(driver.machine)


def clones(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_buffers_and_samples_come_again_with_their_gradients() -> None:
    run = run_of(stop_after_samples=9)
    driver = Driver(fresh(run))
    told = told_by(driver.machine)
    driver.join("a")
    while not driver.machine.state.finished:
        driver.request("a")
        buffers = {"float_buffers": torch.tensor([0.5, driver.now]), "int_buffers": torch.tensor([int(driver.now)])}
        driver.push("a", START, samples=4, **buffers)
    other = fresh(run)
    replay(other, told, driver.gradients)
    assert fingerprint(other) == fingerprint(driver.machine)
    assert (other.state.finished, other.state.samples, other.state.iteration) == (True, 12, 3)


def test_each_input_is_told_once_in_order_with_its_time() -> None:
    driver = driver_of(run_of(scheduler="bounded-staleness", staleness_bound=0))
    told = told_by(driver.machine)
    driver.join("a", slots=2, incarnation=5)
    driver.request("a", 0)
    first = driver.granted[0].ticket
    driver.request("a", 1)
    driver.withdraw("a", 1)
    result = driver.push("a", 1.0, 0, samples=7)
    driver.request("a", 0)
    driver.hand_back("a", 0)
    driver.join("a", slots=1, incarnation=6)
    driver.leave("a")
    assert [each.input for each in told] == [
        Join(1.0, "a", 5, 2),
        Request(2.0, "a", 5, 0, 1),
        Request(3.0, "a", 5, 1, 1),
        Withdraw("a", 1),
        Push(4.0, "a", 5, 0, 2, 1, 0, samples=7),
        Request(5.0, "a", 5, 0, 3),
        Return(6.0, "a", 5, 2, 0),
        Join(7.0, "a", 6, 1),  # in the place of incarnation 5, which is not told of
        Leave(8.0, "a", 6),
    ]
    assert (first.number, first.epoch, result.request) == (1, 0, 2)
    assert [each.redeemed for each in told if each.redeemed is not None] == [
        Redeemed(first.iteration, first.bucket, 2.0, 0, 0, result.step_size, discarded=False, iteration_after=1)
    ]


def running() -> Driver:
    """a has a kept result of request 2, b holds a ticket, and was replaced once."""
    driver = driver_of(run_of(), "a", "b")
    driver.join("b", incarnation=2)
    for worker in "ab":
        driver.request(worker)
    driver.push("a", 1.0)
    return driver


def test_what_is_repeated_and_what_does_nothing_is_not_told() -> None:
    driver = running()
    told = told_by(driver.machine)
    driver.take(Join(99.0, "a", 1, 1))
    assert driver.push("a", 1.0, number=2, ticket=(0, 1)).repeated
    driver.withdraw("a")
    driver.withdraw("nobody")
    assert not driver.give_back("a", driver.ticket("b"))
    assert not driver.take(Leave(99.0, "a", 7)).changed
    assert not driver.take(Leave(99.0, "nobody", 1)).changed
    assert told == []


def test_a_request_that_is_repeated_takes_effect_and_is_told() -> None:
    driver = running()
    told = told_by(driver.machine)
    old = driver.ticket("b")
    driver.request("b", number=1)
    assert told == [Recorded(Request(driver.now, "b", 2, 0, 1))]
    assert driver.ticket("b") != old


REFUSED = [
    (Replaced, Join(99.0, "b", 1, 1)),
    (Replaced, Leave(99.0, "b", 1)),
    (BadRequest, Join(99.0, "a", 1, 2)),
    (BadRequest, Join(99.0, "c", 1, 17)),
    (NotAMember, Request(99.0, "c", 1, 0, 1)),
    (StaleRequest, Request(99.0, "a", 1, 0, 1)),
    (NotAMember, Push(99.0, "c", 1, 0, 1, 2, 0)),
    (TicketUnknown, Push(99.0, "a", 1, 0, 3, 2, 0)),
]


@pytest.mark.parametrize(("error", "given"), REFUSED)
def test_what_is_refused_is_not_told_and_changes_nothing(error: type[OrmoError], given: Input) -> None:
    driver = running()
    assert driver.ticket("b") == (0, 2)
    told, before = told_by(driver.machine), fingerprint(driver.machine)
    with pytest.raises(error):
        driver.take(given, Gradient(torch.ones(1)))
    assert (told, fingerprint(driver.machine)) == ([], before)


def test_after_the_end_only_who_leaves_is_told() -> None:
    driver = driver_of(run_of(stop_after_gradients=1), "a", "b")
    driver.request("a")
    driver.push("a", 1.0)
    told = told_by(driver.machine)
    for attempt in (lambda: driver.request("a"), lambda: driver.join("c")):
        with pytest.raises(Finished):
            attempt()
    driver.leave("b")
    assert told == [Recorded(Leave(driver.now, "b", 1))]
