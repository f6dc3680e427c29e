"""What one gradient does to the parameters and buffers: rules, discards, wire dtypes."""

from dataclasses import replace

import pytest
import torch

from core.driving import Driver, driver_of, fingerprint, run_of
from ormo_protos.int8 import Blocks, Int8Vector, encode, rounding
from ormo_server.core import snapshot
from ormo_server.core.inputs import Gradient, Push
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import PRESETS, Run
from ormo_server.core.rules import UPDATE_RULES, geometric_sum
from ormo_server.core.state import PushResult
from ormo_server.core.step_size import LearningRate
from ormo_server.core.vectors import BLOCK_ELEMENTS, SquaredNorm, all_finite, blocks


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


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_a_long_vector_is_treated_in_all_its_blocks_like_a_short_one(rule: str) -> None:
    """Small whole numbers and a few halvings: float32 holds every step exactly, so the bits agree."""
    short = torch.arange(8.0)
    long = short.repeat(BLOCK_ELEMENTS // 4 + 1)  # two blocks and a bit
    ends = []
    for pattern in (short, long):
        driver = driver_of(run_of(rule, delay_compensation=0.25), "a", "b", size=pattern.numel())
        for worker in "ab":
            driver.request(worker)
        for step, worker in enumerate("abab"):
            driver.exchange(worker, pattern if step % 2 else 1.0)
        ends.append((driver.machine.state.params, driver.places["b", 0].params, driver.machine.state.rule.vectors))
    (params, sent, vectors), (long_params, long_sent, long_vectors) = ends
    assert len(long) > 2 * BLOCK_ELEMENTS
    pairs = zip(vectors.values(), long_vectors.values(), strict=True)
    for one, other in ((params, long_params), (sent, long_sent), *pairs):
        assert torch.equal(one.repeat(len(long) // 8), other)


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_a_bfloat16_gradient_counts_like_the_float32_numbers_that_it_stands_for(rule: str) -> None:
    values = torch.linspace(-3.0, 3.0, 7).to(torch.bfloat16)
    ends = []
    for gradient in (values, values.float()):
        driver = driver_of(run_of(rule, momentum=0.9), "a", "b", size=7)
        for worker in "abaabb":
            driver.request(worker)
            driver.push(worker, gradient)
        ends.append((driver.machine.state.params, driver.places["b", 0].params))
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
    assert ends[0][0].dtype == torch.float32


def int8_of(values: torch.Tensor, *sizes: int) -> Int8Vector:
    """These values of tensors of these sizes, rounded to int8."""
    blocks_of_tensors = Blocks.of(sizes)
    codes, scales = torch.empty(len(values), dtype=torch.int8), torch.empty(blocks_of_tensors.count)
    encode(values, codes, scales, blocks_of_tensors, rounding(1, 1, values.device))
    return Int8Vector(codes, scales, blocks_of_tensors)


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("sizes", [(5,), (3000, 4), (BLOCK_ELEMENTS - 500, 700, 30_000)])
def test_an_int8_gradient_counts_like_the_float32_numbers_that_it_stands_for(rule: str, sizes: tuple[int, ...]) -> None:
    size = sum(sizes)
    drawn = torch.Generator().manual_seed(size)
    coded = [int8_of(torch.randn(size, generator=drawn), *sizes) for _ in range(3)]
    ends = []
    for gradients in (coded, [each[:] for each in coded]):
        driver = driver_of(run_of(rule, momentum=0.9), "a", "b", size=size)
        for worker, gradient in zip("aba", gradients, strict=True):
            driver.request(worker)
            driver.machine.step(push_of(driver, worker), Gradient(gradient, norm=1.0))
        ends.append([driver.machine.state.params, *driver.machine.state.rule.vectors.values()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
    assert ends[0][0].count_nonzero() > size / 2


def push_of(driver: Driver, worker: str) -> Push:
    """The push of the ticket that this worker holds."""
    epoch, number = driver.ticket(worker)
    return Push(driver.now, *driver.requester(worker), number, epoch)


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_read_never_written_nor_kept(rule: str, dtype: torch.dtype) -> None:
    driver = driver_of(run_of(rule), "a", "b", size=2)
    gradient = torch.tensor([1.0, 2.0], dtype=dtype)
    for worker in "aba":
        driver.request(worker)
        driver.push(worker, gradient)
    assert gradient.tolist() == [1.0, 2.0]
    before = fingerprint(driver.machine)
    gradient.fill_(9.0)  # the caller's buffer is used again
    assert fingerprint(driver.machine) == before


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_a_delivery_may_be_overwritten_by_its_receiver(rule: str) -> None:
    driver = driver_of(run_of(rule), "a", size=2)
    driver.request("a")
    driver.exchange("a", 1.0)
    before = fingerprint(driver.machine)
    driver.places["a", 0].params.fill_(9.0)
    assert fingerprint(driver.machine) == before


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_a_delivery_as_bfloat16_is_the_float32_one_rounded(rule: str) -> None:
    sent = {}
    for wire in (torch.float32, torch.bfloat16):
        run = run_of(rule, learning_rate=LearningRate(0.3), bucket_size=1)
        driver = driver_of(run, "a", "b", size=3)
        driver.wire = wire
        for worker in "ab":
            driver.request(worker)
        driver.exchange("b", torch.tensor([0.1, 1.0, 1000.7]))
        sent[wire] = driver.places["b", 0].params
    assert torch.equal(sent[torch.float32].to(torch.bfloat16), sent[torch.bfloat16])
    assert not torch.equal(sent[torch.float32], sent[torch.bfloat16].float())


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
    assert SquaredNorm(vector).total() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 1000, 2 * BLOCK_ELEMENTS + 3])
def test_squared_norm_is_the_sum_of_squares(size: int, dtype: torch.dtype) -> None:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    assert SquaredNorm(vector).total() == pytest.approx(float(vector.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("sizes", [(3,), (BLOCK_ELEMENTS + 3, 2000)])
def test_squared_norm_of_int8_is_that_of_the_numbers_that_it_stands_for(sizes: tuple[int, ...]) -> None:
    coded = int8_of(torch.randn(sum(sizes), generator=torch.Generator().manual_seed(1)), *sizes)
    assert SquaredNorm(coded).total() == SquaredNorm(coded[:]).total()
    assert all_finite(coded)
    coded.mul_(1e38).mul_(50)  # scales that are finite, of numbers that are not
    assert not coded.fault
    assert SquaredNorm(coded).total() is None


def test_squared_norm_of_numbers_whose_squares_float32_does_not_hold_is_exact() -> None:
    assert SquaredNorm(torch.tensor([3e30, -4e30])).total() == pytest.approx(25e60)


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


def ringmaster(slots: int, **choices: object) -> Driver:
    """The preset, with these places; all of them hold a ticket of iteration 0."""
    driver = driver_of(Run(LearningRate(1.0), replace(PRESETS["ringmaster"], **choices)), "a", slots=slots)
    for slot in range(slots):
        driver.request("a", slot)
    return driver


def pushed_late(driver: Driver, slot: int, delay: int) -> PushResult:
    """What becomes of this slot's gradient when it comes after so many of slot 0."""
    for _ in range(delay):
        driver.exchange("a", 1.0)
    return driver.push("a", 1.0, slot)


@pytest.mark.parametrize(
    ("slots", "choices", "limit"),
    [(2, {}, 4), (3, {}, 6), (2, {"discard_delay": 3}, 3), (2, {"discard_buckets": 1}, 2)],
)
def test_ringmaster_discards_from_a_delay_of_two_buckets_on_if_nothing_else_is_said(
    slots: int, choices: dict[str, int], limit: int
) -> None:
    kept, late = ringmaster(slots, **choices), ringmaster(slots, **choices)
    assert not pushed_late(kept, slots - 1, limit - 1).discarded
    assert (kept.machine.state.iteration, kept.machine.state.params) == (limit, -limit)
    assert pushed_late(late, slots - 1, limit).discarded
    assert (late.machine.state.iteration, late.machine.state.params) == (limit, -limit)
    assert len(late.machine.state.tickets) == slots - 1  # the discarded one's is redeemed
    late.request("a", slots - 1)
    assert not late.push("a", 1.0, slots - 1).discarded


def test_the_discard_delay_of_ringmaster_goes_by_k_when_the_gradient_comes() -> None:
    driver = ringmaster(2)
    driver.join("b", slots=2)
    assert not pushed_late(driver, 1, 7).discarded
    driver.request("a", 1)
    driver.leave("b")
    assert pushed_late(driver, 1, 4).discarded


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_a_discarded_gradient_moves_nothing_of_any_rule(rule: str) -> None:
    driver = driver_of(run_of(rule, discard_delay=1), "a", "b")
    for worker in "ab":
        driver.request(worker)
    driver.exchange("a", 1.0)
    before = snapshot.take(driver.machine)
    assert driver.push("b", 9.0).discarded
    after = snapshot.take(driver.machine)
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors | after.tensors)
    for name in ("iteration", "samples", "newest_bucket", "issue", "filled", "rule_counters", "learning_rate"):
        assert before.fields[name] == after.fields[name]


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


def test_buffers_at_both_ends_of_float32_have_a_finite_mean() -> None:
    driver = with_buffers("ab")
    largest = torch.finfo(torch.float32).max
    driver.machine.state.float_buffers.copy_(torch.tensor([largest, -largest]))
    push_buffers(driver, "a", [-largest, -largest], [0, 0])
    assert driver.machine.state.float_buffers.tolist() == [0.0, -largest]


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
