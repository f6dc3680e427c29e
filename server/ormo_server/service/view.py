"""The run at one moment, for people: what GetStatus and the metrics show."""

from dataclasses import dataclass

from ormo_server.service.observations import Evaluation, WorkerObservation


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
        staleness_bound: of the method; None if it has none.
        discard_limit: the same.
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
