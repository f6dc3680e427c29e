"""One simulation from its settings to its results."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ormo_runtime.settings import UsageError, slow_factors
from ormo_runtime.workload import InnerSettings, Workload, WorkloadSettings, load_workload
from ormo_server.core.inputs import Join
from ormo_server.core.method import Run
from ormo_server.core.schedulers import SCHEDULERS
from ormo_server.settings import TrainingSettings
from ormo_server.sim import record
from ormo_server.sim.machines import MachinePark, parse
from ormo_server.sim.record import Record, Row
from ormo_server.sim.settings import SimSettings
from ormo_server.sim.simulation import Replay, Simulation
from ormo_server.sim.training import Training
from ormo_server.trace import Recorded, Segment, Start, read_trace
from ormo_server.trace.rows import digest_of

DEFAULT_EPOCHS = 10.0
_REFUSALS_ARE_MISSING = (
    "this trace was written by a version that did not record refused gradients: if any was refused, "
    "data and parameters differ from the original run after it"
)
_ANOTHER_MODEL = (
    "the recorded run did not begin from the model that task {} makes with seed {}, but from a file, or with another "
    "seed or task: the order is replayed, but results will not be bit-identical"
)
_ORDER_IS_NOT_TOLD = (
    "worker {} joined with {} slots in line {}: if its gradients arrived in a different order than computed (a trace "
    "does not record that), results are not bit-identical"
)
# A process that runs many simulations reads their data once.
_workload = cache(load_workload)


@dataclass(frozen=True, slots=True)
class Result:
    """What a simulation led to.

    Attributes:
        record: of it.
        summary: its figures, as JSON can hold them.
        training: as it ended.
    """

    record: Record
    summary: dict[str, Any]
    training: Training


class Plan:
    """A simulation that is ready to run.

    Args:
        settings: as given.

    Attributes:
        settings: with what a trace says of the recorded run, where they said nothing.
        gradients: about how many there will be.

    Raises:
        UsageError: the task, its data or the trace can't be used.
    """

    def __init__(self, settings: SimSettings) -> None:
        self._segment = None if settings.trace is None else _followed(settings)
        if self._segment is not None:
            settings = _as_recorded(settings, self._segment)
        self.settings = settings
        # Before anything takes long: the file with the times may be none.
        self._compute_times = parse(settings.compute_seconds)
        torch.set_num_threads(settings.threads)
        self._workload = _workload(settings.workload, _workload_settings(settings))
        self._run = _as_simulated(settings, self._workload, self._segment)
        self.gradients = self._count_gradients()

    def warning(self) -> str:
        """What the user should know beforehand, in a sentence each; empty for nothing."""
        if self._segment is not None:
            return self._differences(self._segment)
        method = self._run.method
        scheduler = SCHEDULERS[method.scheduler](method.staleness_bound)
        return scheduler.idle_warning(self.settings.workers * self.settings.slots)

    def _differences(self, segment: Segment) -> str:
        digest, said = segment.start.model.digest, []
        if digest and digest != digest_of(self._workload.initial(self._run.seed).params):
            said.append(_ANOTHER_MODEL.format(self.settings.task, self._run.seed))
        if not segment.start.refusals:
            said.append(_REFUSALS_ARE_MISSING)
        for line, entry in enumerate(segment.inputs, start=2):
            join = entry.input if isinstance(entry, Recorded) else None
            if isinstance(join, Join) and join.slots > 1:
                said.append(_ORDER_IS_NOT_TOLD.format(join.worker, join.slots, line))
                break
        return "\n".join(said)

    @property
    def _push_samples(self) -> int:
        return self._workload.batch_samples * max(1, self._run.local_steps)

    def _count_gradients(self) -> int:
        by_samples = -(-self._run.stop_after_samples // self._push_samples)
        ends = [end for end in (self._run.stop_after_gradients, by_samples) if end]
        if ends:
            return min(ends)
        assert self._segment is not None
        return len(self._segment.inputs) // 2

    def run(
        self, on_row: Callable[[Row], None] = lambda _: None, on_gradient: Callable[[int], None] = lambda _: None
    ) -> Result:
        """Simulate.

        Args:
            on_row: is told of each evaluation.
            on_gradient: is told the iteration after each applied gradient.

        Raises:
            UsageError: a worker that leaves is not there, or the trace does not fit the settings.
        """
        settings, workload = self.settings, self._workload
        kept = Record(workload.epoch_samples, on_row, on_gradient)
        every = settings.evaluate_every_gradients or max(1, workload.epoch_samples // self._push_samples)
        told = {} if self._segment is None else _told_by(self._segment.start)
        training = Training(self._run, workload, kept, evaluate_every=every, **told)
        self._driver(training).run()
        params = training.machine.state.params
        return Result(kept, record.summary(kept, params, settings.target_accuracy), training)

    def _driver(self, training: Training) -> Simulation | Replay:
        if self._segment is not None:
            return Replay(training, self._segment)
        settings = self.settings
        park = MachinePark(
            self._compute_times,
            slow_factors(settings.slow, settings.workers),
            settings.latency_seconds,
            [limit or float("inf") for limit in settings.bandwidth_bytes_per_second],
            settings.seed,
        )
        return Simulation(
            training,
            park,
            workers=settings.workers,
            slots=settings.slots,
            changes=settings.changes(),
            failure_seconds=settings.failure_timeout_seconds,
        )


def _workload_settings(settings: SimSettings) -> WorkloadSettings:
    return WorkloadSettings(
        task=settings.task,
        data_dir=settings.data_dir,
        batch_size=settings.batch_size,
        weight_decay=settings.weight_decay,
        device=settings.device,
        train_samples=settings.train_samples,
        test_samples=settings.test_samples,
        inner=_inner_settings(settings) if settings.local_steps else None,
    )


def _inner_settings(settings: SimSettings) -> InnerSettings:
    return InnerSettings(settings.inner or "adamw", settings.inner_lr, settings.inner_schedule, settings.inner_warmup)


def _as_simulated(settings: SimSettings, workload: Workload, followed: Segment | None) -> Run:
    run = settings.run()
    if followed is not None:
        recorded = followed.start.training().run()
        return replace(
            run,
            min_workers=recorded.min_workers,
            max_workers=recorded.max_workers,
            waits_for_idle=recorded.waits_for_idle,
        )
    epochs = settings.epochs
    if epochs is None and not (run.stop_after_gradients or run.stop_after_samples):
        epochs = DEFAULT_EPOCHS
    if epochs is None:
        return run
    by_epochs = max(1, round(epochs * workload.epoch_samples))
    return replace(run, stop_after_samples=min(by_epochs, run.stop_after_samples or by_epochs))


def _followed(settings: SimSettings) -> Segment:
    assert settings.trace is not None
    first, *others = read_trace(settings.trace)
    if not first.start.fresh:
        raise UsageError(
            f"the trace {settings.trace} starts with a restored server, so its beginning is not known: follow a trace "
            "from the start of a run, or replay its compute times alone with --compute-seconds trace:FILE"
        )
    if others:
        restarts = "1 server restart, which voids" if len(others) == 1 else f"{len(others)} server restarts, which void"
        raise UsageError(
            f"the trace {settings.trace} contains {restarts} tickets: only a run without restarts can be "
            "followed; --compute-seconds trace:FILE replays its compute times"
        )
    return first


def _told_by(start: Start) -> dict[str, Any]:
    return {"epoch": start.epoch, "clipped_at": start.training().clipped_at}


def _as_recorded(settings: SimSettings, segment: Segment) -> SimSettings:
    told = {name: getattr(settings, name) for name in settings.model_fields_set}
    recorded = segment.start.training().model_dump(include=set(TrainingSettings.model_fields))
    return SimSettings(**(recorded | told))
