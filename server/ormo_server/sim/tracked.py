"""A simulation's rows, for a tracker."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict

from ormo_runtime.tracking import Position, Setting, Tracker, Tracking
from ormo_server.sim.record import Row
from ormo_server.sim.settings import SimSettings

# Where a row is, or what says the same in other units.
_POSITION = {"gradients", "samples", "seconds", "epochs"}
_SCALARS = str | int | float | bool | None


class SimulatedRows:
    """Makes figures of rows; those that are not numbers are left out, but for losses, which tell of divergence."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._before: Row | None = None

    def track(self, row: Row) -> None:
        """Hand a row over."""
        figures = {
            name: float(value)
            for name, value in asdict(row).items()
            if name not in _POSITION and (math.isfinite(value) or name.endswith("_loss"))
        }
        before, self._before = self._before, row
        if before is not None and row.seconds > before.seconds:
            seconds = row.seconds - before.seconds
            figures["updates_per_second"] = (row.gradients - before.gradients) / seconds
            figures["samples_per_second"] = (row.samples - before.samples) / seconds
        self._tracker.track(figures, Position(updates=row.gradients, samples=row.samples, seconds=row.seconds))


@contextlib.contextmanager
def tracked(settings: SimSettings, tell: Callable[[str], object]) -> Iterator[Callable[[Row], None]]:
    """What to tell of each row; nothing comes of it where the settings name no tracker.

    Raises:
        UsageError: there is no such tracker, or it could not be made.
    """
    if not settings.track:
        yield lambda _: None
        return
    shown: dict[str, Setting] = {
        name: value if isinstance(value, _SCALARS) else str(value) for name, value in settings.recorded().items()
    }
    tracking = Tracking(settings.track, shown, tell)
    try:
        yield SimulatedRows(tracking).track
    finally:
        tracking.close()
