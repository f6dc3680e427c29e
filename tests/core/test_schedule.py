"""Learning rates by iteration: tables, and one sentence for each mistake."""

from typing import Any

import pytest

from core.driving import driver_of, run_of
from ormo_server.core.errors import SettingsError
from ormo_server.core.step_size import LearningRate

TABLES = [
    (LearningRate(0.5), {0: 0.5, 1: 0.5, 1_000_000: 0.5}),
    (LearningRate(0.4, warmup_gradients=4), {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 4: 0.4, 99: 0.4}),
    (LearningRate(0.4, warmup_gradients=1), {0: 0.4, 1: 0.4}),
    (
        LearningRate(8.0, kind="milestones", milestones=(3, 5), factor=0.5),
        {0: 8.0, 2: 8.0, 3: 4.0, 4: 4.0, 5: 2.0, 99: 2.0},
    ),
    (
        LearningRate(8.0, kind="milestones", milestones=(1, 4), factor=0.5, warmup_gradients=2),
        {0: 4.0, 1: 8.0, 2: 4.0, 3: 4.0, 4: 2.0},
    ),
    # cos(60°) = 1/2, so a third of the way down a quarter of the height is lost.
    (
        LearningRate(4.0, kind="cosine", cosine_gradients=6),
        {0: 4.0, 2: 3.0, 3: 2.0, 4: 1.0, 6: 0.0, 99: 0.0},
    ),
    (
        LearningRate(5.0, kind="cosine", cosine_gradients=8, final=1.0, warmup_gradients=2),
        {0: 2.5, 1: 5.0, 2: 5.0, 4: 4.0, 5: 3.0, 6: 2.0, 8: 1.0, 99: 1.0},
    ),
]


@pytest.mark.parametrize(("schedule", "expected"), TABLES, ids=lambda part: getattr(part, "kind", ""))
def test_the_learning_rate_is_what_the_table_says(schedule: LearningRate, expected: dict[int, float]) -> None:
    # A cosine and a few products of doubles: 1e-12 is thousands of roundings.
    assert {t: schedule.at(t) for t in expected} == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"peak": 0.0}, r"learning rate 0.0: expected 1e-15 to 1e\+06"),
        ({"peak": -1.0}, "learning rate -1.0: expected"),
        ({"peak": 5e-324}, "learning rate 5e-324: expected"),
        ({"peak": 1.1e6}, "learning rate 1100000.0: expected"),
        ({"peak": float("nan")}, "learning rate nan: expected"),
        ({"peak": float("inf")}, "learning rate inf: expected"),
        ({"kind": "linear"}, "schedule 'linear' is not known: choose one of constant, milestones, cosine"),
        ({"kind": "milestones"}, "needs at least one milestone"),
        ({"kind": "milestones", "milestones": (5, 3)}, r"milestones \(5, 3\): expected rising iterations"),
        ({"kind": "milestones", "milestones": (3, 3)}, r"milestones \(3, 3\): expected rising iterations"),
        ({"kind": "cosine"}, "a cosine over 0 gradients after a warm-up of 0"),
        ({"kind": "cosine", "cosine_gradients": 5, "warmup_gradients": 5}, "the cosine must end after the warm-up"),
        ({"warmup_gradients": -1}, "a warm-up of -1 gradients: expected at least 0"),
        ({"factor": 0.0}, "milestone factor 0.0: expected a finite number above 0"),
        ({"factor": float("nan")}, "milestone factor nan: expected"),
        ({"final": -0.1}, r"final learning rate -0.1: expected 0 to 1e\+06"),
        ({"final": float("inf")}, "final learning rate inf: expected"),
        (
            {"kind": "milestones", "milestones": tuple(range(400)), "factor": 10.0},
            r"learning rate 1.0 times 10.0 at each of 400 milestones: expected at most 1e\+06 at the end",
        ),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_in_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        LearningRate(**({"peak": 1.0} | settings))


def test_a_schedule_of_many_milestones_ends_at_0() -> None:
    assert LearningRate(1.0, kind="milestones", milestones=tuple(range(400))).at(400) == 0.0


def test_the_learning_rate_changes_only_when_a_bucket_opens() -> None:
    falling = LearningRate(1.0, kind="milestones", milestones=(1, 2, 3, 4, 5, 6), factor=0.5)
    driver = driver_of(run_of(bucket_size=2, learning_rate=falling), "a")
    driver.request("a")
    used = [driver.exchange("a", 1.0).step_size for _ in range(7)]
    # Bucket 0 at t = 0; bucket 1 opens at t = 1 and is full at t = 3; bucket 2 opens at t = 3, bucket 3 at t = 5.
    assert used == [1.0, 2.0**-1, 2.0**-1, 2.0**-3, 2.0**-3, 2.0**-5, 2.0**-5]


def test_a_late_gradient_gets_the_learning_rate_in_force_not_that_of_its_bucket() -> None:
    falling = LearningRate(1.0, kind="milestones", milestones=(1,), factor=0.25)
    driver = driver_of(run_of(learning_rate=falling), "a", "b")
    driver.request("b")
    driver.request("a")
    assert [driver.exchange("a", 1.0).step_size for _ in range(2)] == [1.0, 0.25]
    late = driver.push("b", 1.0)
    assert (late.lag_buckets, late.step_size) == (1, 0.25)
