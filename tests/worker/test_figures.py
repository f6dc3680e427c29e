"""Rows of figures from statuses that a test made up."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.tracking import Position
from ormo_worker.figures import RunFigures, RunRows, settings_of


def status(number: int, **more: Any) -> pb.GetStatusResponse:
    """A run of one epoch at this iteration, each gradient of 10 samples."""
    told = {"applied": number, "samples": 10 * number, "uptime_seconds": 5.0} | more
    return pb.GetStatusResponse(iteration=pb.Iteration(epoch=1, number=number), **told)


def test_means_and_rates_are_those_since_the_row_before() -> None:
    figures = RunFigures()
    first, position = figures.row(status(4, delay_mean=1.0, lag_mean=0.5, delay_max=3), now=100.0)
    assert position == {"updates": 4, "samples": 40, "seconds": 5.0}
    assert (first["delay_mean"], first["lag_mean"], first["delay_max"]) == (1.0, 0.5, 3)
    assert not first.keys() & {"samples_per_second", "updates_per_second", "batch_loss"}
    second, position = figures.row(status(10, delay_mean=2.2, lag_mean=1.1, loss=0.25), now=103.0)
    assert position == {"updates": 10, "samples": 100, "seconds": 8.0}
    assert second["delay_mean"] == pytest.approx((22 - 4) / 6)
    assert second["lag_mean"] == pytest.approx((11 - 2) / 6)
    assert (second["samples_per_second"], second["updates_per_second"]) == (20.0, 2.0)
    assert second["batch_loss"] == 0.25


def test_what_did_not_move_has_no_mean_and_no_rate() -> None:
    figures = RunFigures()
    figures.row(status(4, delay_mean=1.0), now=1.0)
    again, _ = figures.row(status(4, delay_mean=1.0), now=1.0)
    assert not {name for name in again if name.startswith(("delay", "lag")) or name.endswith("per_second")}


def test_a_server_that_was_started_again_counts_from_its_start_and_seconds_go_on() -> None:
    figures = RunFigures()
    figures.row(status(40, delay_mean=3.0), now=100.0)
    # Without a journal it has gone back to iteration 30, and has applied two gradients since.
    again, position = figures.row(status(32, applied=2, delay_mean=1.5, uptime_seconds=1.0), now=110.0)
    assert position == {"updates": 32, "samples": 320, "seconds": 15.0}
    assert again["delay_mean"] == 1.5
    assert "samples_per_second" not in again


class Rows:
    def __init__(self) -> None:
        self.rows: list[tuple[Mapping[str, float], Position]] = []

    def track(self, figures: Mapping[str, float], position: Position) -> None:
        self.rows.append((figures, position))

    def close(self) -> None: ...


def test_there_is_a_row_every_ten_seconds_and_two_with_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, now = Rows(), 0.0
    monkeypatch.setattr("ormo_worker.figures.time.monotonic", lambda: now)
    rows = RunRows([kept])
    rows.look(pb.GetStatusResponse(phase=pb.GetStatusResponse.PHASE_WAITING_FOR_MODEL))
    assert kept.rows == []  # there is no run yet
    for now in (1.0, 6.0, 11.0, 12.0):  # read by the clock above
        rows.look(status(int(now)))
    assert [position["updates"] for _, position in kept.rows] == [1, 11]
    rows.evaluated(9, 90, loss=0.5, accuracy=0.75, seconds_ago=3.0)
    (figures, before), (tested, position) = kept.rows[2:]
    assert before["updates"] == 12
    assert "test_loss" not in figures
    assert tested == {"test_loss": 0.5, "test_accuracy": 0.75}
    assert position == {"updates": 9, "samples": 90, "seconds": 5.0 + 12 - 3 - 1}
    rows.evaluated(12, 120, loss=0.25, accuracy=math.nan)
    assert kept.rows[4:] == [({"test_loss": 0.25}, {"updates": 12, "samples": 120, "seconds": 16.0})]


def test_a_tracker_is_told_how_the_run_is_trained() -> None:
    told = status(0, method="ormo", scheduler="asynchronous", settings=pb.RunSettings(learning_rate=0.1))
    shown = settings_of(told)
    assert (shown["method"], shown["scheduler"], shown["learning_rate"], shown["momentum"]) == (
        "ormo",
        "asynchronous",
        0.1,
        0.0,
    )
