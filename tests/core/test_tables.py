"""Worked examples that a reader can check by hand: learning rate 1, momentum 1/2 where nothing else is said."""

from collections.abc import Iterator

import pytest
import torch

from core.driving import Driver, driver_of, rows, run_of
from ormo_server.core.state import State
from ormo_server.core.step_size import LearningRate

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


# The other rules. Each row is an exchange: worker 0, 1, 2, ... pushes its gradient and gets the next ticket. All hold
# one of iteration 0 before the first row.


def exchanges(driver: Driver, table: str) -> Iterator[tuple[dict[str, float], State]]:
    """Carry out row after row; each comes with the state after it, delay and lag already checked."""
    for worker in driver.incarnations:
        driver.request(worker)
    for row in rows(table):
        result = driver.exchange(worker_of(row), row["g"])
        assert (result.delay, result.lag_buckets) == (row["delay"], row["lag"])
        yield row, driver.machine.state


def worker_of(row: dict[str, float]) -> str:
    return "abcd"[int(row["worker"])]


# K = 3. u is OrMo's; w moves by u/2 when a bucket opens, and by no more than the gradient itself when it comes, be it
# one or two buckets late (OrMo: by 3/2 and 7/4 of it).
ORMO_VANILLA = """
    worker  g  delay  lag   param  momentum
         0  4      0    0    -4.0       4.0
         0  2      0    0    -8.0       4.0
         1  8      2    1   -16.0       8.0
         0  2      1    0   -18.0      10.0
         0  4      0    0   -27.0       9.0
         2  8      5    2   -35.0      11.0
         1  2      3    1   -37.0      12.0
"""


def test_vanilla_ordered_momentum_files_a_late_gradient_but_does_not_make_up_for_its_moves() -> None:
    driver = driver_of(run_of("ormo-vanilla"), "a", "b", "c")
    for row, state in exchanges(driver, ORMO_VANILLA):
        assert (state.params, state.rule.vectors["momentum"]) == (row["param"], row["momentum"])


# The same pushes. u is OrMo's again. In time a gradient moves w by 3/2 of itself, one or two buckets late by 7/4 and
# 15/8; when a bucket opens w moves by u/4 besides.
ORMO_NESTEROV = """
    worker  g  delay  lag   param  momentum
         0  4      0    0    -6.0       4.0
         0  2      0    0   -10.0       4.0
         1  8      2    1   -24.0       8.0
         0  2      1    0   -27.0      10.0
         0  4      0    0   -35.5       9.0
         2  8      5    2   -50.5      11.0
         1  2      3    1   -54.0      12.0
"""


def test_ordered_nesterov_momentum_is_always_one_move_of_the_momentum_ahead() -> None:
    driver = driver_of(run_of("ormo-nesterov"), "a", "b", "c")
    for row, state in exchanges(driver, ORMO_NESTEROV):
        assert (state.params, state.rule.vectors["momentum"]) == (row["param"], row["momentum"])


# u halves with every gradient, whoever it is from and however late.
NAIVE = """
    worker   g  delay  lag   param  momentum
         0   4      0    0    -4.0       4.0
         0   2      0    0    -8.0       4.0
         1   8      2    1   -18.0      10.0
         2   0      3    1   -23.0       5.0
         1  -2      1    0   -23.5       0.5
"""


def test_naive_momentum_ages_with_every_gradient_in_the_order_of_arrival() -> None:
    driver = driver_of(run_of("naive"), "a", "b", "c")
    for row, state in exchanges(driver, NAIVE):
        assert (state.params, state.rule.vectors["momentum"]) == (row["param"], row["momentum"])


# m is naive momentum's; w moves by the gradient and half of it.
NAIVE_NESTEROV = """
    worker   g  delay  lag   param  momentum
         0   4      0    0    -6.0       4.0
         0   2      0    0   -10.0       4.0
         1   8      2    1   -23.0      10.0
         2   0      3    1   -25.5       5.0
         1  -2      1    0  -23.75       0.5
"""


def test_naive_nesterov_momentum_moves_w_by_the_gradient_and_the_next_move_of_the_momentum() -> None:
    driver = driver_of(run_of("naive-nesterov"), "a", "b", "c")
    for row, state in exchanges(driver, NAIVE_NESTEROV):
        assert (state.params, state.rule.vectors["momentum"]) == (row["param"], row["momentum"])


# K = 2. Every gradient moves w by itself, every second one by m/2 besides, once m has taken both in.
DELAYED_NESTEROV = """
    worker  g  delay  lag   param    m     B   s
         0  4      0    0    -4.0    0   4.0   1
         0  8      0    0   -18.0 12.0     0   0
         1  2      2    1   -20.0 12.0   2.0   1
         0  0      1    0   -24.0  8.0     0   0
         1  6      1    0   -30.0  8.0   6.0   1
"""


def test_delayed_nesterov_takes_a_bucket_into_the_momentum_as_a_whole() -> None:
    driver = driver_of(run_of("delayed-nesterov"), "a", "b")
    for row, state in exchanges(driver, DELAYED_NESTEROV):
        vectors, s = state.rule.vectors, state.rule.counters["gathered"]
        got = (state.params, vectors["momentum"], vectors["gathered"], s)
        assert got == (row["param"], row["m"], row["B"], row["s"])


# Buckets of two, β₁ = 1/2, β₂ = 0 and so v̂ = max d². Steps: m/(1/2) = 4 by √16; m/(3/4) = -4 by √64; m/(7/8) = -4 by
# √64, and half of that, as worker 2's gradient is two steps late, which is above the threshold of one.
FADAS = """
    worker   g  delay  lag  param     m   v̂   B
         0   4      0    0      0     0    0   4
         0   4      0    0     -1     2   16   0
         1  -8      2    1     -1     2   16  -8
         0  -8      1    0   -0.5    -3   64   0
         2  -4      4    1   -0.5    -3   64  -4
         0  -4      1    0  -0.25  -3.5   64   0
"""


def test_fadas_makes_a_step_of_amsgrad_with_the_mean_of_a_bucket_and_a_shorter_one_if_that_is_late() -> None:
    run = run_of("fadas", bucket_size=2, second_momentum=0.0, delay_threshold=1.0)
    for row, state in exchanges(driver_of(run, "a", "b", "c"), FADAS):
        vectors = state.rule.vectors
        assert state.params.item() == pytest.approx(row["param"])
        got = (vectors["momentum"], vectors["largest_second_moment"], vectors["gathered"])
        assert got == (row["m"], row["v̂"], row["B"])


def test_the_threshold_of_fadas_and_its_first_second_moment_are_settings() -> None:
    run = run_of("fadas", bucket_size=2, second_momentum=0.0, delay_threshold=2.0, initial_second_moment=256.0)
    for _, state in exchanges(driver_of(run, "a", "b", "c"), FADAS):
        last = state
    assert last.params.item() == pytest.approx(-(4 - 4 - 4) / 16)  # all by √256, none shortened


# Each worker's momentum halves with its own gradients only.
SHIFTED = """
    worker  g  delay  lag   param   u_a   u_b
         0  4      0    0    -4.0   4.0     0
         0  2      0    0    -8.0   4.0     0
         1  8      2    1   -16.0   4.0   8.0
         0  0      1    0   -18.0   2.0   8.0
         1  2      1    0   -24.0   2.0   6.0
"""


def test_shifted_momentum_is_one_for_each_slot() -> None:
    driver = driver_of(run_of("shifted"), "a", "b")
    for row, state in exchanges(driver, SHIFTED):
        u_a, u_b = (state.rule.vectors.get(f"momentum/{worker}/0", torch.zeros(1)) for worker in "ab")
        assert (state.params, u_a, u_b) == (row["param"], row["u_a"], row["u_b"])


# K = 2. v takes in the mean of a full bucket, w moves by g + v/2 (with the v before this gradient), and what is sent
# looks ahead by [(2 - s/2)v + (s/2)G]/2 with s gradients in G.
SMEGA2 = """
    worker  g  delay  lag   param    v     G   s    sent
         0  4      0    0    -4.0    0   4.0   1    -5.0
         0  8      0    0   -12.0  6.0     0   0   -18.0
         1  2      2    1   -17.0  6.0   2.0   1   -22.0
         0  0      1    0   -20.0  4.0     0   0   -24.0
         1  6      1    0   -28.0  4.0   6.0   1   -32.5
"""


def assert_smega2(driver: Driver, row: dict[str, float], worker: str) -> None:
    state, sent = driver.machine.state, driver.places[worker, 0].params
    vectors, s = state.rule.vectors, state.rule.counters["gathered"]
    got = (state.params, vectors["momentum"], vectors["gathered"], s, sent)
    assert got == (row["param"], row["v"], row["G"], row["s"], row["sent"])


def test_smega2_keeps_the_momentum_of_full_buckets_and_sends_where_w_will_be_a_bucket_later() -> None:
    driver = driver_of(run_of("smega2"), "a", "b")
    for row, _ in exchanges(driver, SMEGA2):
        assert_smega2(driver, row, worker_of(row))


# It goes on from s = 1 while K changes from row to row; K' = 4 when c and d have joined, and 2 = s, not K = 1, after
# all but a have left. The gradient of the last row is the third in G: v = 4/2 + 12/3.
SMEGA2_WHILE_K_CHANGES = """
    K   push  g   param    v     G   s    sent
    2      0  0   -28.0  4.0   6.0   1   -32.5
    4      0  0   -28.0  4.0   6.0   1   -35.75
    4      1  4   -34.0  4.0  10.0   2   -42.5
    1      0  0   -34.0  4.0  10.0   2   -41.0
    1      1  2   -38.0  6.0     0   0   -41.0
"""


def test_smega2_goes_by_k_as_it_is_but_never_by_less_than_it_has_gathered() -> None:
    driver = driver_of(run_of("smega2"), "a", "b")
    for _ in exchanges(driver, SMEGA2):
        pass
    changes = {4: lambda: [driver.join(name) for name in "cd"], 1: lambda: [driver.leave(name) for name in "bcd"]}
    for row in rows(SMEGA2_WHILE_K_CHANGES):
        if driver.machine.bucket_size != row["K"]:
            changes[int(row["K"])]()
        driver.exchange("a", row["g"]) if row["push"] else driver.request("a")
        assert_smega2(driver, row, "a")


def test_what_smega2_sends_goes_by_the_learning_rate_in_force() -> None:
    falling = LearningRate(1.0, kind="milestones", milestones=(1,), factor=0.5)
    driver = driver_of(run_of("smega2", learning_rate=falling), "a")
    driver.request("a")
    driver.exchange("a", 4.0)  # w = -4, v = 4; bucket 0 is still the newest, so the rate in force is 1
    assert driver.places["a", 0].params == -4 - 1.0 * 0.5 * 4
    driver.exchange("a", 4.0)  # w = -4 - (4 + 2)/2 = -7, v = 2 + 4
    assert driver.places["a", 0].params == -7 - 0.5 * 0.5 * 6


# λ = 1/4: a gradient g counts as g + g²/4 (w - sent), with `sent` as it went out with the ticket.
DELAY_COMPENSATION = """
    worker  g  delay  lag  was_sent  counts_as   param
         0  2      0    0         0          2    -2.0
         1  4      1    0         0         -4     2.0
         0  2      1    0        -2          6    -4.0
         1  1      1    0         2       -0.5    -3.5
         0 -2      1    0        -4       -1.5    -2.0
         0  8      0    0        -2          8   -10.0
"""


def test_delay_compensation_moves_a_gradient_to_where_w_is_now() -> None:
    driver = driver_of(run_of("dc", delay_compensation=0.25), "a", "b")
    before, was_sent = 0.0, {0: 0.0, 1: 0.0}
    for row, state in exchanges(driver, DELAY_COMPENSATION):
        assert was_sent[int(row["worker"])] == row["was_sent"]
        assert before - state.params == row["counts_as"]
        assert state.params == row["param"]
        before = was_sent[int(row["worker"])] = row["param"]


def test_delay_compensation_goes_by_the_parameters_as_sent_be_they_rounded() -> None:
    driver = driver_of(run_of("dc", delay_compensation=1.0), "a")
    driver.wire = torch.bfloat16
    driver.machine.state.params.fill_(1 + 2**-8)  # is sent as 1, the nearest bfloat16 with an even last bit
    driver.request("a")
    driver.push("a", 1.0)
    assert driver.machine.state.params == (1 + 2**-8) - (1 + 2**-8)
