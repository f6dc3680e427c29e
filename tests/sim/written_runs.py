"""Finished simulations with figures that a test made up."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ormo_server.sim.record import Directory, Record, Row, summary
from ormo_server.sim.settings import SimSettings

BATCH = 4
EPOCH_SAMPLES = 256
SECONDS_PER_GRADIENT = 0.5

# One evaluation: gradients so far, train loss, test accuracy.
Scored = tuple[int, float, float]


def write_run(
    path: Path,
    scores: Sequence[Scored],
    *,
    delays: Mapping[int, int] | None = None,
    diverged: bool = False,
    **settings: Any,
) -> Path:
    """A directory as `ormo-sim` leaves it."""
    told = SimSettings(plots=False, **({"task": "points"} | settings))
    record = Record(EPOCH_SAMPLES, diverged=diverged, delays=Counter(delays or {0: 1}))
    directory = Directory(path)
    for gradients, train_loss, test_accuracy in scores:
        row = _row(gradients, train_loss, test_accuracy)
        record.rows.append(row)
        directory.write_row(row)
    found = summary(record, torch.zeros(1), ())
    directory.complete(record, {"settings": told.recorded(), **found})
    return path


def _row(gradients: int, train_loss: float, test_accuracy: float) -> Row:
    return Row(
        seconds=gradients * SECONDS_PER_GRADIENT,
        gradients=gradients,
        epochs=gradients * BATCH / EPOCH_SAMPLES,
        batch_loss=train_loss,
        train_loss=train_loss,
        test_loss=train_loss,
        test_accuracy=test_accuracy,
        learning_rate=0.01,
        delay_mean=1.0,
        delay_max=3,
        discarded=0,
        newest_bucket=1,
        bucket_size=4,
        bytes_moved=10 * gradients,
        int8_bytes_moved=4 * gradients,
    )
