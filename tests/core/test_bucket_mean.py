"""What a gradient counts where a bucket's mean is wanted: learning rate 1, every gradient is 1, no momentum."""

import pytest
import torch

from core.driving import Driver, driver_of, run_of
from ormo_server.core import snapshot
from ormo_server.core.machine import StateMachine

MANY = [f"w{number}" for number in range(16)]


def moves(driver: Driver, *pushers: str) -> list[float]:
    """By how much each of these workers' gradients moves w."""
    found = []
    for worker in pushers:
        before = driver.machine.state.params.clone()
        driver.push(worker, 1.0)
        found.append(float(before - driver.machine.state.params))
    return found


def weights(driver: Driver, *pushers: str) -> list[float]:
    """The steps of these workers' gradients: η is 1."""
    return [driver.push(worker, 1.0).step_size for worker in pushers]


def of_mean(*workers: str, **choices: object) -> Driver:
    return driver_of(run_of("sgd", bucket="mean", **choices), *workers)


def test_workers_in_step_move_w_by_the_mean_of_their_gradients() -> None:
    driver = of_mean(*"abcd")
    for worker in "abcd":
        driver.request(worker)
    assert moves(driver, *"abcd") == [0.25] * 4


def test_a_fixed_size_is_what_a_bucket_is_divided_by() -> None:
    driver = of_mean("a", bucket_size=8)
    driver.request("a")
    assert moves(driver, "a") == [1 / 8]


def test_workers_that_push_and_leave_one_after_the_other_move_w_by_one_mean_together() -> None:
    driver = of_mean(*MANY)
    for worker in MANY:
        driver.request(worker)
    total = 0.0
    for worker in MANY:
        total += sum(moves(driver, worker))
        driver.leave(worker)
    assert total == 1.0


def test_workers_that_came_one_after_the_other_and_push_together_move_w_by_one_mean() -> None:
    driver = of_mean()
    for worker in MANY:
        driver.join(worker)
        driver.request(worker)
    assert moves(driver, *MANY) == [1 / 16] * 16


def test_the_weight_comes_on_top_of_the_step_scale() -> None:
    driver = of_mean("a", "b", scale="inverse")
    driver.request("a")
    driver.request("b")
    for _ in range(3):
        driver.exchange("a", 1.0)
    assert driver.push("b", 1.0).step_size == 1 / 3 / 2


def test_in_a_round_a_lost_gradient_counts_as_nothing() -> None:
    driver = of_mean(*"abc", scheduler="synchronous", min_workers=3)
    for worker in "abc":
        driver.request(worker)
    assert weights(driver, "a", "b") == [1 / 3] * 2
    driver.hand_back("c")
    driver.request("a")
    driver.request("b")  # who came back is left out of this round until it asks
    assert weights(driver, "a", "b") == [1 / 2] * 2


def test_in_a_round_who_comes_late_makes_it_larger_for_who_pushes_after_it() -> None:
    driver = of_mean("a", "b", scheduler="synchronous", min_workers=2)
    for worker in "ab":
        driver.request(worker)
    assert weights(driver, "a") == [1 / 2]
    driver.join("c")
    driver.request("c")
    assert weights(driver, "b", "c") == [1 / 3] * 2


@pytest.mark.parametrize("bucket", ["sum", "mean"])
def test_tickets_of_a_checkpoint_say_the_size_of_their_bucket_where_it_counts(bucket: str) -> None:
    driver = driver_of(run_of("sgd", bucket=bucket), *MANY)
    for worker in MANY:
        driver.request(worker)
    taken = snapshot.take(driver.machine)
    rows = taken.fields["tickets"]
    assert [row.get("bucket_size") for row in rows] == [16 if bucket == "mean" else None] * 16
    driver.machine = snapshot.restore(driver.machine.run, taken, epoch=0, keep_tickets=True)
    for worker in MANY[1:]:
        driver.leave(worker)
    assert moves(driver, "w0") == [1 / 16 if bucket == "mean" else 1.0]


def test_tickets_of_an_earlier_version_count_by_the_size_of_today() -> None:
    driver = of_mean("a", "b")
    driver.request("a")
    taken = snapshot.take(driver.machine)
    del taken.fields["tickets"][0]["bucket_size"]
    driver.machine = snapshot.restore(driver.machine.run, taken, epoch=0, keep_tickets=True)
    assert moves(driver, "a") == [1 / 2]


def test_sums_do_not_know_of_weights() -> None:
    machine = StateMachine.fresh(run_of("sgd"), torch.zeros(1))
    driver = Driver(machine)
    for worker in "ab":
        driver.join(worker)
        driver.request(worker)
    assert moves(driver, "a", "b") == [1.0, 1.0]
