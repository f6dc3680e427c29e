"""Comparisons as a user has them: real processes, results on disk, interrupted and taken up again."""

import csv
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from ormo_server.sim import cli
from ormo_server.sim.plan import Plan
from ormo_server.sim.record import read_run
from ormo_server.sim.reproduce.cells import is_done, run_cell
from ormo_server.sim.reproduce.suite import load_suite
from ormo_server.sim.settings import SimSettings
from ormo_server.store.files import DirectoryLock
from sim.analytic import BROKEN_SEED, ENDLESS
from system.forked import CONTEXT
from system.programs import ENVIRONMENT

TESTS = Path(__file__).parents[1]
COMMAND = [sys.executable, "-c", "from ormo_server.sim.cli import main; raise SystemExit(main())", "reproduce"]
INTERRUPTED = 130
MARKERS = "<!-- results: tiny -->\n<!-- end of results: tiny -->\n"


def write_suite(tmp_path: Path, *, workload: str = "LeastSquares", report_seeds: Sequence[int] = (1, 2)) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(f"""
        title = "least squares"
        methods = ["ormo", "asgd"]
        learning_rates = [0.001, 0.01]
        report_seeds = {list(report_seeds)}
        target_train_loss = 0.3
        target_accuracy = 0.8

        [simulation]
        workload = "sim.analytic:{workload}"
        task = "points"
        batch_size = 4
        stop_after_gradients = 120
        evaluate_every_gradients = 40

        [[clusters]]
        workers = 4
        setting = "homogeneous"
    """)
    return path


@pytest.fixture(autouse=True)
def _forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is simulated from within this process is so in forks; from the command line, in what that starts."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: CONTEXT)


def reproduce(suite: Path, *flags: str) -> int:
    arguments = ["reproduce", "--suite", str(suite), "--directory", str(suite.parent / "out"), "--processes", "2"]
    return cli.main([*arguments, "--commit", "c0ffee", *flags])


def summaries(directory: Path) -> dict[str, int]:
    """When each cell was completed, in nanoseconds."""
    found = directory.glob("cells/*/*/*/summary.json")
    return {str(path.parent.relative_to(directory / "cells")): path.stat().st_mtime_ns for path in found}


def test_a_comparison_runs_once_in_parallel_and_says_what_serial_runs_say(tmp_path: Path) -> None:
    suite_path = write_suite(tmp_path)
    shown = tmp_path / "README.md"
    shown.write_text(MARKERS)
    out = tmp_path / "out"
    assert reproduce(suite_path, "--into", str(shown)) == 0

    suite = load_suite(str(suite_path))
    completed = summaries(out)
    assert len(completed) == 4 + 4
    for cell in suite.grid():
        alone = Plan(suite.settings(cell)).run().summary
        assert read_run(out / "cells" / cell.path).summary.digest == alone["digest"]
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["purpose"] for row in rows] == ["grid"] * 4 + ["report"] * 4
    assert "commit c0ffee" in (out / "table.md").read_text()
    assert "| 4 workers | homogeneous: test accuracy, % (η) |" in shown.read_text()
    assert sorted(path.suffix for path in (out / "figures").iterdir()) == [".png", ".png"]

    # Again: nothing is simulated, and everything is written as before.
    before = {name: (out / name).read_bytes() for name in ("results.csv", "table.md")}
    assert reproduce(suite_path, "--into", str(shown)) == 0
    assert summaries(out) == completed
    assert {name: (out / name).read_bytes() for name in before} == before

    # What is damaged or was made with other settings is simulated again, and nothing else.
    damaged = "K4-homogeneous/ormo/rate-0.001-seed-0"
    (out / "cells" / damaged / "evaluations.csv").unlink()
    changed = suite_path.read_text().replace(
        "evaluate_every_gradients = 40", "evaluate_every_gradients = 40\nmomentum = 0.9"
    )
    suite_path.write_text(changed)
    assert reproduce(suite_path) == 0
    assert {name for name, when in summaries(out).items() if when != completed[name]} == {damaged}
    suite_path.write_text(changed.replace("momentum = 0.9", "momentum = 0.8"))
    assert reproduce(suite_path) == 0
    assert all(when != completed[name] for name, when in summaries(out).items() if name in completed)


LOCAL = """
    title = "least squares, by local steps"
    methods = ["local-sgd", "local-ormo", "diloco"]
    learning_rates = [0.25, 0.5]
    momenta = [0.5]
    widened = 1
    measure = "loss"
    report_seeds = [1, 2]
    target_train_loss = 0.3
    target_accuracy = 0.8

    [simulation]
    workload = "sim.analytic:Local"
    task = "points"
    batch_size = 4
    local_steps = 4
    stop_after_samples = 960
    evaluate_every_gradients = 20

    [[clusters]]
    workers = 1
    setting = "single"
    methods = ["local-sgd"]
    learning_rates = [1]

    [[clusters]]
    workers = 4
    setting = "unequal"
    simulation = { slow = "1:10x" }

    [[clusters]]
    workers = 4
    setting = "unequal-by-speed"
    simulation = { slow = "1:10x", local_steps_by_speed = true }
"""


def test_results_of_a_version_that_had_fewer_settings_and_columns_are_not_made_again(tmp_path: Path) -> None:
    settings = SimSettings(workload="sim.analytic:LeastSquares", batch_size=4, stop_after_gradients=8, plots=False)
    run_cell(tmp_path, settings, "c0ffee")
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("local_steps", "inner", "inner_lr", "second_momentum"):
        del summary["settings"][name]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    rows = [line.split(",")[:-4] for line in (tmp_path / "evaluations.csv").read_text().splitlines()]
    (tmp_path / "evaluations.csv").write_text("\n".join(map(",".join, rows)) + "\n")
    assert is_done(tmp_path, settings)
    assert [(row.bytes_moved, row.samples) for row in read_run(tmp_path).rows] == [(0, 0)] * (len(rows) - 1)
    summary["settings"]["momentum"] = 0.1
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert not is_done(tmp_path, settings)


def test_local_steps_are_compared_by_loss_over_samples_bytes_and_time_beyond_the_grids_edge(tmp_path: Path) -> None:
    suite_path = tmp_path / "tiny.toml"
    suite_path.write_text(LOCAL)
    shown = tmp_path / "results.md"
    shown.write_text(MARKERS)
    out = tmp_path / "out"
    assert reproduce(suite_path, "--into", str(shown)) == 0
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    # More is better here, so every method with a grid goes on to a total move of 1, and no farther.
    moves = {
        (row["setting"], row["method"]): float(row["learning_rate"]) / (1 - float(row["momentum"]))
        for row in rows
        if row["purpose"] == "report"
    }
    assert set(moves.values()) == {1.0}
    assert len(moves) == 1 + 2 * 3
    assert all(int(row["bytes_moved"]) > int(row["int8_bytes_moved"]) > 0 for row in rows)
    text = shown.read_text()
    assert f"Python {platform.python_version()}" in text
    assert "| 1 worker | η, β | test loss | in " in text
    assert "| unequal-by-speed: `local-ormo` | 0.5, 0.5 † |" in text
    completed = summaries(out)
    assert reproduce(suite_path, "--into", str(shown)) == 0
    assert summaries(out) == completed
    assert shown.read_text() == text
    assert len(list((out / "figures").iterdir())) == 6


@pytest.fixture(params=["Ctrl-C", "SIGTERM"])
def interrupted(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A suite's directory in which a comparison was cut off in the middle."""
    suite = write_suite(tmp_path, workload="Endless")
    flags = ["--suite", str(suite), "--directory", str(tmp_path / "out"), "--processes", "2"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*COMMAND, *flags],
            env=ENVIRONMENT | {"PYTHONPATH": str(TESTS), ENDLESS: "yes"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for_first_cells(process, tmp_path / "out")
        children = psutil.Process(process.pid).children(recursive=True)
        if request.param == "Ctrl-C":  # a terminal sends it to all
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) == INTERRUPTED
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
    finally:
        process.kill()
        process.wait()
    said = (tmp_path / "log").read_text()
    assert "interrupted: run the same command again to resume" in said
    assert "Traceback" not in said
    return suite


def wait_for_first_cells(process: "subprocess.Popen[bytes]", out: Path) -> None:
    deadline = time.monotonic() + 60
    while len(summaries(out)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_interrupted_comparison_goes_on_where_it_was(interrupted: Path) -> None:
    before = summaries(interrupted.parent / "out")
    assert 2 <= len(before) < 8
    assert not (interrupted.parent / "out" / "table.md").exists()
    assert reproduce(interrupted) == 0
    after = summaries(interrupted.parent / "out")
    assert len(after) == 8
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("workload", ["Broken", "Deadly"])
def test_a_cell_that_fails_leaves_the_others_alone(
    tmp_path: Path, workload: str, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = write_suite(tmp_path, workload=workload, report_seeds=(1, BROKEN_SEED))
    assert reproduce(suite) == 1
    out = tmp_path / "out"
    assert len(summaries(out)) == 4 + 2
    assert "2 simulations failed: see" in capsys.readouterr().out
    reason = "seed 13 does not work here" if workload == "Broken" else "its process was killed"
    assert (out / "failures.txt").read_text().count(reason) >= 2
    assert "**2 simulations failed and are missing.**" in (out / "table.md").read_text()


def test_what_fails_everywhere_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(write_suite(tmp_path, workload="FromFile"), "--data-dir", str(tmp_path)) == 2
    wanted = f"ormo-sim: none of the simulations could run; the first: no points in {tmp_path}: give the folder with"
    assert wanted in capsys.readouterr().err


def test_missing_markers_are_noticed_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("no markers")
    assert reproduce(write_suite(tmp_path), "--into", str(tmp_path / "README.md")) == 2
    assert "does not say where the results go" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "threshold"), [("ormo", 2.0), ("asgd-da", 1.0)])
def test_a_cell_of_before_thresholds_were_written_is_done_if_the_method_still_has_that_one(
    method: str, threshold: float, tmp_path: Path
) -> None:
    told = {"method": method, "workload": "sim.analytic:LeastSquares", "batch_size": 4, "stop_after_gradients": 1}
    settings, before = SimSettings(**told), SimSettings(**told, delay_threshold=2.0)
    run_cell(tmp_path, settings, "c0ffee")
    assert is_done(tmp_path, settings)
    summary = tmp_path / "summary.json"
    found = json.loads(summary.read_text())
    assert found["settings"].pop("delay_threshold") == threshold
    summary.write_text(json.dumps(found))
    assert is_done(tmp_path, settings) == (threshold == 2.0)
    assert is_done(tmp_path, before)
    assert read_run(tmp_path).method == before.run().method.name


def test_a_cell_of_before_names_had_units_is_done_and_can_be_drawn(tmp_path: Path) -> None:
    settings = SimSettings(
        workload="sim.analytic:LeastSquares", batch_size=4, stop_after_gradients=1, evaluate_every_gradients=7
    )
    run_cell(tmp_path, settings, "c0ffee")
    now = read_run(tmp_path).summary.settings
    summary = tmp_path / "summary.json"
    found = json.loads(summary.read_text())
    for old, new in SimSettings.renamed.items():
        found["settings"][old] = found["settings"].pop(new)
    assert found["settings"]["evaluate_every"] == 7
    summary.write_text(json.dumps(found))
    assert is_done(tmp_path, settings)
    assert not is_done(tmp_path, settings.model_copy(update={"evaluate_every_gradients": 8}))
    assert read_run(tmp_path).summary.settings == now


def test_two_comparisons_do_not_write_to_the_same_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = DirectoryLock(tmp_path / "out")
    assert reproduce(write_suite(tmp_path)) == 2
    lock.release()
    assert "is in use by another" in capsys.readouterr().err
