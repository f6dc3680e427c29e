"""Runs of real processes, as `ormo-local` leaves them, read for the same pictures as simulations."""

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ormo_runtime.settings import UsageError
from ormo_server.sim.record import DELAYS, EVALUATIONS, SUMMARY, Row


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """One run of real processes.

    Attributes:
        path: its directory.
        settings: that it was started with.
        method: its name, or what it is made of.
        rows: one per evaluation, at least one; `epochs` and `train_loss` are not known, and not a number.
        delays: how many gradients were counted with each delay; from 4 on in groups, each by its largest.
    """

    path: Path
    settings: Mapping[str, Any]
    method: str
    rows: tuple[Row, ...]
    delays: Mapping[int, int]


class _Summary(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    settings: dict[str, Any]
    method: str


def is_measured(path: Path) -> bool:
    """Whether this is the directory of such a run, and not of a simulation."""
    try:
        return json.loads((path / SUMMARY).read_bytes()).get("measured") is True
    except (OSError, ValueError, AttributeError):
        return False


def read_measured(path: Path) -> MeasuredRun:
    """Read the directory of a run of `ormo-local`.

    Raises:
        UsageError: its files are damaged, or nothing was evaluated.
    """
    try:
        summary = _Summary.model_validate_json((path / SUMMARY).read_bytes())
        rows = tuple(map(_row, _table(path / EVALUATIONS)))
        delays = {int(row["delay"]): int(row["gradients"]) for row in _table(path / DELAYS)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = "its summary" if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"the results in {path} are damaged or of another version ({said}): run it again") from error
    if not rows:
        raise UsageError(f"nothing was evaluated in {path}: there is nothing to draw")
    return MeasuredRun(path, summary.settings, summary.method, rows, delays)


def _row(told: Mapping[str, str]) -> Row:
    known = {name: float(text) for name, text in told.items() if text}
    return Row(
        seconds=known["seconds"],
        gradients=int(known["gradients"]),
        epochs=math.nan,
        batch_loss=known.get("batch_loss", math.nan),
        train_loss=math.nan,
        test_loss=known["test_loss"],
        test_accuracy=known.get("test_accuracy", math.nan),
        learning_rate=known["learning_rate"],
        delay_mean=known.get("delay_mean", math.nan),
        delay_max=int(known.get("delay_max", 0)),
        discarded=int(known["discarded"]),
        newest_bucket=int(known["newest_bucket"]),
        bucket_size=int(known["bucket_size"]),
        samples=int(known["samples"]),
        lag_mean=known.get("lag_mean", math.nan),
    )


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
