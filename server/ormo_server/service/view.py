"""The run at one moment, for people: what GetStatus and the metrics show."""

from dataclasses import dataclass, replace
from typing import Self

from ormo_server.core.deadlines import Leases
from ormo_server.core.machine import StateMachine
from ormo_server.core.state import State
from ormo_server.service.observations import Evaluation, Observations, WorkerObservation


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
