"""What one gradient does to the parameters and buffers: rules, step scales, discards, wire dtypes."""

import pytest
import torch
from hypothesis import given, settings

from core.driving import Driver, driver_of, rows, run_of
from core.scripts import START, Command, carry_out, stories
from ormo_server.core.blocks import BLOCK_ELEMENTS, all_finite, blocks
from ormo_server.core.rules import geometric_sum
from ormo_server.core.scales import STEP_SCALES, Timing
from ormo_server.core.schedule import LearningRate
from ormo_server.core.state_machine import StateMachine


def one_worker(**settings: object) -> Driver:
    driver = driver_of(run_of(**settings), "a")
    driver.request("a")
    return driver


# Rules


def test_sgd_takes_every_gradient_times_the_learning_rate_however_late() -> None:
    driver = driver_of(run_of("sgd", learning_rate=LearningRate(0.5)), "a", "b")
    driver.request("b")
    driver.request("a")
    seen = []
    for value in (2.0, 4.0, 8.0):
        driver.exchange("a", value)
        seen.append(driver.machine.state.params.item())
    late = driver.push("b", 16.0)
    assert [*seen, driver.machine.state.params.item()] == [-1.0, -3.0, -7.0, -15.0]
    assert (late.delay, late.lag_buckets) == (3, 1)
    assert driver.machine.state.rule.vectors == {}


@settings(max_examples=50, deadline=None)
@given(story=stories())
def test_without_momentum_ormo_is_sgd_bit_for_bit(story: list[Command]) -> None:
    ends = []
    for rule in ("ormo", "sgd"):
        driver = Driver(StateMachine.fresh(run_of(rule, momentum=0.0, max_workers=10), START.clone()))
        for command in story:
            carry_out(driver, command)
        ends.append(driver.machine.state.params)
    assert torch.equal(*ends)


def test_a_long_gradient_reaches_every_element() -> None:
    size = 2 * BLOCK_ELEMENTS + 3
    driver = driver_of(run_of("sgd"), "a", size=size)
    driver.request("a")
    driver.push("a", torch.arange(size, dtype=torch.float32))
    assert torch.equal(driver.machine.state.params, -torch.arange(size, dtype=torch.float32))


@pytest.mark.parametrize("rule", ["ormo", "sgd"])
def test_a_bfloat16_gradient_counts_like_the_float32_numbers_that_it_stands_for(rule: str) -> None:
    values = torch.linspace(-3.0, 3.0, 7).to(torch.bfloat16)
    ends = []
    for gradient in (values, values.float()):
        driver = driver_of(run_of(rule, momentum=0.9), "a", size=7)
        for _ in range(3):
            driver.request("a")
            driver.push("a", gradient)
        ends.append(driver.machine.state.params)
    assert torch.equal(*ends)
    assert ends[0].dtype == torch.float32


@pytest.mark.parametrize("rule", ["ormo", "sgd"])
def test_a_gradient_is_read_never_written(rule: str) -> None:
    driver = driver_of(run_of(rule), "a", size=2)
    gradient = torch.tensor([1.0, 2.0])
    for _ in range(2):
        driver.request("a")
        driver.push("a", gradient)
    assert gradient.tolist() == [1.0, 2.0]


def test_a_delivery_may_be_written_as_bfloat16() -> None:
    driver = one_worker()
    out = torch.empty(1, dtype=torch.bfloat16)
    driver.machine.state.params.fill_(1.00390625)  # 1 + 2^-8: halfway between two bfloat16 numbers, ties to even
    driver.machine.write_delivery(driver.granted[0], out)
    assert out == 1.0


@pytest.mark.parametrize(("ratio", "terms", "expected"), [(0.5, 3, 1.75), (0.5, 1, 1.0), (0.5, 0, 0.0), (0.0, 4, 1.0)])
def test_a_geometric_sum_is_what_it_says(ratio: float, terms: int, expected: float) -> None:
    assert geometric_sum(ratio, terms) == expected


@pytest.mark.parametrize("size", [0, 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 3 * BLOCK_ELEMENTS])
def test_blocks_cover_a_vector_in_order_without_gap(size: int) -> None:
    covered = [(block.start, block.stop) for block in blocks(size)]
    assert [0, *(stop for _, stop in covered)] == [*(start for start, _ in covered), size]
    assert all(0 < stop - start <= BLOCK_ELEMENTS for start, stop in covered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1])
def test_what_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, bad: float, place: int) -> None:
    vector = torch.zeros(BLOCK_ELEMENTS + 2, dtype=dtype)
    assert all_finite(vector)
    vector[place] = bad
    assert not all_finite(vector)


# Step scales

SCALES = """
    delay  K  constant  delay-adaptive  inverse
        0  1         1             1.0     1.0
        1  1         1             1.0     1.0
        2  1         1             1.0     0.5
        4  1         1             0.5     0.25
        8  4         1             1.0     0.125
       16  4         1             0.5     0.0625
       32  4         1             0.25    0.03125
"""


def test_a_step_scale_is_what_the_table_says() -> None:
    for row in rows(SCALES):
        timing = Timing(int(row["delay"]), int(row["K"]))
        for name, scale in STEP_SCALES.items():
            assert scale(timing) == row[name], (name, timing)


def test_the_step_scale_multiplies_the_learning_rate_and_is_reported() -> None:
    driver = driver_of(run_of("sgd", scale="inverse"), "a", "b")
    driver.request("b")
    driver.request("a")
    for _ in range(4):
        driver.exchange("a", 0.0)
    assert driver.push("b", 8.0).step_size == 0.25
    assert driver.machine.state.params == -2.0


def test_the_delay_adaptive_scale_goes_by_k_when_the_gradient_is_applied() -> None:
    driver = driver_of(run_of("sgd", scale="delay-adaptive"), "a", "b", "c", "d")
    driver.request("b")
    driver.request("a")
    for _ in range(8):
        driver.exchange("a", 0.0)
    for worker in "cd":
        driver.leave(worker)
    assert driver.push("b", 1.0).step_size == 2 * 2 / 8


# Discard


def test_a_discarded_gradient_redeems_its_ticket_and_moves_nothing_else() -> None:
    driver = driver_of(run_of(discard_delay=2), "a", "b")
    driver.request("b")
    driver.request("a")
    for _ in range(2):
        driver.exchange("a", 1.0)
    state, ticket = driver.machine.state, driver.ticket("b")
    before = (state.params.clone(), state.iteration, state.samples, state.newest_bucket, state.learning_rate)
    result = driver.push("b", 100.0, samples=7)
    assert (result.discarded, result.delay, result.iteration, result.step_size) == (True, 2, 2, 0.0)
    assert before == (state.params, state.iteration, state.samples, state.newest_bucket, state.learning_rate)
    assert ticket not in state.tickets
    assert driver.push("b", 100.0, number=result.request, ticket=ticket).discarded  # the result is kept like any


def test_a_gradient_below_the_discard_delay_is_applied() -> None:
    driver = driver_of(run_of(discard_delay=2), "a", "b")
    driver.request("b")
    driver.request("a")
    driver.exchange("a", 1.0)
    late = driver.push("b", 1.0)
    assert (late.delay, late.discarded) == (1, False)
    assert driver.machine.state.iteration == 2


# Buffers


def with_buffers(workers: str, **settings: object) -> Driver:
    floats, ints = torch.tensor([0.0, 8.0]), torch.tensor([5, -5])
    driver = Driver(StateMachine.fresh(run_of(**settings), torch.zeros(1), floats, ints))
    for worker in workers:
        driver.join(worker)
        driver.request(worker)
    return driver


def push_buffers(driver: Driver, worker: str, floats: list[float], ints: list[int]) -> None:
    driver.push(worker, 1.0, float_buffers=torch.tensor(floats), int_buffers=torch.tensor(ints))


def test_floating_buffers_move_by_one_kth_towards_the_workers_and_integers_to_the_maximum() -> None:
    driver = with_buffers("abcd")
    push_buffers(driver, "a", [4.0, 8.0], [3, 2])
    state = driver.machine.state
    assert (state.float_buffers.tolist(), state.int_buffers.tolist()) == ([1.0, 8.0], [5, 2])
    push_buffers(driver, "b", [1.0, 0.0], [9, 1])
    assert (state.float_buffers.tolist(), state.int_buffers.tolist()) == ([1.0, 6.0], [9, 2])


def test_with_one_worker_buffers_are_its_own() -> None:
    driver = with_buffers("a")
    push_buffers(driver, "a", [0.1, -0.3], [7, 7])
    assert torch.equal(driver.machine.state.float_buffers, torch.tensor([0.1, -0.3]))


def test_buffers_follow_a_fixed_k() -> None:
    driver = with_buffers("a", bucket_size=8)
    push_buffers(driver, "a", [8.0, 0.0], [0, 0])
    assert driver.machine.state.float_buffers.tolist() == [1.0, 7.0]


def test_a_push_without_buffers_leaves_them() -> None:
    driver = with_buffers("a")
    driver.push("a", 1.0)
    assert driver.machine.state.float_buffers.tolist() == [0.0, 8.0]
    assert driver.machine.state.int_buffers.tolist() == [5, -5]


def test_the_buffers_of_a_discarded_push_are_dropped() -> None:
    driver = with_buffers("ab", discard_delay=1)
    driver.push("a", 1.0)
    push_buffers(driver, "b", [100.0, 100.0], [100, 100])
    assert driver.machine.state.float_buffers.tolist() == [0.0, 8.0]
    assert driver.machine.state.int_buffers.tolist() == [5, -5]
