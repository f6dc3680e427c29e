"""Worked examples that a reader can check by hand: learning rate 1, momentum 1/2 where nothing else is said."""

import pytest
import torch

from core.driving import Driver, driver_of, rows, run_of

# Every gradient is 1. Ticket by ticket: u ages by 1/2 when a bucket opens, a gradient one bucket late counts 1/2 in u
# and has already moved w by 1 + 1/2.
STRAGGLER = """
    bucket  lag   param  momentum
         0    0    -1.0       1.0
         1    0    -2.5       1.5
         0    1    -4.0       2.0
         1    0    -5.0       3.0
"""


def test_straggler_is_filed_in_the_bucket_of_its_ticket() -> None:
    driver = driver_of(run_of(bucket_size=4), "a", slots=4)
    holders: dict[float, list[int]] = {0: [0, 1], 1: [2, 3]}
    for slot in holders[0]:
        driver.request("a", slot)
    for number, row in enumerate(rows(STRAGGLER)):
        result = driver.push("a", 1.0, holders[row["bucket"]].pop(0))
        if number == 0:  # bucket 1 is being issued from now on
            for slot in holders[1]:
                driver.request("a", slot)
        state = driver.machine.state
        assert result.lag_buckets == row["lag"]
        assert (state.params, state.rule.vectors["momentum"]) == (row["param"], row["momentum"])


# K = 1 and three tickets of bucket 0: by the time that they are applied, bucket 3 is being issued, so that the next
# gradient opens three buckets at once: u ages by 1/8, which moves w by (1/2 + 1/4 + 1/8) u.
LEAP = """
    slot  bucket  opened  lag   param  momentum
       0       0       0    0    -8.0       8.0
       1       0       0    0   -16.0      16.0
       2       0       0    0   -24.0      24.0
       3       3       3    0   -53.0      11.0
"""


def test_several_buckets_may_open_at_once() -> None:
    driver = driver_of(run_of(bucket_size=1), "a", slots=4)
    for slot in range(3):
        driver.request("a", slot)
    for row in rows(LEAP):
        slot = int(row["slot"])
        if slot == 3:
            driver.request("a", slot)
        before = driver.machine.state.newest_bucket
        assert driver.push("a", 8.0, slot).lag_buckets == row["lag"]
        state = driver.machine.state
        assert (driver.applied[-1].bucket, state.newest_bucket - before) == (row["bucket"], row["opened"])
        assert (state.params, state.rule.vectors["momentum"]) == (row["param"], row["momentum"])


# Figure 1 of the paper, K = 4: u_10 = β²·Σ(4 gradients of iteration 0) + β·Σ(4 of iteration 4) + Σ(2 of iteration 8).
# Gradient n is 2^n, so that every one of them can be told from the sum.
BETA = 0.5
FIGURE_1 = BETA**2 * (1 + 2 + 4 + 8) + BETA * (16 + 32 + 64 + 128) + (256 + 512)


def everybody(driver: Driver, order: str, values: range) -> None:
    """All of the four ask, then push one after the other."""
    for worker in "abcd":
        driver.request(worker)
    for worker, exponent in zip(order, values, strict=False):
        driver.push(worker, 2.0**exponent)


@pytest.mark.parametrize("scheduler", ["synchronous", "asynchronous"])
def test_figure_1_of_the_paper_is_what_four_workers_in_step_have_after_ten_gradients(scheduler: str) -> None:
    driver = driver_of(run_of(scheduler=scheduler, min_workers=4, momentum=BETA), *"abcd")
    everybody(driver, "abcd", range(4))
    everybody(driver, "dbca", range(4, 8))
    everybody(driver, "cadb", range(8, 10))
    assert [each.ticket_iteration for each in driver.applied] == [0] * 4 + [4] * 4 + [8] * 2
    assert driver.machine.state.iteration == 10
    assert driver.machine.state.rule.vectors["momentum"] == FIGURE_1


def test_figure_1_has_the_same_momentum_when_the_gradients_arrive_out_of_order() -> None:
    driver = driver_of(run_of(momentum=BETA, bucket_size=4), *"abcdefgh")
    for worker in "abcd":
        driver.request(worker)
    for worker, exponent in zip("bcd", range(3), strict=True):
        driver.push(worker, 2.0**exponent)
    for worker in "efgh":  # bucket 1, like those of iteration 4
        driver.request(worker)
    for worker, exponent in zip("efgh", range(4, 8), strict=True):
        driver.push(worker, 2.0**exponent)
    for worker in "bc":  # bucket 2, like those of iteration 8
        driver.request(worker)
    assert [driver.places[worker, 0].granted.ticket.bucket for worker in "bc"] == [2, 2]
    driver.push("b", 256.0)
    driver.push("c", 512.0)
    assert driver.push("a", 8.0).lag_buckets == 2
    assert driver.machine.state.rule.vectors["momentum"] == FIGURE_1


def test_a_gradient_of_an_older_bucket_counts_as_if_it_had_come_in_time() -> None:
    early, late = (driver_of(run_of(bucket_size=2), "a", "b") for _ in range(2))
    for driver in (early, late):
        driver.request("a")
        driver.request("b")
    early.push("b", 3.0)
    for driver in (early, late):
        for value in (1.0, 5.0):
            driver.exchange("a", value)
    assert late.push("b", 3.0).lag_buckets == 1
    assert torch.equal(early.machine.state.params, late.machine.state.params)
    assert torch.equal(early.machine.state.rule.vectors["momentum"], late.machine.state.rule.vectors["momentum"])
