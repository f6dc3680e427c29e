"""What a local run leaves in its directory, and that `ormo-sim plot` draws it."""

import csv
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.settings import UsageError
from ormo_runtime.tracking import Position
from ormo_server.sim import plots
from ormo_server.sim.measured import read_measured
from ormo_worker.local import results
from ormo_worker.local.cluster import Cluster, LocalSettings
from ormo_worker.local.recorder import Recorder
from ormo_worker.local.results import Evaluations

EXPORTED = """
ormo_gradient_delay_iterations_bucket{le="0.0"} 10.0
ormo_gradient_delay_iterations_bucket{le="1.0"} 40.0
"""


def status(number: int, **more: object) -> pb.GetStatusResponse:
    told = {"applied": number, "samples": 32 * number, "uptime_seconds": 1.0, "method": "ormo"} | more
    told |= {"delay_mean": 1.0, "delay_max": 3, "learning_rate": 0.1, "bucket_size": 2, "newest_bucket": number // 2}
    return pb.GetStatusResponse(iteration=pb.Iteration(epoch=1, number=number), **told)  # type: ignore[arg-type]


def run_in(directory: Path, *, method: str = "ormo", accuracy: float = 0.9) -> Recorder:
    """A run of 40 gradients with two evaluations."""
    directory.mkdir(exist_ok=True)
    recorder = Recorder(Cluster(LocalSettings(directory=directory, workers=2, method=method)), pytest.fail)
    for number, loss in ((20, 1.0), (40, 0.5)):
        recorder.look(status(number, loss=loss / 2, method=method))
        told = {"iteration": number - 5.0, "samples": 32 * (number - 5.0), "loss": loss, "seconds": 0.25}
        recorder.evaluated(told | {"accuracy": accuracy})
    recorder.close()
    return recorder


def table(directory: Path) -> list[dict[str, str]]:
    with (directory / "evaluations.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_a_table_a_summary_and_pictures(tmp_path: Path) -> None:
    recorder = run_in(tmp_path)
    said = recorder.summarize(status(40, loss=0.25), EXPORTED)
    assert said == f"{tmp_path / 'curves.png'}, {tmp_path / 'delays.png'}"
    for name in ("curves.png", "delays.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] == 1000
    first, second = table(tmp_path)
    assert (first["gradients"], first["samples"], first["test_loss"], first["batch_loss"]) == (
        "15",
        "480",
        "1.0",
        "0.5",
    )
    assert (second["gradients"], second["test_loss"], second["batch_loss"]) == ("35", "0.5", "0.25")
    assert first["samples_per_second"] == ""  # nothing was known of the time before
    assert float(second["samples_per_second"]) > 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["settings"]["workers"] == 2
    assert (summary["gradients"], summary["samples"], summary["batch_loss"]) == (40, 1280, 0.25)
    assert (tmp_path / "delays.csv").read_text().split() == ["delay,gradients", "0,10", "1,30"]


def test_the_plotter_reads_what_was_written(tmp_path: Path) -> None:
    run_in(tmp_path).summarize(status(40), EXPORTED)
    run = read_measured(tmp_path)
    assert (run.method, run.settings["task"], dict(run.delays)) == ("ormo", "digits", {0: 10, 1: 30})
    assert [(row.gradients, row.samples, row.test_loss, row.test_accuracy) for row in run.rows] == [
        (15, 480, 1.0, 0.9),
        (35, 1120, 0.5, 0.9),
    ]
    assert run.rows[0].seconds < run.rows[1].seconds


def test_runs_are_lines_of_one_picture_each_by_its_directory_where_they_are_alike(tmp_path: Path) -> None:
    for name, method in (("a", "ormo"), ("b", "ormo"), ("c", "asgd")):
        run_in(tmp_path / name, method=method).summarize(status(40, method=method), "")
    found = plots.draw([tmp_path / name for name in "abc"], tmp_path / "into")
    assert found == [tmp_path / "into" / "curves.png"]  # nothing is known of delays
    lines = plots.lines_of([read_measured(tmp_path / name) for name in "abc"])
    assert [line.label for line in lines] == ["ormo, a", "ormo, b", "asgd, c"]


def test_runs_and_simulations_are_not_drawn_together(tmp_path: Path) -> None:
    run_in(tmp_path / "run").summarize(status(40), "")
    with pytest.raises(UsageError, match="have other clocks: draw them into two directories"):
        plots.draw([tmp_path / "run", tmp_path], tmp_path)


def test_an_accuracy_that_is_none_is_drawn_by_its_loss(tmp_path: Path) -> None:
    assert "curves.png" in run_in(tmp_path, accuracy=float("nan")).summarize(status(40), EXPORTED)
    assert table(tmp_path)[0]["test_accuracy"] == ""


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("matplotlib", "none: matplotlib is missing, pip install 'ormo-parameter-server[sim]'"),
        ("ormo_server", "none: ormo_server is missing, pip install 'ormo-parameter-server[server,sim]'"),
    ],
)
def test_where_nothing_can_draw_a_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, said: str
) -> None:
    monkeypatch.setattr(results, "find_spec", lambda name: None if name == package else sys)
    assert run_in(tmp_path).summarize(status(40), "") == said
    assert (tmp_path / "summary.json").exists()


def test_what_the_plotter_says_is_shown(tmp_path: Path) -> None:
    run_in(tmp_path).summarize(status(40), "")
    (tmp_path / "evaluations.csv").write_text("seconds\n")
    assert results.draw(tmp_path) == f"none: ormo-sim: nothing was evaluated in {tmp_path}: there is nothing to draw"


def at(seconds: float) -> Position:
    return Position(updates=1, samples=1, seconds=seconds)


def test_a_run_that_is_continued_goes_on_with_its_table_and_its_time(tmp_path: Path) -> None:
    Evaluations(tmp_path, continues=False, tell=pytest.fail).track({"test_loss": 2.0}, at(10.0))
    Evaluations(tmp_path, continues=True, tell=pytest.fail).track({"test_loss": 1.0}, at(5.0))
    assert [(row["seconds"], row["test_loss"]) for row in table(tmp_path)] == [("10.0", "2.0"), ("15.0", "1.0")]


def test_a_new_run_keeps_an_earlier_table_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "evaluations.csv").write_text("of a simulation")
    Evaluations(tmp_path, continues=False, tell=pytest.fail).track({"test_loss": 2.0}, at(1.0))
    assert len(table(tmp_path)) == 1
    assert (tmp_path / "evaluations-earlier.csv").read_text() == "of a simulation"


def test_a_table_that_can_not_be_written_is_told_of_once(tmp_path: Path) -> None:
    told: list[str] = []
    evaluations = Evaluations(tmp_path / "gone", continues=False, tell=told.append)
    evaluations.track({"test_loss": 2.0}, at(1.0))
    (sentence,) = told
    assert sentence.startswith("the table of evaluations lacks rows from here on, the run goes on: [Errno 2]")
