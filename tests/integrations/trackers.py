"""Simulations and runs that the pages' trackers follow, by the real commands."""

import csv
import re
import sys
from pathlib import Path

import pytest

from docs.pages import blocks, text_of
from ormo_server.sim import cli

FIGURES = {"test_loss", "test_accuracy", "batch_loss", "delay_mean", "lag_mean", "learning_rate"}


def command(page: str, program: str) -> list[str]:
    """The flags that a page shows."""
    found = re.search(rf"^{program} (.*--track.*)$", text_of(f"with/{page}.md"), re.MULTILINE)
    assert found is not None
    return found[1].split()


def simulate(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """Follow a simulation by the page's tracker, from the file that its command names; returns what was written."""
    address = command(page, "ormo-local")[-1]
    (folder / address.split(":")[0]).write_text(blocks(text_of(f"with/{page}.md"), "python")[0])
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    flags = ["--workload", "sim.analytic:LeastSquares", "--workers", "2", "--stop-after-gradients", "60"]
    assert cli.main([*flags, "--no-plots", "--directory", "run", "--track", address]) == 0
    return rows_of(folder / "run")


def rows_of(directory: Path) -> list[dict[str, float]]:
    """The evaluations of a run."""
    with (directory / "evaluations.csv").open(encoding="utf-8") as file:
        return [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]
