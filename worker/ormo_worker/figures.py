"""What a server's statuses and an evaluator tell of a run, as rows of figures: for trackers and for tables."""

import math
import time
from collections.abc import Mapping, Sequence

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.tracking import Position, Setting, Tracker

_SECONDS_BETWEEN_ROWS = 10.0  # without an evaluation


class RunFigures:
    """Makes rows of one status after the other.

    Means and rates are those of the time since the row before; in the first row the means are those since the server
    started, and there are no rates.
    """

    def __init__(self) -> None:
        self._origin: float | None = None
        self._before = pb.GetStatusResponse()
        self._position: Position | None = None

    def row(self, status: pb.GetStatusResponse, now: float) -> tuple[dict[str, float], Position]:
        """A row of what this status tells that came now, by the monotonic clock; what it does not tell is left out."""
        if self._origin is None:  # seconds go on if the server is started again
            self._origin = now - status.uptime_seconds
        position = Position(updates=status.iteration.number, samples=status.samples, seconds=now - self._origin)
        figures = _figures(status) | _since(self._before, status) | self._rates(position)
        self._before, self._position = status, position
        return figures, position

    def seconds_at(self, moment: float) -> float:
        """What the run's clock showed at a moment of the monotonic one; not before the first row."""
        assert self._origin is not None
        return max(0.0, moment - self._origin)

    def _rates(self, position: Position) -> dict[str, float]:
        before = self._position
        if before is None:  # all that an earlier server did would count as this one's
            return {}
        seconds = position["seconds"] - before["seconds"]
        updates, samples = position["updates"] - before["updates"], position["samples"] - before["samples"]
        if seconds <= 0 or min(updates, samples) < 0:  # a server without a journal may have gone back
            return {}
        return {"updates_per_second": updates / seconds, "samples_per_second": samples / seconds}


def _figures(status: pb.GetStatusResponse) -> dict[str, float]:
    found = {
        "learning_rate": status.learning_rate,
        "workers": len(status.workers),
        "bucket_size": status.bucket_size,
        "newest_bucket": status.newest_bucket,
        "discarded": status.discarded,
    }
    return found | ({"batch_loss": status.loss} if status.HasField("loss") else {})


def _since(before: pb.GetStatusResponse, status: pb.GetStatusResponse) -> dict[str, float]:
    """Means over the gradients that were applied between the two."""
    if status.applied < before.applied:  # by a server that was started again
        before = pb.GetStatusResponse()
    number = status.applied - before.applied
    if not number:
        return {}

    def mean(last: float, first: float) -> float:
        # Not below 0 by what is left of rounding.
        return max(0.0, (last * status.applied - first * before.applied) / number)

    found = {"delay_mean": mean(status.delay_mean, before.delay_mean), "delay_max": float(status.delay_max)}
    # Older servers don't tell the lag.
    return found | ({"lag_mean": mean(status.lag_mean, before.lag_mean)} if status.HasField("lag_mean") else {})


class RunRows:
    """Has trackers follow a run: a row every ten seconds, and one before each evaluation's own.

    Args:
        trackers: that are called with each row.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers
        self._figures = RunFigures()
        self._status = pb.GetStatusResponse()
        self._looked_at = 0.0
        self._sent: pb.GetStatusResponse | None = None
        self._due_at = -math.inf

    def look(self, status: pb.GetStatusResponse) -> None:
        """Take a newer status."""
        self._status, self._looked_at = status, time.monotonic()
        if status.HasField("iteration") and self._looked_at >= self._due_at:
            self._send_status()

    def evaluated(self, iteration: int, samples: int, loss: float, accuracy: float, *, seconds_ago: float = 0) -> None:
        """Take an evaluation.

        Args:
            iteration: whose parameters were evaluated.
            samples: counted by then.
            loss, accuracy: on the test set; NaN for an accuracy that is none.
            seconds_ago: how long before the last look they were the newest.
        """
        if self._sent is not self._status:
            self._send_status()
        figures = {"test_loss": loss} | ({} if math.isnan(accuracy) else {"test_accuracy": accuracy})
        seconds = self._figures.seconds_at(self._looked_at - seconds_ago)
        self._send(figures, Position(updates=iteration, samples=samples, seconds=seconds))

    def _send_status(self) -> None:
        self._sent, self._due_at = self._status, self._looked_at + _SECONDS_BETWEEN_ROWS
        self._send(*self._figures.row(self._status, self._looked_at))

    def _send(self, figures: Mapping[str, float], position: Position) -> None:
        for tracker in self._trackers:
            tracker.track(figures, position)


def settings_of(status: pb.GetStatusResponse) -> dict[str, Setting]:
    """How the run is trained, for a tracker to show."""
    told = ("method", "update_rule", "step_scale", "scheduler", "version")
    found: dict[str, Setting] = {field.name: getattr(status.settings, field.name) for field in _RUN_SETTINGS}
    return found | {name: getattr(status, name) for name in told}


_RUN_SETTINGS = pb.RunSettings.DESCRIPTOR.fields
