"""What people want to see of a run and training never uses: kept outside the core, lost with the process."""

from dataclasses import dataclass

from ormo_server.core.state import PushResult


@dataclass(slots=True)
class WorkerObservation:
    """One worker since it joined. Delays are iterations; None and 0 where nothing was reported yet."""

    applied: int = 0
    last_delay: int = 0
    max_delay: int = 0
    last_loss: float | None = None
    compute_seconds: float = 0.0


class Observations:
    """All live workers, and the run since the server started."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerObservation] = {}
        self.applied = 0
        self.delay_sum = 0
        self.delay_max = 0
        self.discarded = 0
        self._scales = 0
        self._scale_sum = 0.0
        self._last_loss: float | None = None

    def joined(self, worker: str) -> None:
        """Start a worker's record, or start it anew."""
        self.workers[worker] = WorkerObservation()

    def gone(self, worker: str) -> None:
        """Drop a worker's record."""
        self._last_loss = self.loss
        self.workers.pop(worker, None)

    def counted(self, worker: str, result: PushResult, loss: float | None, compute_seconds: float) -> None:
        """A gradient was applied."""
        self.applied += 1
        self.delay_sum += result.delay
        self.delay_max = max(self.delay_max, result.delay)
        mine = self.workers.setdefault(worker, WorkerObservation())
        mine.applied += 1
        mine.last_delay = result.delay
        mine.max_delay = max(mine.max_delay, result.delay)
        mine.compute_seconds = compute_seconds
        mine.last_loss = mine.last_loss if loss is None else loss

    def scaled(self, scale: float) -> None:
        """A gradient was applied with so much of the learning rate."""
        self._scales += 1
        self._scale_sum += scale

    @property
    def step_scale_mean(self) -> float:
        """Mean step scale of the applied gradients; 0 before the first."""
        return self._scale_sum / self._scales if self._scales else 0.0

    @property
    def delay_mean(self) -> float:
        """Mean delay of the applied gradients; 0 before the first."""
        return self.delay_sum / self.applied if self.applied else 0.0

    @property
    def loss(self) -> float | None:
        """Mean of the live workers' last losses; what it was when the last one left; None if none was reported."""
        losses = [record.last_loss for record in list(self.workers.values()) if record.last_loss is not None]
        return sum(losses) / len(losses) if losses else self._last_loss
