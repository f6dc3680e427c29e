"""No gradient that is taken makes the state infinite, however many come; and none of usual training is refused."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.driving import Driver, driver_of, fingerprint, run_of
from core.scripts import BETAS, BOUNDS
from ormo_server.core.errors import NormTooLarge
from ormo_server.core.machine import StateMachine
from ormo_server.core.rules import LARGEST, UPDATE_RULES, Coefficients, Landing, Sending, UpdateRule
from ormo_server.core.schedulers import SCHEDULERS
from ormo_server.core.step_size import HIGHEST, STEP_SCALES, LearningRate
from ormo_server.core.vectors import BLOCK_ELEMENTS, SquaredNorm, largest

SLOT = ("a", 0)
VALUES = [0.0, 1e-40, -1.0, 1e3, 1e10, -1e15, 1e20, 1e22, -1e30, 1e36, 3e38, -3e38]


def norm_of(values: torch.Tensor) -> float:
    square = SquaredNorm(values).total()
    assert square is not None
    return math.sqrt(square)


def largest_of(rule: UpdateRule, name: str = "") -> float:
    """In the rule's vectors whose names begin so."""
    return max((largest(vector) for key, vector in rule.vectors.items() if key.startswith(name)), default=0.0)


def is_taken(driver: Driver, values: torch.Tensor) -> bool:
    """Whether a gradient is taken; one that is not changes nothing and leaves its ticket."""
    before = fingerprint(driver.machine)
    try:
        driver.push("a", values, norm=norm_of(values))
    except NormTooLarge:
        assert fingerprint(driver.machine) == before
        return False
    return True


@pytest.mark.parametrize("rule", UPDATE_RULES)
@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), start=st.sampled_from([0.0, 1.0, -LARGEST]), wire=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_whatever_is_pushed_all_that_is_kept_and_sent_is_finite(
    rule: str, data: st.DataObject, start: float, wire: torch.dtype
) -> None:
    scheduler = data.draw(st.sampled_from(sorted(SCHEDULERS)))
    choices: dict[str, Any] = {"scale": data.draw(st.sampled_from(sorted(STEP_SCALES)))}
    if scheduler == "bounded-staleness":
        choices["staleness_bound"] = data.draw(BOUNDS)
    elif scheduler == "asynchronous":
        choices["bucket_size"] = data.draw(st.sampled_from([None, 2, 2**31 - 1]))
    rates = st.sampled_from([1e-15, 0.1, 1.0, HIGHEST])
    run = run_of(rule, scheduler, learning_rate=LearningRate(data.draw(rates)), momentum=data.draw(BETAS), **choices)
    driver = Driver(StateMachine.fresh(run, torch.full((3,), start)), wire=wire)
    driver.join("a")
    for value in data.draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=30)):
        driver.request("a")
        is_taken(driver, torch.tensor([value, 1.0, -value]).to(wire))
        driver.set_learning_rate(data.draw(rates))
        driver.request("a")
        sent = driver.places[SLOT].params
        assert sent is not None
        assert largest(sent) < math.inf
        assert max(largest(driver.machine.state.params), largest_of(driver.machine.state.rule)) < math.inf


def longest_taken(rule: UpdateRule, params: torch.Tensor, landing: Landing) -> float:
    """The largest float32 that passes as a norm."""
    low, high = 0.0, 3.4e38
    while high > low * (1 + 1e-6):
        middle = math.sqrt(max(low, 1e-6) * high)
        low, high = (middle, high) if rule.stays_finite(params, middle, landing) else (low, middle)
    return low


# What the momentum of a rule never exceeds, by the arguments beside `LARGEST` and in `smega2`, for β = 0.
MOST = dict.fromkeys(("ormo", "ormo-vanilla", "ormo-nesterov", "naive", "shifted", "naive-nesterov"), LARGEST / 2**26)
MOST |= {"smega2": 2.0**67, "delayed-nesterov": LARGEST / 2**26}
MOMENTUM = dict.fromkeys(MOST, "momentum") | {"shifted": "momentum/a/0"}


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(("opened", "lag"), [(0, 0), (1, 0), (2, 0), (1000, 0), (0, 1), (0, 1000)])
@pytest.mark.parametrize("gathered", [0, 2**24])
@pytest.mark.parametrize("rule", ["sgd", *MOST])
def test_at_its_bounds_the_state_stays_within_them(
    rule: str, gathered: int, opened: int, lag: int, beta: float
) -> None:
    """The step of the induction, in the worst direction, with the longest gradients that are taken."""
    made, params = UPDATE_RULES[rule](1, Coefficients(beta)), torch.tensor([-LARGEST])
    if rule in MOST:
        made.vectors[MOMENTUM[rule]] = torch.tensor(
            [MOST[rule] * (1.0 if rule in ("smega2", "delayed-nesterov") else 1.0 - beta)]
        )
    if rule == "smega2":  # so many gradients in a bucket that is not full, of the largest norm each
        made.counters["gathered"] = gathered
        made.vectors["gathered"].fill_(math.e * gathered * 2.0**40)
    most = largest_of(made, "momentum")
    for size in (2**31 - 1, 1):
        landing = Landing(1.0, opened, lag, size, SLOT)
        gradient = torch.tensor([longest_taken(made, params, landing)])
        assert gradient.item() >= 1e12
        for _ in range(3):
            made.apply(params, gradient, landing)
            assert params.item() == -LARGEST
            assert largest_of(made, "momentum") <= most
            sent = torch.empty(1, dtype=torch.bfloat16)
            made.write_delivery(params, sent, Sending(HIGHEST, size))
            assert abs(sent.item()) < math.inf


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("beta2", [0.0, 0.99, 0.999999])
@pytest.mark.parametrize("lengths", [(1.0,), (1.0, 1e-12, -1.0), (1e-30, 1e-36, -1e-33)])
def test_no_step_of_amsgrad_is_longer_than_its_bound_however_long_the_gradients_are(
    beta: float, beta2: float, lengths: tuple[float, ...]
) -> None:
    rule, params = UPDATE_RULES["fadas"](1, Coefficients(beta, second_momentum=beta2, epsilon=1e-10)), torch.zeros(1)
    landing = Landing(HIGHEST, 0, 0, 1, SLOT)
    longest = longest_taken(rule, params, landing)
    assert longest >= 1e12
    for number in range(200):
        before = params.clone()
        rule.apply(params, torch.tensor([longest * lengths[number % len(lengths)]]), landing)
        assert abs(params - before).item() <= 1.001 * HIGHEST * (1 - beta2) ** -0.5
        assert largest_of(rule) <= rule.largest_element()


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_gradients_of_any_usual_length_are_taken(rule: str, rate: float) -> None:
    driver = driver_of(run_of(rule, momentum=0.99, learning_rate=LearningRate(rate), delay_compensation=0.04), "a")
    for _ in range(5):
        driver.request("a")
        assert is_taken(driver, torch.tensor([1e6]))


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_a_gradient_that_might_make_the_model_infinite_is_refused_in_a_sentence(rule: str) -> None:
    driver = driver_of(run_of(rule, scale="rescaled"), "a")
    driver.request("a")
    before = fingerprint(driver.machine)
    sentence = r"gradient of worker 'a', request 2, has norm 3e\+38: with a step size of 1 the parameters might become"
    with pytest.raises(NormTooLarge, match=sentence) as refused:
        driver.push("a", 3e38, norm=3e38)
    assert refused.value.worker == "a"
    assert fingerprint(driver.machine) == before
    assert driver.push("a", 1.0, norm=1.0).iteration == 1


def test_where_compensation_multiplies_the_distance_to_the_ticket_the_distance_counts() -> None:
    driver = driver_of(run_of("dc", delay_compensation=1.0), "a", size=BLOCK_ELEMENTS + 1)
    driver.request("a")
    driver.machine.state.params[-1] = 1e10  # far from what was sent, in the last block
    assert not is_taken(driver, torch.full((BLOCK_ELEMENTS + 1,), 1e4))
    driver.machine.state.params[-1] = 1.0
    assert is_taken(driver, torch.full((BLOCK_ELEMENTS + 1,), 1e4))


def test_a_gradient_that_was_taken_before_is_done_again_however_long_it_is() -> None:
    driver = driver_of(run_of("sgd"), "a")
    driver.request("a")
    driver.push("a", 3e38)  # as a journal has it that an earlier version wrote
    assert driver.machine.state.params.item() == pytest.approx(-3e38)


def test_the_largest_number_of_a_vector_is_found_in_all_blocks() -> None:
    vector = torch.zeros(2 * BLOCK_ELEMENTS + 1)
    assert largest(vector) == 0.0
    assert largest(torch.zeros(0)) == 0.0
    vector[-1] = -5.0
    assert largest(vector) == 5.0
    vector[0] = math.nan
    assert math.isnan(largest(vector))
    assert math.isnan(largest(vector.roll(-1)))


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize(("value", "in_bounds"), [(1e3, True), (3e37, False), (math.nan, False), (-math.inf, False)])
def test_vectors_that_no_gradient_that_is_taken_leads_to_are_out_of_bounds(
    rule: str, value: float, in_bounds: bool
) -> None:
    """With momentum: what is in a vector goes on to move w."""
    driver = driver_of(run_of(rule), "a")
    driver.request("a")
    driver.push("a", 1.0)
    state = driver.machine.state
    assert state.rule.in_bounds(state.params)
    keeps = {name: vector for name, vector in state.rule.vectors.items() if not name.startswith("sent/")}
    for vector in keeps.values():
        vector[-1] = value
    assert state.rule.in_bounds(state.params) is (in_bounds or not keeps)


@pytest.mark.parametrize(("value", "in_bounds"), [(LARGEST, True), (-2 * LARGEST, False), (math.nan, False)])
def test_parameters_beyond_the_largest_are_out_of_bounds(value: float, in_bounds: bool) -> None:
    rule = UPDATE_RULES["sgd"](3, Coefficients(0.0))
    assert rule.in_bounds(torch.tensor([1.0, value, 0.0])) is in_bounds
