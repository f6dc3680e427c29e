"""How fast a run is, from what the server counted between two answers. Time is the server's own uptime."""

import math
from collections import deque
from dataclasses import dataclass

from ormo_protos.v1 import parameter_server_pb2 as pb

# So that a worker that takes seconds for a gradient has a rate, and a change shows soon.
_WINDOW_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Counted per second, mean over the time between two answers.

    Attributes:
        gradients, samples: of the run.
        workers: gradients of each worker that was there all the time.
    """

    gradients: float
    samples: float
    workers: dict[str, float]


def rates_between(older: pb.GetStatusResponse, newer: pb.GetStatusResponse) -> Rates | None:
    """The rates, or None if the two are not of one start of the server, or no time lies between them."""
    seconds = newer.uptime_seconds - older.uptime_seconds
    if older.iteration.epoch != newer.iteration.epoch or not 0 < seconds < math.inf:
        return None
    before = {worker.worker: worker.applied for worker in older.workers}
    return Rates(
        (newer.applied - older.applied) / seconds,
        (newer.samples - older.samples) / seconds,
        {
            worker.worker: (worker.applied - before[worker.worker]) / seconds
            for worker in newer.workers
            # One that has joined anew counts from 0.
            if worker.worker in before and worker.applied >= before[worker.worker]
        },
    )


class History:
    """The answers of the last seconds."""

    def __init__(self) -> None:
        self._answers: deque[pb.GetStatusResponse] = deque()

    def add(self, status: pb.GetStatusResponse) -> None:
        """Take the newest answer; those before a restart of the server don't count any more."""
        if self._answers and rates_between(self._answers[-1], status) is None:
            self._answers.clear()
        self._answers.append(status)
        while len(self._answers) > 2 and status.uptime_seconds - self._answers[1].uptime_seconds >= _WINDOW_SECONDS:
            self._answers.popleft()

    @property
    def newest(self) -> pb.GetStatusResponse | None:
        """The last answer."""
        return self._answers[-1] if self._answers else None

    @property
    def rates(self) -> Rates | None:
        """Between the oldest answer that is kept and the newest; None if these are one."""
        return rates_between(self._answers[0], self._answers[-1]) if self._answers else None
