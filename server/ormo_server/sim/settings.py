"""The settings of `ormo-sim`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator
from typing_extensions import override

from ormo_protos.limits import MAX_SLOTS
from ormo_runtime.settings import (
    InnerLearningRate,
    InnerOptimizer,
    InnerSchedule,
    InnerWarmup,
    UsageError,
    flag_of,
    slow_factors,
)
from ormo_runtime.tracking import TRACK
from ormo_runtime.workload import TASKS_OF_THE_WORKER
from ormo_server.settings import TrainingSettings
from ormo_server.sim.machines import FORMS, Change, changes, parse

# What a trace decides, where one is followed.
TOLD_BY_TRACE = (
    "workers",
    "slow",
    "slots",
    "compute_seconds",
    "latency_seconds",
    "bandwidth_bytes_per_second",
    "join",
    "leave",
    "crash",
)


class SimSettings(TrainingSettings):
    """Train in virtual time, with simulated workers on this machine. Other commands: plot, reproduce."""

    # For `ormo-server serve` the same variables are the run's checkpoints, and a trace to write and not to follow.
    flags_only: ClassVar[frozenset[str]] = frozenset({"directory", "trace"})
    renamed: ClassVar[Mapping[str, str]] = {
        "compute_time": "compute_seconds",
        "latency": "latency_seconds",
        "bandwidth": "bandwidth_bytes_per_second",
        "failure_timeout": "failure_timeout_seconds",
        "evaluate_every": "evaluate_every_gradients",
    }

    task: str = Field(
        "digits",
        title="Task and device",
        description="model and data: a built-in task or an import path, as for `ormo-worker`",
    )
    data_dir: Path | None = Field(None, description="folder with the task's data, for tasks that need one")
    batch_size: int = Field(32, ge=1, description="samples in a worker's mini-batch")
    device: str = Field("cpu", description="where gradients are computed: auto, cpu, cuda or cuda:N")
    threads: int = Field(
        1, ge=1, description="threads on the CPU; the same seed gives the same bits on one thread only"
    )
    workload: str = Field(TASKS_OF_THE_WORKER, description="import path of what computes the gradients")

    inner: InnerOptimizer | None = Field(
        None,
        title="Local steps of the workers",
        description="their optimizer, as for `ormo-worker`; none: `adamw` with --local-steps",
    )
    inner_lr: InnerLearningRate = 3e-4
    inner_schedule: InnerSchedule = "constant"
    inner_warmup: InnerWarmup = 0.05

    workers: int = Field(16, title="Simulated machines", ge=1, le=10_000, description="simulated workers at the start")
    slow: str = Field("", description="make some slower: `4:10x` is four workers ten times slower, `1:10x,2:3x` three")
    slots: int = Field(1, ge=1, le=MAX_SLOTS, description="in-flight places of each worker")
    compute_seconds: str = Field(
        "normal:1,0.1",
        description=f"virtual seconds for a gradient: {FORMS}; FILE is a server trace or a CSV with "
        "columns `worker,seconds`",
    )
    latency_seconds: tuple[float, ...] = Field(
        (0.0,),
        description="virtual seconds that a message takes one way; several values are assigned to workers round-robin",
    )
    bandwidth_bytes_per_second: tuple[float, ...] = Field(
        (0.0,),
        description="bytes per virtual second of a worker's line, each way; 0: no limit; several as for latency",
    )
    join: tuple[str, ...] = Field((), description="SECONDS:NUMBER, this many more workers join at that time")
    leave: tuple[str, ...] = Field((), description="SECONDS:WORKER, this worker (from 0) leaves at that time")
    crash: tuple[str, ...] = Field((), description="SECONDS:WORKER, this worker falls silent at that time")
    failure_timeout_seconds: float = Field(
        30.0, gt=0, description="virtual seconds after which a silent worker counts as dead"
    )
    trace: Path | None = Field(
        None, description="follow a server's trace input by input, instead of simulating machines"
    )

    epochs: float | None = Field(
        None,
        title="Length, evaluation and output",
        gt=0,
        description="end after this many passes over the training data; none: 10 if no other end is set",
    )
    evaluate_every_gradients: int = Field(
        0, ge=0, description="gradients between evaluations; 0: about one pass over the data"
    )
    train_samples: int = Field(
        2000, ge=0, description="how many training samples an evaluation looks at, spread evenly; 0: all"
    )
    test_samples: int = Field(0, ge=0, description="how many test samples it looks at, spread evenly; 0: all")
    target_accuracy: tuple[float, ...] = Field(
        (0.5, 0.8, 0.9, 0.95), description="test accuracies to report the virtual time to reach"
    )
    directory: Path | None = Field(
        None, description="where results go; none: a new one under `runs/`, named by the time"
    )
    plots: bool = Field(True, description="draw accuracy and loss against epochs and time, and delays")
    track: str = Field("", description=TRACK)

    @property
    @override
    def workers_allowed(self) -> tuple[int, int]:
        return self.workers, 100_000

    @field_validator("latency_seconds", "bandwidth_bytes_per_second")
    @classmethod
    def _are_not_negative(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) < 0:
            raise ValueError("expected one number or more, each at least 0")
        return value

    @model_validator(mode="after")
    def _machines_make_sense(self) -> Self:
        try:
            slow_factors(self.slow, self.workers)
            self._check_workers_named_in_changes()
            if not self.compute_seconds.startswith("trace:"):
                parse(self.compute_seconds)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _local_steps_are_wanted(self) -> Self:
        if self.inner is not None and not self.local_steps and self.trace is None:
            raise ValueError("--inner is for local steps: say how many with --local-steps")
        return self

    @model_validator(mode="after")
    def _trace_stands_alone(self) -> Self:
        contradicted = [name for name in TOLD_BY_TRACE if name in self.model_fields_set]
        if self.trace is not None and contradicted:
            flag = flag_of(contradicted[0])
            raise ValueError(f"--trace and {flag} can't be combined: drop {flag}, or use --compute-seconds trace:FILE")
        return self

    def recorded(self) -> dict[str, Any]:
        """As JSON holds them, for summaries: with the delay threshold in force."""
        return self.model_dump(mode="json", exclude={"directory", "track"}) | {
            "delay_threshold": self.run().method.delay_threshold
        }

    def changes(self) -> list[Change]:
        """Who joins, leaves and crashes when."""
        return changes("join", self.join) + changes("leave", self.leave) + changes("crash", self.crash)

    def _check_workers_named_in_changes(self) -> None:
        latest = self.workers - 1 + sum(change.number for change in self.changes() if change.kind == "join")
        for change in self.changes():
            if change.kind != "join" and change.number > latest:
                raise UsageError(
                    f"{change.kind} {change.seconds:g}:{change.number}: no worker {change.number} exists: workers "
                    f"are numbered from 0 to {latest}"
                )
