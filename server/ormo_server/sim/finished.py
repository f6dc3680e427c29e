"""Finished simulations, read back from their directories."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ormo_runtime.settings import UsageError
from ormo_server.sim.config import TOLD_BY_TRACE, SimSettings
from ormo_server.sim.record import DELAYS, EVALUATIONS, SETTINGS_BEFORE, SUMMARY, Row


class Delays(BaseModel):
    """Of the gradients that were applied; None if there were none."""

    mean: float | None
    max: int | None


class Summary(BaseModel):
    """What a simulation's summary says; see `record.summary` for the figures."""

    model_config = ConfigDict(frozen=True, extra="allow")

    settings: dict[str, Any]
    gradients: int
    epochs: float
    discarded: int
    refused: int
    diverged: bool
    train_loss: float | None
    test_loss: float | None
    test_accuracy: float
    best_test_accuracy: float
    virtual_seconds: float
    delay: Delays
    digest: str


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """One simulation that came to its end.

    Attributes:
        path: its directory.
        summary: of it.
        method: its name, or what it is made of.
        rows: one per evaluation, at least one.
        delays: how many gradients were applied with each delay.
    """

    path: Path
    summary: Summary
    method: str
    rows: tuple[Row, ...]
    delays: Mapping[int, int]

    def gradients_to_loss(self, target: float) -> int | None:
        """How many gradients were applied at the first evaluation with this train loss or less."""
        return next((row.gradients for row in self.rows if row.train_loss <= target), None)

    def seconds_to_accuracy(self, target: float) -> float | None:
        """The virtual time of the first evaluation with this test accuracy or more."""
        return next((row.seconds for row in self.rows if row.test_accuracy >= target), None)


_ROWS = TypeAdapter(tuple[Row, ...])
_COUNTS = TypeAdapter(dict[int, int])


def read_run(path: Path) -> FinishedRun:
    """Read a simulation's directory.

    Raises:
        UsageError: it is no directory of a simulation, or of one that is not finished, or its files are damaged.
    """
    if not (path / SUMMARY).is_file():
        what = "has no" if path.is_dir() else "is no directory, so there is no"
        raise UsageError(f"{path} {what} {SUMMARY}: give the directory of a simulation that has come to its end")
    try:
        summary = Summary.model_validate_json((path / SUMMARY).read_bytes())
        method = _settings_of(summary).run().method.name
        rows = _ROWS.validate_python(_table(path / EVALUATIONS))
        delays = _COUNTS.validate_python({row["delay"]: row["gradients"] for row in _table(path / DELAYS)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"the results in {path} are damaged or of another version ({_first_line(error)}): run that simulation anew"
        ) from error
    if not rows:
        raise UsageError(f"the results in {path} are damaged ({EVALUATIONS} has no row): run that simulation again")
    return FinishedRun(path, summary, method, rows, delays)


def _settings_of(summary: Summary) -> SimSettings:
    given = {**SETTINGS_BEFORE, **summary.settings}
    if given.get("trace") is not None:  # what that tells is written down with the rest, and nobody may give it
        given = {name: value for name, value in given.items() if name not in TOLD_BY_TRACE}
    return SimSettings(**given)


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        details = error.errors(include_url=False)[0]
        where = ".".join(map(str, details["loc"]))
        return f"{error.title}, {where}: {details['msg']}" if where else details["msg"]
    return f"{type(error).__name__}: {error}"
