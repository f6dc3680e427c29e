"""OrMo's state is a function of the gradients that counted, their learning rates and their buckets: nothing else."""

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.driving import Applied, Driver, driver_of, run_of
from core.reference import closed_form, rounding, step_sizes
from core.scripts import BETAS, START, Command, carry_out, gradient, runs, stories
from ormo_server.core import snapshot
from ormo_server.core.inputs import Gradient, Push
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import Run
from ormo_server.core.rules import UPDATE_RULES, Coefficients, Landing
from ormo_server.core.state import State
from ormo_server.core.vectors import BLOCK_ELEMENTS

# How many moves of the momentum each rule has in w before their time.
AHEAD: dict[str, int] = {"ormo": 0, "ormo-nesterov": 1}


def assert_closed_form(driver: Driver, start: torch.Tensor) -> None:
    state, beta = driver.machine.state, driver.machine.run.momentum
    params, momentum = closed_form(start, driver.applied, beta, ahead=AHEAD[driver.machine.run.method.rule])
    allowed = rounding(start, driver.applied, beta)
    assert bool(((state.params.double() - params).abs() <= allowed).all()), (state.params, params)
    assert bool(((state.rule.vectors["momentum"].double() - momentum).abs() <= allowed).all())


@settings(max_examples=150, deadline=None)
@given(run=runs(AHEAD), story=stories())
def test_state_is_the_closed_form_at_every_moment_of_every_story(run: Run, story: list[Command]) -> None:
    driver = Driver(StateMachine.fresh(run, START.clone()))
    for command in story:
        carry_out(driver, command)
        assert_closed_form(driver, START)
    # Doubles on both sides, the same few operations in another order: 1e-12 is thousands of roundings.
    torch.testing.assert_close(
        torch.tensor([each.step_size for each in driver.applied], dtype=torch.float64),
        torch.tensor(step_sizes(run, driver.applied), dtype=torch.float64),
        rtol=1e-12,
        atol=0,
    )


def test_the_closed_form_holds_across_the_blocks_of_a_long_vector() -> None:
    size = 2 * BLOCK_ELEMENTS + 3
    driver = driver_of(run_of(), "a", "b", size=size)
    pattern = torch.arange(size, dtype=torch.float32).remainder(97.0)
    driver.request("a")
    driver.request("b")
    for step in range(3):
        driver.exchange("a", pattern + step)
    driver.push("b", -pattern)
    params, momentum = closed_form(torch.zeros(size), driver.applied, 0.5)
    # Whole numbers below 1000 with halves and quarters: float32 holds every step exactly.
    assert torch.equal(driver.machine.state.params.double(), params)
    assert torch.equal(driver.machine.state.rule.vectors["momentum"].double(), momentum)


def filed_in_order(name: str, triples: list[tuple[int, float, int]], beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    rule, params, newest = UPDATE_RULES[name](START.numel(), Coefficients(beta)), START.clone(), 0
    for value, step_size, bucket in triples:
        opened = max(0, bucket - newest)
        newest += opened
        rule.apply(params, gradient(value), Landing(step_size, opened, newest - bucket, 1, ("w", 0)))
    return params, rule.vectors["momentum"]


TRIPLES = st.lists(st.tuples(st.integers(-8, 8), st.floats(0.001, 1.0), st.integers(0, 12)), min_size=1, max_size=20)


@pytest.mark.parametrize("name", AHEAD)
@settings(max_examples=100, deadline=None)
@given(triples=TRIPLES, beta=BETAS, data=st.data())
def test_given_gradients_with_their_rates_and_buckets_may_arrive_in_any_order(
    name: str, triples: list[tuple[int, float, int]], beta: float, data: st.DataObject
) -> None:
    one = filed_in_order(name, triples, beta)
    other = filed_in_order(name, data.draw(st.permutations(triples)), beta)
    applied = [Applied(gradient(value).double(), eta, bucket, 0, 0, 1) for value, eta, bucket in triples]
    allowed = 2 * rounding(START, applied, beta)  # each of the two is within `rounding` of the closed form
    for mine, theirs in zip(one, other, strict=True):
        assert bool(((mine - theirs).abs() <= allowed).all())


@settings(max_examples=50, deadline=None)
@given(prefix=st.lists(st.integers(0, 7), max_size=20), order=st.permutations(range(8)))
def test_the_tickets_in_flight_may_be_redeemed_in_any_order(prefix: list[int], order: list[int]) -> None:
    driver = driver_of(run_of(bucket_size=2), "a", slots=8)
    for slot in range(8):
        driver.request("a", slot)
    for slot in prefix:  # spreads the tickets over several buckets
        driver.exchange("a", slot, slot)
    one, other = redeemed(driver, range(8)), redeemed(driver, order)
    # 28 whole numbers below 8 and at most 10 halvings: float32 holds every step exactly, so the bits agree.
    assert torch.equal(one.params, other.params)
    assert torch.equal(one.rule.vectors["momentum"], other.rule.vectors["momentum"])


def redeemed(driver: Driver, order: Iterable[int]) -> State:
    """The state after the tickets of these slots were redeemed in this order, in a copy of the machine."""
    machine = snapshot.restore(driver.machine.run, snapshot.take(driver.machine), epoch=0, keep_tickets=True)
    for slot in order:
        epoch, number = driver.ticket("a", slot)
        push = Push(0.0, *driver.requester("a", slot), number, epoch)
        machine.step(push, Gradient(torch.tensor([float(slot)])))
    return machine.state
