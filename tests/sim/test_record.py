"""What a simulation writes down, against figures worked out by hand."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from core.driving import run_of
from ormo_runtime.workload import Scores
from ormo_server.core.machine import StateMachine
from ormo_server.core.state import PushResult
from ormo_server.sim.record import Directory, Record, digest, summary


def result(iteration: int, delay: int, *, discarded: bool = False) -> PushResult:
    return PushResult(1, 0, iteration, delay, 0, 0.0 if discarded else 1.0, discarded)


@pytest.fixture
def machine() -> StateMachine:
    return StateMachine.fresh(run_of("sgd"), torch.zeros(2))


def record_of(machine: StateMachine, delays: list[int], scores: list[Scores], seconds: float = 10.0) -> Record:
    """One evaluation after each gradient, `seconds` apart."""
    record = Record(epoch_samples=100)
    for number, (delay, score) in enumerate(zip(delays, scores, strict=True), start=1):
        machine.state.iteration, machine.state.samples = number, 50 * number
        record.pushed(result(number, delay), loss=float(number))
        record.evaluated(number * seconds, machine, score, 0.0)
    return record


def scored(*accuracies: float) -> list[Scores]:
    return [Scores(1 - accuracy, 2 - accuracy, accuracy) for accuracy in accuracies]


def test_a_row_covers_what_came_since_the_last_one(machine: StateMachine) -> None:
    record = Record(epoch_samples=100)
    for iteration, delay in ((1, 0), (2, 5), (3, 1)):
        record.pushed(result(iteration, delay), loss=iteration)
    record.pushed(result(3, 9, discarded=True), loss=6.0)
    machine.state.iteration, machine.state.samples = 3, 30
    record.evaluated(4.0, machine, *scored(0.5), 0.1)
    row = record.rows[0]
    assert (row.batch_loss, row.delay_mean, row.delay_max, row.discarded) == (3.0, 2.0, 5, 1)
    assert (row.seconds, row.gradients, row.epochs) == (4.0, 3, 0.3)
    record.evaluated(5.0, machine, *scored(0.6), 0.1)
    assert math.isnan(record.rows[1].batch_loss)
    assert record.rows[1].delay_max == 0


def test_the_summary_says_when_an_accuracy_was_reached_first(machine: StateMachine) -> None:
    record = record_of(machine, [0, 0, 0], scored(0.4, 0.85, 0.8))
    found = summary(record, machine.state.params, [0.5, 0.8, 0.9])
    assert found["seconds_to_accuracy"] == {"0.5": 20.0, "0.8": 20.0, "0.9": None}
    assert (found["test_accuracy"], found["best_test_accuracy"]) == (0.8, 0.85)
    assert (found["virtual_seconds"], found["updates_per_virtual_second"], found["epochs"]) == (30.0, 0.1, 1.5)


def test_the_distribution_of_delays_is_that_of_the_applied_gradients(machine: StateMachine) -> None:
    delays = [0] * 50 + [2] * 40 + [7] * 9 + [100]
    record = record_of(machine, delays, scored(*[0.5] * 100))
    record.pushed(result(100, 5000, discarded=True), loss=0.0)
    found = summary(record, machine.state.params, [])["delay"]
    assert found == {"mean": (80 + 63 + 100) / 100, "median": 0, "p90": 2, "p99": 7, "max": 100}


def test_what_is_not_finite_is_null_in_the_summary(machine: StateMachine) -> None:
    record = record_of(machine, [0], [Scores(math.nan, math.inf, 0.1)])
    found = summary(record, machine.state.params, [])
    assert (found["train_loss"], found["test_loss"]) == (None, None)
    json.dumps(found, allow_nan=False)


def test_the_digest_sees_parameters_rows_and_delays(machine: StateMachine) -> None:
    params = machine.state.params
    base = digest(record_of(machine, [0, 1], scored(0.1, 0.2)), params)
    assert base == digest(record_of(machine, [0, 1], scored(0.1, 0.2)), params)
    assert base != digest(record_of(machine, [0, 2], scored(0.1, 0.2)), params)
    assert base != digest(record_of(machine, [0, 1], scored(0.1, 0.3)), params)
    assert base != digest(record_of(machine, [0, 1], scored(0.1, 0.2)), params + 1)


def test_a_directory_has_rows_as_they_come_and_a_summary_at_the_end(machine: StateMachine, tmp_path: Path) -> None:
    record = record_of(machine, [0, 3], scored(0.1, 0.2))
    directory = Directory(tmp_path / "run")
    directory.write_row(record.rows[0])
    with (tmp_path / "run" / "evaluations.csv").open() as file:
        assert [row["test_accuracy"] for row in csv.DictReader(file)] == ["0.1"]
    assert not (tmp_path / "run" / "summary.json").exists()
    directory.write_row(record.rows[1])
    directory.complete(record, {"gradients": 2})
    assert (tmp_path / "run" / "delays.csv").read_text().split() == ["delay,gradients", "0,1", "3,1"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"gradients": 2}


def test_a_directory_that_is_used_again_is_not_complete_until_its_end(machine: StateMachine, tmp_path: Path) -> None:
    Directory(tmp_path).complete(Record(1), {})
    Directory(tmp_path).close()
    assert not (tmp_path / "summary.json").exists()
