"""What `--track tensorboard:DIR` writes, as TensorBoard reads it."""

import sys
from pathlib import Path
from typing import Any

import pytest

from docs.pages import blocks, text_of
from integrations.trackers import FIGURES, command, rows_of
from ormo_runtime.tracking import Position, Tracking
from ormo_server.sim import cli
from system.programs import Stage, as_flags

accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="`make test-integrations` installs it"
)


def read(directory: Path) -> Any:
    events = accumulator.EventAccumulator(str(directory))
    events.Reload()
    return events


def scalars(events: Any, tag: str) -> list[tuple[int, float, float]]:
    """Step, time and value of each."""
    return [(each.step, each.wall_time, each.tensor_proto.float_val[0]) for each in events.Tensors(tag)]


def test_a_figure_is_there_by_updates_and_by_samples_either_by_time(tmp_path: Path) -> None:
    tracking = Tracking(f"tensorboard:{tmp_path}", {})
    tracking.track({"test_loss": 0.5}, Position(updates=10, samples=320, seconds=3.0))
    tracking.track({"test_loss": 0.25}, Position(updates=30, samples=960, seconds=1003.0))
    tracking.close()
    events = read(tmp_path)
    assert sorted(events.Tags()["tensors"]) == ["by samples/test_loss", "by updates/test_loss"]
    (step, first, value), (later_step, second, later_value) = scalars(events, "by updates/test_loss")
    assert (step, value, later_step, later_value) == (10, 0.5, 30, 0.25)
    assert second - first == pytest.approx(1000.0)  # of the run's clock, which may be virtual
    assert [(step, value) for step, _, value in scalars(events, "by samples/test_loss")] == [(320, 0.5), (960, 0.25)]


@pytest.mark.timeout(300)  # seven processes
def test_ormo_local_is_shown(stage: Stage) -> None:
    short = {"workers": 2, "stop_after_gradients": 60, "evaluate_every_seconds": 0.5, "directory": "run"}
    flags = [*command("tensorboard", "ormo-local"), *as_flags(short)]
    code, printed = stage.program("local", *flags, module="ormo_worker.local").printed()
    assert code == 0, printed
    assert "did not get to the tracker" not in printed
    events = read(stage.folder / "runs" / "tb" / "first")
    assert {f"by {axis}/{name}" for axis in ("updates", "samples") for name in FIGURES} <= set(events.Tags()["tensors"])
    last = rows_of(stage.folder / "run")[-1]
    step, _, value = scalars(events, "by updates/test_accuracy")[-1]
    assert (step, value) == (60, pytest.approx(last["test_accuracy"]))
    assert scalars(events, "by samples/test_loss")[-1][0] == last["samples"]


def test_an_evaluator_is_shown(stage: Stage) -> None:
    stage.server(stop_after_gradients=30, learning_rate=0.02)
    flags = command("tensorboard", "ormo-worker evaluate")
    flags[flags.index("127.0.0.1:50051")] = stage.address
    evaluator = stage.program("evaluator", "evaluate", *flags, module="ormo_worker")
    assert stage.worker("w", task="digits").wait() == 0
    code, printed = evaluator.printed()
    assert code == 0, printed
    events = read(stage.folder / "runs" / "tb" / "second")
    tested = [step for step, _, _ in scalars(events, "by updates/test_loss")]
    assert tested[-1] == 30
    assert len(tested) == len(printed.splitlines())


def test_a_simulation_is_shown_in_virtual_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = command("tensorboard", "ormo-sim")
    flags[flags.index("500")] = "100"
    assert cli.main([*flags, "--directory", "run", "--no-plots"]) == 0
    events = read(tmp_path / "runs" / "tb" / "simulated")
    seconds = [row["seconds"] for row in rows_of(tmp_path / "run")]
    times = [time for _, time, _ in scalars(events, "by updates/train_loss")]
    assert [time - times[0] for time in times] == pytest.approx([each - seconds[0] for each in seconds], abs=1e-3)


def test_the_pages_tracker_of_ones_own_gets_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(text_of("with/tensorboard.md"), "python")
    (tmp_path / "own_tracker.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    flags = ["--workload", "sim.analytic:LeastSquares", "--stop-after-gradients", "60", "--no-plots"]
    assert cli.main([*flags, "--directory", "run", "--track", "own_tracker.py:Tracker"]) == 0
    method, *rows = (tmp_path / "figures.txt").read_text().splitlines()
    assert method == "ormo"
    assert [float(number) for number in rows[-1].split()] == [60, rows_of(tmp_path / "run")[-1]["test_loss"]]
