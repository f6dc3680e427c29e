"""A simulation's rows, as a tracker gets them."""

import csv
import json
from pathlib import Path

import pytest

from ormo_server.sim import cli
from ormo_server.sim.record import Row
from ormo_server.sim.tracked import SimulatedRows

TRACKER = """
import json
class Tracker:
    def __init__(self, settings):
        self.file = open("tracked.jsonl", "w")
        print(json.dumps(settings), file=self.file)
    def track(self, figures, position):
        print(json.dumps([figures, position]), file=self.file)
    def close(self):
        self.file.close()
"""


def row(number: int, **more: float) -> Row:
    told = {"batch_loss": 0.5, "train_loss": float("nan"), "test_loss": 0.5, "test_accuracy": 0.9}
    told |= {"learning_rate": 0.1, "delay_mean": float("nan"), "delay_max": 0, "discarded": 0, "newest_bucket": 0}
    told |= {"seconds": 2.0 * number, "gradients": 8 * number, "epochs": 0.1, "bucket_size": 4, "samples": 80 * number}
    return Row(**(told | more))  # type: ignore[arg-type]


def test_rates_are_in_virtual_time_and_what_is_not_known_is_left_out() -> None:
    got = []

    class Tracker:
        def track(self, figures: dict[str, float], position: object) -> None:
            got.append((figures, position))

        def close(self) -> None: ...

    rows = SimulatedRows(Tracker())  # type: ignore[arg-type]
    rows.track(row(1))
    rows.track(row(3, delay_mean=2.5, lag_mean=0.5))
    (first, _), (second, position) = got
    assert not first.keys() & {"delay_mean", "lag_mean", "samples_per_second"}
    assert first["train_loss"] != first["train_loss"]  # a loss that is none is shown
    assert (second["delay_mean"], second["lag_mean"]) == (2.5, 0.5)
    assert (second["samples_per_second"], second["updates_per_second"]) == (40.0, 4.0)
    assert position == {"updates": 24, "samples": 240, "seconds": 6.0}


def test_the_command_tracks_each_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sim_tracker.py").write_text(TRACKER)
    monkeypatch.chdir(tmp_path)
    flags = ["--workload", "sim.analytic:LeastSquares", "--workers", "2", "--stop-after-gradients", "30"]
    code = cli.main([*flags, "--directory", "run", "--no-plots", "--track", "sim_tracker.py:Tracker"])
    assert code == 0
    settings, *rows = [json.loads(line) for line in (tmp_path / "tracked.jsonl").read_text().splitlines()]
    assert (settings["method"], settings["workers"], settings["milestones"]) == ("ormo", 2, "[]")
    with (tmp_path / "run" / "evaluations.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(rows) == len(written) > 1
    last, (figures, position) = written[-1], rows[-1]
    assert position == {"updates": 30, "samples": int(last["samples"]), "seconds": float(last["seconds"])}
    assert figures["test_loss"] == float(last["test_loss"])
    assert figures["lag_mean"] == float(last["lag_mean"])


def test_an_unknown_tracker_is_a_sentence_before_anything_is_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--workload", "sim.analytic:LeastSquares", "--stop-after-gradients", "30", "--directory", "run"]
    assert cli.main([*flags, "--track", "wandb"]) == 2
    assert "--track 'wandb' names no tracker: expected tensorboard:DIR" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
