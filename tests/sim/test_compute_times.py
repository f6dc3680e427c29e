"""Distributions of compute times, and times that were measured."""

from itertools import islice
from pathlib import Path
from statistics import fmean, stdev

import pytest

from ormo_runtime.settings import UsageError
from ormo_server.sim.machines import parse


def drawn(text: str, count: int = 4000, worker: int = 0, seed: int = 0) -> list[float]:
    return list(islice(parse(text).of_worker(worker, seed), count))


def test_a_constant_is_the_same_every_time() -> None:
    assert drawn("constant:2.5", 3) == [2.5, 2.5, 2.5]


@pytest.mark.parametrize(
    ("text", "mean", "deviation"),
    [
        ("normal:2,0.2", 2.0, 0.2),
        ("lognormal:2,0.5", 2.0, 2.0 * (2.718281828 ** (0.5**2) - 1) ** 0.5),
        ("exponential:3", 3.0, 3.0),
    ],
)
def test_a_distribution_has_the_mean_and_deviation_that_it_says(text: str, mean: float, deviation: float) -> None:
    times = drawn(text)
    # Four standard errors of a mean of 4000; deviations of these are known to about 5 %.
    assert fmean(times) == pytest.approx(mean, abs=4 * deviation / 4000**0.5)
    assert stdev(times) == pytest.approx(deviation, rel=0.15)
    assert min(times) > 0


def test_no_time_is_below_a_twentieth_of_the_mean() -> None:
    assert min(drawn("normal:1,3")) == 0.05


def test_workers_draw_each_their_own_times_and_the_same_again_for_the_same_seed() -> None:
    assert drawn("normal:1,0.1", 5) == drawn("normal:1,0.1", 5)
    assert drawn("normal:1,0.1", 5) != drawn("normal:1,0.1", 5, worker=1)
    assert drawn("normal:1,0.1", 5) != drawn("normal:1,0.1", 5, seed=1)


def test_measured_times_are_repeated_in_order_and_workers_dealt_out(tmp_path: Path) -> None:
    file = tmp_path / "times.csv"
    file.write_text("worker,seconds\nb,2.5\na,1\nb,3\n")
    assert drawn(f"trace:{file}", 3, worker=0) == [1.0, 1.0, 1.0]
    assert drawn(f"trace:{file}", 3, worker=1) == [2.5, 3.0, 2.5]
    assert drawn(f"trace:{file}", 2, worker=2) == [1.0, 1.0]


@pytest.mark.parametrize(
    "text",
    ["normal:1", "constant", "constant:0", "constant:-1", "normal:1,-1", "uniform:1", "constant:x", "normal:nan,1", ""],
)
def test_what_is_no_distribution_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"compute time .*: expected constant:MEAN, normal:MEAN,DEVIATION, .*FILE"):
        parse(text)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("worker,seconds\na,quick\n", "line 2: seconds is 'quick', expected a number above 0"),
        ("worker,seconds\na,1\na,0\n", "line 3: seconds is '0', expected a number above 0"),
        ("name,time\na,1\n", "line 2: expected a head line with the columns worker,seconds, and both in each"),
        ("worker,seconds\na\n", "line 2: expected a head line"),
        ("worker,seconds\n", "has no gradient, and so no compute times"),
        ("", "has no gradient"),
    ],
)
def test_a_file_that_has_no_times_is_refused_in_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "times.csv"
    file.write_text(content)
    with pytest.raises(UsageError, match=sentence):
        parse(f"trace:{file}")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.csv can't be read"):
        parse(f"trace:{tmp_path / 'none.csv'}")
