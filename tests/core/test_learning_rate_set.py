"""The operator sets the learning rate while the run goes on."""

import json
import math

import pytest

from core.driving import Driver, driver_of, fingerprint, run_of
from ormo_server.core import snapshot
from ormo_server.core.errors import BadRequest, Finished
from ormo_server.core.method import Run
from ormo_server.core.step_size import LearningRate


def rates(driver: Driver, gradients: int) -> list[float]:
    """The step sizes of the next gradients of the only worker."""
    taken = []
    for _ in range(gradients):
        driver.request("a")
        taken.append(driver.push("a", 0.0).step_size)
    return taken


def test_it_holds_from_the_next_bucket_on_and_the_schedule_goes_on_at_the_new_peak() -> None:
    run = run_of(learning_rate=LearningRate(1.0, kind="milestones", milestones=(6,), factor=0.5), bucket_size=2)
    driver = driver_of(run, "a")
    assert rates(driver, 2) == [1.0, 1.0]  # buckets open with gradients 1, 2, 4, 6 and so on
    driver.set_learning_rate(4.0)
    assert rates(driver, 6) == [1.0, 4.0, 4.0, 4.0, 4.0, 2.0]


def test_before_the_first_gradient_it_holds_at_once() -> None:
    driver = driver_of(run_of(bucket_size=2), "a")
    driver.set_learning_rate(0.25)
    assert rates(driver, 2) == [0.25, 0.25]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf, 1e308, 1.1e6, 5e-324])
def test_what_is_no_learning_rate_is_refused_and_changes_nothing(rate: float) -> None:
    driver = driver_of(run_of(), "a")
    before = fingerprint(driver.machine)
    with pytest.raises(BadRequest, match=r"expected 1e-15 to 1e\+06"):
        driver.set_learning_rate(rate)
    assert fingerprint(driver.machine) == before


def test_a_run_that_is_over_has_none_to_set() -> None:
    driver = driver_of(run_of(stop_after_gradients=1), "a")
    rates(driver, 1)
    with pytest.raises(Finished):
        driver.set_learning_rate(2.0)


def restored(driver: Driver, run: Run) -> Driver:
    taken = snapshot.take(driver.machine)
    through_json = snapshot.Snapshot(taken.tensors, json.loads(json.dumps(taken.fields)))
    other = driver_of(run)
    other.machine = snapshot.restore(run, through_json, epoch=1, keep_tickets=True)
    other.join("a", incarnation=driver.incarnations["a"] + 1)
    return other


def test_it_outlives_restarts_until_the_settings_say_something_newer() -> None:
    driver = driver_of(run_of(bucket_size=1), "a")
    driver.set_learning_rate(4.0)
    rates(driver, 2)
    same = restored(driver, run_of(bucket_size=1))
    assert rates(same, 2) == [4.0, 4.0]
    changed = restored(same, run_of(bucket_size=1, learning_rate=LearningRate(0.5)))
    assert rates(changed, 2)[1:] == [0.5]


def test_a_checkpoint_from_before_there_was_such_a_thing_can_be_restored() -> None:
    driver = driver_of(run_of(), "a")
    taken = snapshot.take(driver.machine)
    del taken.fields["tuning"]
    assert snapshot.restore(run_of(), taken, epoch=1, keep_tickets=True).state.tuning is None
