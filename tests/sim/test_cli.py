"""The command `ormo-sim` as a user has it: a real process, its results on disk, its summary on the screen."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from system.forked import ran
from system.programs import ENVIRONMENT

Run = Callable[..., "subprocess.CompletedProcess[str]"]
METHOD = ["--method", "ormo", "--workers", "8", "--slow", "1:10x", "--learning-rate", "0.01"]
LENGTH = ["--stop-after-gradients", "120", "--evaluate-every-gradients", "40"]


def simulate(directory: Path, *flags: str, run: Run = ran) -> "subprocess.CompletedProcess[str]":
    workload = [] if "--task" in flags else ["--workload", "sim.by_ticket:workload"]
    script = directory.with_suffix(".py")
    script.write_text("from ormo_server.sim.cli import main\nraise SystemExit(main())\n")
    done = run(script, *flags, *workload, "--directory", str(directory), environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done


def started(script: Path, *flags: str, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """With an interpreter of its own, which orders sets as no other does."""
    command = [sys.executable, str(script), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def summary(directory: Path) -> Any:
    return json.loads((directory / "summary.json").read_text())


def test_a_simulation_leaves_rows_delays_summary_and_plots(tmp_path: Path) -> None:
    done = simulate(tmp_path / "run", *METHOD, *LENGTH)
    with (tmp_path / "run" / "evaluations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["gradients"] for row in rows] == ["40", "80", "120"]
    with (tmp_path / "run" / "delays.csv").open() as file:
        delays = {int(row["delay"]): int(row["gradients"]) for row in csv.DictReader(file)}
    found = summary(tmp_path / "run")
    assert sum(delays.values()) == found["gradients"] == 120
    assert max(delays) == found["delay"]["max"]
    assert found["settings"]["workers"] == 8
    assert 0 < found["overhead_seconds_per_push"] < found["wall_seconds"]
    assert list((tmp_path / "run").glob("*.png"))
    assert f"test accuracy  {found['test_accuracy']:.2%}" in done.stdout
    assert found["digest"][:16] in done.stdout


def test_without_what_draws_a_simulation_ends_before_it_begins(tmp_path: Path) -> None:
    code = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "matplotlib" else find_spec(name)
from ormo_server.sim.cli import main
sys.exit(main(["--directory", "run"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ormo-sim: matplotlib is not installed: pip install 'ormo-parameter-server[sim]'\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(300)  # three of them, one after the other
def test_two_processes_with_the_same_seed_agree_to_the_last_bit(tmp_path: Path) -> None:
    for name, seed, run in (("a", "3", started), ("b", "3", started), ("c", "4", ran)):
        flags = ["--task", "digits", *METHOD, "--stop-after-gradients", "40", "--seed", seed, "--no-plots"]
        simulate(tmp_path / name, *flags, run=run)
    digests = [summary(tmp_path / name)["digest"] for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_a_simulation_of_a_task_learns_it(tmp_path: Path) -> None:
    flags = ["--task", "digits", "--workers", "4", "--learning-rate", "0.01", "--epochs", "6", "--no-plots"]
    simulate(tmp_path / "run", *flags)
    assert summary(tmp_path / "run")["test_accuracy"] > 0.9
    assert summary(tmp_path / "run")["seconds_to_accuracy"]["0.8"] is not None


def test_the_workers_that_come_and_go_are_those_of_the_command_line(tmp_path: Path) -> None:
    flags = ["--compute-seconds", "constant:1", "--join", "3.5:3", "--crash", "6.5:0", "--failure-timeout-seconds", "2"]
    simulate(tmp_path / "run", "--workers", "1", *flags, "--stop-after-gradients", "21", "--no-plots")
    # 6 of the first worker, at 1 to 6 s, and 5 of each of the three that join, at 4.5 to 8.5 s.
    assert summary(tmp_path / "run")["virtual_seconds"] == 8.5


def test_a_staleness_bound_that_keeps_workers_idle_is_warned_of(tmp_path: Path) -> None:
    flags = [
        "--scheduler",
        "bounded-staleness",
        "--staleness-bound",
        "2",
        "--workers",
        "4",
        "--stop-after-gradients",
        "8",
    ]
    done = simulate(tmp_path / "run", *flags, "--no-plots")
    assert "a staleness bound of 2 keeps 1 of 4 slots idle: set it to at least 3" in done.stdout
    assert summary(tmp_path / "run")["delay"]["max"] <= 2
