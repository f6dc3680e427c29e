"""Every rule against its formula in float64, against `torch.optim.SGD`, and against the others where they agree."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.driving import Applied, Driver, driver_of, run_of
from core.reference import (
    SCALES,
    STEPS,
    Formula,
    assert_but_for_rounding,
    by_formula,
    closed_form,
    magnitudes,
    rounding,
    torch_sgd,
)
from core.scripts import BETAS, START, Command, carry_out, gradient, runs, stories
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import Run
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.core.step_size import STEP_SCALES, LearningRate


def told(run: Run, story: list[Command], wire: torch.dtype = torch.float32) -> Driver:
    """A run that starts at START, after this story."""
    driver = Driver(StateMachine.fresh(run, START.clone()), wire=wire)
    for command in story:
        carry_out(driver, command)
    return driver


# Formulas. OrMo has a closed form, see test_closed_form.


def test_every_rule_and_step_scale_has_a_formula_to_be_held_against() -> None:
    assert {"ormo", *STEPS} == set(UPDATE_RULES)
    assert set(SCALES) == set(STEP_SCALES)


@pytest.mark.parametrize("rule", STEPS)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), story=stories(), wire=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_story_ends_where_the_formula_does(
    rule: str, data: st.DataObject, story: list[Command], wire: torch.dtype
) -> None:
    driver = told(data.draw(runs([rule])), story, wire)
    state, run = driver.machine.state, driver.machine.run
    exact, largest = by_formula(rule, START, driver.applied, run)
    assert_but_for_rounding(state.params, exact.w, largest.w, state.iteration, "params")
    for name, vector in state.rule.vectors.items():
        if not name.startswith("sent/"):
            what = (exact.vectors[name], largest.vectors[name])
            assert_but_for_rounding(vector, *what, state.iteration, name)


@settings(max_examples=60, deadline=None)
@given(run=runs(["smega2"]), story=stories(), leavers=st.integers(0, 3))
def test_what_smega2_would_send_at_the_end_of_a_story_is_the_formula(
    run: Run, story: list[Command], leavers: int
) -> None:
    driver = told(run, story + leavers * [Command("leave", 0, 0)])  # so that K may be less than what is gathered
    state, size = driver.machine.state, driver.machine.bucket_size
    sent = torch.empty_like(state.params)
    state.rule.write_delivery(state.params, sent, state.sending(size))
    exact, largest = (
        formula.sent_by_smega2(state.learning_rate, size)
        for formula in by_formula("smega2", START, driver.applied, run)
    )
    assert_but_for_rounding(sent, exact, largest, state.iteration)


@pytest.mark.parametrize("rule", sorted(set(UPDATE_RULES) - {"smega2"}))
def test_what_is_sent_with_a_ticket_is_w(rule: str) -> None:
    driver = driver_of(run_of(rule), "a", size=START.numel())
    driver.request("a")
    for value in range(3):
        driver.exchange("a", gradient(value))
        assert torch.equal(driver.places["a", 0].params, driver.machine.state.params)


# torch.optim.SGD, with one worker and one ticket in flight. Both are held against float64.

SEEDS = st.integers(0, 2**32 - 1)
RATES = st.sampled_from([0.01, 0.3, 1.0])


def alone(rule: str, beta: float, lr: float, seed: int) -> tuple[Driver, list[torch.Tensor]]:
    """One worker that exchanges 100 random gradients, and what each of its tickets carried."""
    driver = driver_of(run_of(rule, momentum=beta, learning_rate=LearningRate(lr)), "a", size=START.numel())
    driver.request("a")
    sent = [driver.places["a", 0].params]
    for each in torch.randn(100, START.numel(), generator=torch.Generator().manual_seed(seed)):
        driver.exchange("a", each)
        sent.append(driver.places["a", 0].params)
    return driver, sent


@pytest.mark.parametrize("rule", ["ormo", "ormo-vanilla", "naive", "shifted"])
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, beta=BETAS, lr=RATES)
def test_a_worker_alone_does_what_torch_sgd_with_momentum_does(rule: str, seed: int, beta: float, lr: float) -> None:
    driver, sent = alone(rule, beta, lr, seed)
    largest = Formula(torch.zeros_like(START), driver.machine.run, sign=1.0)
    gradients = [each.values for each in driver.applied]
    for done, expected in enumerate(torch_sgd(torch.zeros_like(START), gradients, lr, beta)):
        assert_but_for_rounding(sent[done], expected, largest.w, done)
        largest.naive(magnitudes(driver.applied[min(done, 99)]))


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, beta=st.sampled_from([0.5, 0.9, 0.99]), lr=RATES)
def test_what_smega2_sends_to_a_worker_alone_is_where_nesterovs_momentum_of_torch_is(
    seed: int, beta: float, lr: float
) -> None:
    driver, sent = alone("smega2", beta, lr, seed)
    largest = Formula(torch.zeros_like(START), driver.machine.run, sign=1.0)
    gradients = [each.values for each in driver.applied]
    for done, expected in enumerate(torch_sgd(torch.zeros_like(START), gradients, lr, beta, nesterov=True)):
        assert_but_for_rounding(sent[done], expected, largest.sent_by_smega2(lr, 1), done)
        largest.smega2(magnitudes(driver.applied[min(done, 99)]))


@pytest.mark.parametrize("rule", ["ormo-nesterov", "naive-nesterov", "delayed-nesterov"])
@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, beta=st.sampled_from([0.5, 0.9, 0.99]), lr=RATES)
def test_a_worker_alone_does_what_torch_sgd_with_nesterovs_momentum_does(
    rule: str, seed: int, beta: float, lr: float
) -> None:
    driver, sent = alone(rule, beta, lr, seed)
    largest = Formula(torch.zeros_like(START), driver.machine.run, sign=1.0)
    gradients = [each.values for each in driver.applied]
    for done, expected in enumerate(torch_sgd(torch.zeros_like(START), gradients, lr, beta, nesterov=True)):
        assert_but_for_rounding(sent[done], expected, largest.w, done)
        STEPS[rule](largest, magnitudes(driver.applied[min(done, 99)]))


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, beta=BETAS, lr=RATES)
def test_a_worker_alone_does_with_fadas_what_torch_adam_does_with_amsgrad(seed: int, beta: float, lr: float) -> None:
    driver, sent = alone("fadas", beta, lr, seed)
    weights = torch.zeros_like(START, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=lr, betas=(beta, 0.99), eps=1e-8, amsgrad=True)
    for done, each in enumerate(driver.applied, start=1):
        weights.grad = each.values.clone()
        optimizer.step()
        # A step is at most 10 η, and its error some roundings of that for each that went into the moments.
        torch.testing.assert_close(sent[done].double(), weights.detach(), rtol=0.0, atol=done * 1e-6 * 10 * lr)


# Where rules agree

MOMENTUM_RULES = [
    "ormo",
    "ormo-vanilla",
    "ormo-nesterov",
    "naive",
    "shifted",
    "smega2",
    "naive-nesterov",
    "delayed-nesterov",
]


@pytest.mark.parametrize("rule", MOMENTUM_RULES)
@settings(max_examples=20, deadline=None)
@given(story=stories(), lr=st.sampled_from([0.25, 0.3]), scale=st.sampled_from(["constant", "inverse"]))
def test_without_momentum_every_rule_is_sgd(rule: str, story: list[Command], lr: float, scale: str) -> None:
    def end(rule: str) -> Driver:
        run = run_of(rule, momentum=0.0, learning_rate=LearningRate(lr), scale=scale, max_workers=10)
        return told(run, story)

    plain, other = end("sgd"), end(rule)
    if rule in ("naive", "shifted"):
        # They round ηg before it is subtracted, where the others need not.
        exact, largest = by_formula("sgd", START, plain.applied, plain.machine.run)
        assert_but_for_rounding(other.machine.state.params, exact.w, largest.w, len(plain.applied))
    else:
        assert torch.equal(plain.machine.state.params, other.machine.state.params)
        for key, place in plain.places.items():
            if place.params is not None:
                assert torch.equal(place.params, other.places[key].params)


@pytest.mark.parametrize("rule", ["naive", "shifted"])
@settings(max_examples=20, deadline=None)
@given(story=stories())
def test_without_momentum_and_with_an_exact_step_they_are_sgd_bit_for_bit(rule: str, story: list[Command]) -> None:
    plain, other = (
        told(run_of(each, momentum=0.0, learning_rate=LearningRate(0.25), max_workers=10), story)
        for each in ("sgd", rule)
    )
    assert torch.equal(plain.machine.state.params, other.machine.state.params)


@settings(max_examples=40, deadline=None)
@given(story=stories(), lr=st.sampled_from([0.25, 0.3]))
def test_without_compensation_dc_is_sgd_bit_for_bit(story: list[Command], lr: float) -> None:
    plain, other = (
        told(run_of(rule, delay_compensation=0.0, learning_rate=LearningRate(lr), max_workers=10), story)
        for rule in ("sgd", "dc")
    )
    assert torch.equal(plain.machine.state.params, other.machine.state.params)


def test_without_compensation_dc_takes_gradients_whose_square_no_float32_can_hold() -> None:
    driver = driver_of(run_of("dc", delay_compensation=0.0), "a", "b")
    for worker in "ab":
        driver.request(worker)
    driver.push("a", 1.0)
    driver.push("b", 1e30)
    assert driver.machine.state.params == torch.tensor(-1e30)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), story=stories())
def test_the_momentum_of_vanilla_ordered_momentum_is_that_of_ordered_momentum(
    data: st.DataObject, story: list[Command]
) -> None:
    run = data.draw(runs(["ormo"]))
    full = told(run, story)
    vanilla = told(replace(run, method=replace(run.method, rule="ormo-vanilla")), story)
    momentum = vanilla.machine.state.rule.vectors["momentum"]
    assert torch.equal(momentum, full.machine.state.rule.vectors["momentum"])
    _, by_sum = closed_form(START, vanilla.applied, run.momentum)
    assert bool(((momentum.double() - by_sum).abs() <= rounding(START, vanilla.applied, run.momentum)).all())


@settings(max_examples=40, deadline=None)
@given(data=st.data(), story=stories())
def test_ordered_nesterov_momentum_is_ordered_momentum_less_one_more_move_of_it(
    data: st.DataObject, story: list[Command]
) -> None:
    run = data.draw(runs(["ormo"]))
    plain = told(run, story)
    ahead = told(replace(run, method=replace(run.method, rule="ormo-nesterov")), story).machine.state
    momentum = plain.machine.state.rule.vectors["momentum"]
    assert torch.equal(ahead.rule.vectors["momentum"], momentum)
    expected = plain.machine.state.params.double() - run.momentum * momentum.double()
    allowed = 2 * rounding(START, plain.applied, run.momentum)
    assert bool(((ahead.params.double() - expected).abs() <= allowed).all())


# Vectors of slots


@settings(max_examples=40, deadline=None)
@given(run=runs(["shifted"]), story=stories())
def test_shifted_keeps_a_momentum_for_each_live_slot_that_has_pushed_and_for_no_other(
    run: Run, story: list[Command]
) -> None:
    driver = told(run, story)
    assert set(driver.machine.state.rule.vectors) == {
        f"momentum/{worker}/{slot}" for worker, slot in places_of(driver, driver.applied)
    }


def places_of(driver: Driver, applied: list[Applied]) -> set[tuple[str, int]]:
    """Those places of today that these gradients came from, not from an earlier process of the name."""
    holders = {each.holder for each in applied}
    return {(name, slot) for name, incarnation, slot in holders if driver.incarnations.get(name) == incarnation}


@settings(max_examples=40, deadline=None)
@given(run=runs(["dc"]), story=stories(), wire=st.sampled_from([torch.float32, torch.bfloat16]))
def test_dc_keeps_what_was_last_sent_to_each_live_slot_and_to_no_other(
    run: Run, story: list[Command], wire: torch.dtype
) -> None:
    driver = told(run, story, wire)
    vectors = driver.machine.state.rule.vectors
    served = {granted.slot for granted in driver.granted}
    assert set(vectors) <= {f"sent/{worker}/{slot}" for worker, slot in served & set(driver.places)}
    for (worker, slot), place in driver.places.items():
        if place.params is not None:
            assert torch.equal(vectors[f"sent/{worker}/{slot}"], place.params.float())


@pytest.mark.parametrize("comes_back", ["as another process", "after it has left"])
def test_a_newcomer_has_no_shifted_momentum(comes_back: str) -> None:
    driver = driver_of(run_of("shifted"), "a", "b")
    driver.request("a")
    driver.push("a", 8.0)
    if comes_back == "after it has left":
        driver.leave("a")
        assert driver.machine.state.rule.vectors == {}
    driver.join("a", incarnation=2)
    assert driver.machine.state.rule.vectors == {}
    driver.request("a")
    driver.push("a", 1.0)
    assert driver.machine.state.rule.vectors == {"momentum/a/0": torch.tensor([1.0])}
    assert driver.machine.state.params == -9.0
