"""The run at one moment, for people: what GetStatus and the metrics show.

Training never uses it; it is kept outside the core, and lost with the process.
"""

from dataclasses import dataclass, field, replace
from typing import Self

from ormo_server.core.deadlines import Leases
from ormo_server.core.machine import StateMachine
from ormo_server.core.state import State

_SMOOTHING = 0.1
# Of the share of refused gradients: from 0, some 22 refused ones in a row make a half.
_SHARE_SMOOTHING = 1 / 32


@dataclass(slots=True)
class WorkerObservation:
    """One worker since it joined. Delays are iterations; None and 0 where nothing was reported yet.

    Attributes:
        applied: how many of its gradients were applied.
        samples: samples in these.
        last_delay, smoothed_delay, max_delay: of all its gradients, discarded ones too.
        last_loss: the loss that it reported last.
        compute_seconds: how long its last gradient took, as it reported.
        compute_seconds_sum: how long all its gradients took, as it reported.
        training_seconds: from its first ticket to its last gradient, so that it grows with the sum above.
        ticket_seconds: how long its last redeemed ticket was out.
        gradient_norm: Euclidean norm of its last applied gradient.
        local_steps: in its last applied gradient; 0 in a run without.
        refused: how many of its gradients were not finite or too large.
        refused_share: share of its gradients that were, smoothed exponentially: each new one counts 1/32.
        pushed_at: when its last gradient was counted, by the run's clock.
        refused_requests: of each slot, the number of its last refused gradient.
    """

    applied: int = 0
    samples: int = 0
    last_delay: int = 0
    smoothed_delay: float = 0.0
    max_delay: int = 0
    last_loss: float | None = None
    compute_seconds: float = 0.0
    compute_seconds_sum: float = 0.0
    training_seconds: float = 0.0
    ticket_seconds: float = 0.0
    gradient_norm: float = 0.0
    local_steps: int = 0
    refused: int = 0
    refused_share: float = 0.0
    pushed_at: float | None = None
    refused_requests: dict[int, int] = field(default_factory=dict)

    def counted(self, delay: int, now: float, ticket_seconds: float, compute_seconds: float) -> None:
        """A gradient came and used its ticket up, whether it was applied or came too late."""
        first = self.pushed_at is None
        self.smoothed_delay = delay if first else self.smoothed_delay + _SMOOTHING * (delay - self.smoothed_delay)
        self.last_delay = delay
        self.max_delay = max(self.max_delay, delay)
        self.compute_seconds = compute_seconds
        self.compute_seconds_sum += compute_seconds
        if self.pushed_at is None:
            self.training_seconds, self.pushed_at = ticket_seconds, now
        # Those of several slots may be counted the other way round.
        self.training_seconds += max(0.0, now - self.pushed_at)
        self.pushed_at = max(self.pushed_at, now)
        self.ticket_seconds = ticket_seconds

    def note_taken(self) -> None:
        """A gradient came that was neither infinite nor too large."""
        self.refused_share -= _SHARE_SMOOTHING * self.refused_share

    def refuse(self) -> None:
        """A gradient came that was not finite or too large."""
        self.refused += 1
        self.refused_share += _SHARE_SMOOTHING * (1 - self.refused_share)

    def refuses_anew(self, slot: int, request: int) -> bool:
        """Whether this refused gradient is no retry of one that was refused before."""
        anew = request > self.refused_requests.get(slot, 0)
        if anew:
            self.refused_requests[slot] = request
        return anew

    def apply(self, samples: int, local_steps: int, loss: float | None, norm: float) -> None:
        """Count a gradient that was applied: what it is made of, the loss reported with it, its Euclidean norm."""
        self.applied += 1
        self.samples += samples
        self.gradient_norm, self.local_steps = norm, local_steps
        if loss is not None:
            self.last_loss = loss


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The verdict on the parameters of one iteration.

    Attributes:
        epoch, iteration: of the parameters.
        loss: mean over the test set; NaN if it is not finite.
        accuracy: share that was predicted right; None if not told.
    """

    epoch: int
    iteration: int
    loss: float
    accuracy: float | None


class Observations:
    """All live workers, and the run since the server started."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerObservation] = {}
        self.applied = 0
        self.delay_sum = 0
        self.lag_sum = 0
        self.delay_max = 0
        self.discarded = 0
        self.evaluation: Evaluation | None = None
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

    def of(self, worker: str) -> WorkerObservation:
        """A worker's record. One that was restored with the state has none before its first gradient."""
        if worker not in self.workers:
            self.workers[worker] = WorkerObservation()
        return self.workers[worker]

    def applied_with(self, delay: int, lag_buckets: int, scale: float | None) -> None:
        """A gradient was applied, with so much of the learning rate; None if that can't be told."""
        self.applied += 1
        self.delay_sum += delay
        self.lag_sum += lag_buckets
        self.delay_max = max(self.delay_max, delay)
        if scale is not None:
            self._scales += 1
            self._scale_sum += scale

    def evaluated(self, evaluation: Evaluation) -> None:
        """An evaluation was reported; it is shown unless it is older than what is."""
        shown = self.evaluation
        if shown is None or evaluation.iteration >= shown.iteration:
            self.evaluation = evaluation

    @property
    def step_scale_mean(self) -> float:
        """Mean step scale of the applied gradients; 0 before the first."""
        return self._scale_sum / self._scales if self._scales else 0.0

    @property
    def delay_mean(self) -> float:
        """Mean delay of the applied gradients; 0 before the first."""
        return self.delay_sum / self.applied if self.applied else 0.0

    @property
    def lag_mean(self) -> float | None:
        """Mean bucket lag of the applied gradients; None before the first."""
        return self.lag_sum / self.applied if self.applied else None

    @property
    def loss(self) -> float | None:
        """Mean of the live workers' last losses; what it was when the last one left; None if none was reported."""
        losses = [record.last_loss for record in list(self.workers.values()) if record.last_loss is not None]
        # Divided first: the sum of two finite losses may be infinite.
        return sum(loss / len(losses) for loss in losses) if losses else self._last_loss


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A live worker.

    Attributes:
        worker: its id.
        rank: the smallest number that was free when it joined.
        slots: its in-flight places.
        silent_seconds: since anything was heard of it.
        push_age_seconds: since its last gradient was counted; None before its first.
        seen: what its gradients showed.
    """

    worker: str
    rank: int
    slots: int
    silent_seconds: float
    push_age_seconds: float | None
    seen: WorkerObservation


@dataclass(frozen=True, slots=True)
class RunView:
    """The run. Counts are those of the state machine's `State`.

    Attributes:
        phase: `waiting_for_workers`, `training` or `finished`.
        training_loss: mean of the live workers' last; None if none was reported.
        evaluation: the last that was reported.
        staleness_bound: the method's bound on the delay, in iterations; None if it has none.
        discard_limit: delay from which on the method discards, in iterations; None if it never does.
        workers: by id.
    """

    phase: str
    epoch: int
    iteration: int
    samples: int
    newest_bucket: int
    bucket_size: int
    learning_rate: float
    model_parameters: int
    live_slots: int
    tickets_in_flight: int
    slots_waiting: int
    training_loss: float | None
    evaluation: Evaluation | None
    staleness_bound: float | None
    discard_limit: float | None
    workers: tuple[WorkerView, ...]

    @classmethod
    def of(cls, machine: StateMachine, observations: Observations, leases: Leases, now: float) -> Self:
        """The run as it is, held still by the caller, at that time of its clock."""
        state, method = machine.state, machine.run.method

        def worker(name: str) -> WorkerView:
            seen = observations.workers.get(name, WorkerObservation())
            return WorkerView(
                worker=name,
                rank=state.members[name].rank,
                slots=len(state.members[name].slots),
                silent_seconds=leases.silent_seconds(name, now),
                push_age_seconds=None if seen.pushed_at is None else now - seen.pushed_at,
                seen=replace(seen),
            )

        return cls(
            phase=_phase(state),
            epoch=state.epoch,
            iteration=state.iteration,
            samples=state.samples,
            newest_bucket=state.newest_bucket,
            bucket_size=machine.bucket_size,
            learning_rate=state.learning_rate,
            model_parameters=state.params.numel(),
            live_slots=state.live_slots,
            tickets_in_flight=len(state.tickets),
            slots_waiting=len(state.waiting),
            training_loss=observations.loss,
            evaluation=observations.evaluation,
            staleness_bound=method.staleness_bound,
            discard_limit=method.discard_limit(machine.bucket_size),
            workers=tuple(worker(name) for name in sorted(state.members)),
        )


def _phase(state: State) -> str:
    if state.finished:
        return "finished"
    return "training" if state.started else "waiting_for_workers"
