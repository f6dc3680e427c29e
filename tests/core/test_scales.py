"""Step scales: how much of the learning rate a gradient gets."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.driving import Driver, driver_of, rows, run_of
from core.scripts import START, Command, carry_out, stories
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import PRESETS, Run
from ormo_server.core.step_size import STEP_SCALES, LearningRate, Timing, rescaled

# By the delay

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
        timing = Timing(int(row.pop("delay")), int(row.pop("K")))
        assert {"rescaled", "polynomial", *row} == set(STEP_SCALES)
        for name, expected in row.items():
            assert STEP_SCALES[name](timing) == expected, (name, timing)


def test_the_polynomial_scale_is_one_by_the_root_of_the_delay_and_one() -> None:
    assert [STEP_SCALES["polynomial"](Timing(delay, 4)) for delay in (0, 3, 8, 99)] == [1, 1 / 2, 1 / 3, 1 / 10]


THRESHOLDS = """
    delay  K  threshold  delay-adaptive
        4  4          1            1.0
        5  4          1            0.8
        8  4          1            0.5
        8  4          2            1.0
        8  4        0.5            0.25
       16  4          3            0.75
"""


def test_the_delay_adaptive_scale_is_1_up_to_so_many_k_and_then_goes_down_with_the_delay() -> None:
    for row in rows(THRESHOLDS):
        timing = Timing(int(row["delay"]), int(row["K"]), row["threshold"])
        assert STEP_SCALES["delay-adaptive"](timing) == row["delay-adaptive"], row


@pytest.mark.parametrize(("preset", "late_step"), [("asgd-da", 2 / 8), ("ormo-da", 4 / 8)])
def test_a_gradient_of_delay_8_with_k_2_gets_the_step_of_its_presets_source(preset: str, late_step: float) -> None:
    driver = driver_of(Run(LearningRate(1.0), PRESETS[preset]), "a", "b")
    driver.request("b")
    driver.request("a")
    for _ in range(8):
        driver.exchange("a", 0.0)
    assert driver.push("b", 1.0).step_size == late_step


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


@pytest.mark.parametrize("rule", ["ormo", "sgd"])
@settings(max_examples=60, deadline=None)
@given(story=stories(), size=st.sampled_from([1, 2, 3]))
def test_delay_adaptive_is_the_plain_rule_bit_for_bit_up_to_a_delay_of_2k_and_not_after(
    rule: str, story: list[Command], size: int
) -> None:
    plain, adaptive = (
        Driver(StateMachine.fresh(run_of(rule, scale=scale, bucket_size=size, max_workers=10), START.clone()))
        for scale in ("constant", "delay-adaptive")
    )
    for command in story:
        for driver in (plain, adaptive):
            carry_out(driver, command)
        late = any(each.delay > 2 * size for each in adaptive.applied)
        assert torch.equal(plain.machine.state.params, adaptive.machine.state.params) == (not late)
        if late:
            break  # from here on they are two different runs


# By the time from ticket to push

RESCALED = """
      T  others  scale
      4       4      1
      1       4  0.625
      4       1    2.5
    0.5     0.5      1
"""


def test_rescaled_is_the_time_from_ticket_to_push_times_the_mean_rate_of_the_slots() -> None:
    for row in rows(RESCALED):
        timing = Timing(99, 7, 2.0, row["T"], lambda row=row: [row["T"], row["others"]])
        assert rescaled(timing) == row["scale"]


@pytest.mark.parametrize(
    ("seconds", "of_slots"), [(0.0, [0.0]), (0.0, [0.0, 3.0]), (3.0, [3.0, 0.0]), (1.0, []), (-1.0, [-1.0])]
)
def test_rescaled_divides_by_no_zero_time(seconds: float, of_slots: list[float]) -> None:
    assert 0 < rescaled(Timing(0, 1, 2.0, seconds, lambda: of_slots)) < float("inf")


# Three places got their tickets at 0. The worker exchanges when the clock is at `now`: T counts from there or from its
# last exchange. T_j is known only of places that have pushed: first one, then two, then all three.
MEASURED = """
    worker  slot  now   T  scale
         0     0    2   2    1
         0     0    6   4    1
         0     0    8   2    1
         0     0   12   4    1
         1     0   16  16    2.5
         0     1   16  16    2
         0     0   16   4    0.5
         1     0   32  16    2
"""


def clocked(scale: str = "rescaled", **choices: object) -> Driver:
    """A run whose clock moves only when the test moves it."""
    driver = driver_of(run_of("sgd", scale=scale, **choices))
    driver.input_seconds = 0.0
    return driver


def test_rescaled_goes_by_the_times_that_the_driver_passes_in() -> None:
    driver = clocked()
    driver.join("a", slots=2)
    driver.join("b")
    for key in driver.places:
        driver.request(*key)
    for row in rows(MEASURED):
        driver.now = row["now"]
        before = driver.machine.state.params.item()
        result = driver.exchange("ab"[int(row["worker"])], 1.0, int(row["slot"]))
        assert result.step_size == row["scale"] == before - driver.machine.state.params


def test_a_slot_counts_by_its_last_time_also_while_it_holds_no_ticket_and_after_a_discard() -> None:
    driver = clocked(discard_delay=1)
    for worker in "ab":
        driver.join(worker)
        driver.request(worker)
    driver.now = 1.0
    driver.exchange("a", 1.0)
    driver.now = 2.0
    assert driver.push("b", 1.0).discarded
    driver.now = 5.0
    assert driver.push("a", 1.0).step_size == 4 * (1 / 4 + 1 / 2) / 2


def test_a_slot_that_is_gone_counts_no_more_and_its_successor_not_yet() -> None:
    driver = clocked()
    for worker in "ab":
        driver.join(worker)
        driver.request(worker)
    driver.now = 1.0
    driver.exchange("b", 1.0)
    driver.join("b", incarnation=2)
    driver.request("b")
    driver.now = 4.0
    assert driver.exchange("a", 1.0).step_size == 1.0
    assert driver.push("b", 1.0).step_size == 3 * (1 / 3 + 1 / 4) / 2


@settings(max_examples=60, deadline=None)
@given(periods=st.lists(st.sampled_from([1, 2, 3, 4, 5, 6]), min_size=1, max_size=5))
def test_over_a_full_period_the_mean_of_rescaled_is_1_and_all_workers_have_the_same_share(periods: list[int]) -> None:
    """Worker j pushes every T_j seconds; 60 s are a full period of all of them. The first one, in which not all have
    pushed yet, does not count.
    """
    driver = clocked()
    for number in range(len(periods)):
        driver.join(f"w{number}")
        driver.request(f"w{number}")
    shares = dict.fromkeys(range(len(periods)), 0.0)
    pushes = 0
    for now, (number, period) in itertools.product(range(1, 121), enumerate(periods)):
        if now % period == 0:
            driver.now = float(now)
            scale = driver.exchange(f"w{number}", 1.0).step_size
            if now > 60:
                shares[number] += scale
                pushes += 1
    # Sums of at most 300 doubles: 1e-12 is thousands of their roundings.
    assert sum(shares.values()) / pushes == pytest.approx(1.0, rel=1e-12)
    assert list(shares.values()) == pytest.approx([pushes / len(periods)] * len(periods), rel=1e-12)
