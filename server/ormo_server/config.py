"""The server's settings: one frozen class, and what the core makes of it."""

from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field, ValidationInfo, field_validator, model_validator

from ormo_protos.settings import Settings, checked_address
from ormo_server.core.errors import SettingsError
from ormo_server.core.method import PRESETS, Method, Run
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.core.scales import STEP_SCALES
from ormo_server.core.schedule import KINDS, LearningRate
from ormo_server.core.schedulers import SCHEDULERS


def _choices(names: object) -> str:
    assert isinstance(names, dict | tuple)
    return ", ".join(f"`{name}`" for name in names)


class ServerSettings(Settings):
    """Serve the parameters of one model and train them with what workers push."""

    # Where
    listen: str = Field("127.0.0.1:50051", description="HOST:PORT to serve gRPC on; port 0 picks a free one")
    metrics_listen: str = Field(
        "127.0.0.1:9464", description="HOST:PORT to serve Prometheus metrics on; empty for none"
    )
    directory: Path = Field(
        Path("runs/default"), description="where the run's checkpoints are written and restored from"
    )
    model: Path | None = Field(
        None,
        description="safetensors file or checkpoint that a new run starts from; none: the first worker's model",
    )

    # How to train
    method: str = Field("ormo", description=f"the preset to train by: {_choices(PRESETS)}")
    update_rule: str | None = Field(None, description=f"instead of the preset's: {_choices(UPDATE_RULES)}")
    step_scale: str | None = Field(None, description=f"instead of the preset's: {_choices(STEP_SCALES)}")
    scheduler: str | None = Field(None, description=f"instead of the preset's: {_choices(SCHEDULERS)}")
    discard_delay: int | None = Field(None, ge=1, description="do not apply gradients with this delay or more")
    learning_rate: float = Field(
        0.01, gt=0, description="η after the warm-up; K gradients are summed in a bucket, so divide by about K"
    )
    schedule: str = Field("constant", description=f"how η changes with the iteration: {_choices(KINDS)}")
    warmup_gradients: int = Field(0, ge=0, description="gradients over which η rises linearly from near 0")
    milestones: tuple[int, ...] = Field((), description="for `milestones`: iterations at which η is multiplied")
    milestone_factor: float = Field(0.1, gt=0, description="for `milestones`: by what η is multiplied at each")
    cosine_gradients: int = Field(0, ge=0, description="for `cosine`: the iteration at which it reaches its end")
    final_learning_rate: float = Field(0.0, ge=0, description="for `cosine`: η at its end")
    momentum: float = Field(0.9, ge=0, lt=1, description="β, the momentum coefficient")
    weight_decay: float = Field(0.0, ge=0, description="λ, which workers are told to add as λ·w to their gradients")
    bucket_size: int | None = Field(
        None, ge=1, description="K, gradients in a bucket; none: the number of slots of the live workers"
    )
    seed: int = Field(0, ge=0, description="where the workers' data orders come from")

    # How long
    stop_after_gradients: int = Field(0, ge=0, description="end the run after so many applied gradients; 0 for never")
    stop_after_samples: int = Field(0, ge=0, description="end the run after so many samples; 0 for never")
    exit_when_finished: bool = Field(False, description="exit at the end of the run instead of staying up for readers")

    # Who
    min_workers: int = Field(1, ge=1, description="hand out no ticket of a new run before so many workers have joined")
    max_workers: int = Field(64, ge=1, description="refuse further workers")
    slots_per_worker: int = Field(2, ge=1, le=16, description="in-flight places that a worker may have")
    max_readers: int = Field(8, ge=1, description="evaluators and exporters that may pull at the same time")
    failure_timeout: float = Field(
        30.0, ge=0.2, description="seconds without a byte or heartbeat after which a worker is taken for dead"
    )
    ticket_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds that a live worker may keep a ticket; none: without limit where nobody waits, else "
        "20 times the median, at least 60",
    )

    # What is kept
    checkpoint_seconds: float = Field(60.0, gt=0, description="time between checkpoints")
    checkpoints_kept: int = Field(3, ge=1, description="how many of the last checkpoints stay on disk")
    drain_seconds: float = Field(20.0, gt=0, description="how long exchanges under way may take to end on SIGTERM")
    memory_limit: ByteSize | None = Field(
        None, description="refuse a model that needs more memory, such as 8GiB; none: no limit"
    )

    # For people
    reflection: bool = Field(False, description="let clients list the service (for development)")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least important log lines shown"
    )

    @field_validator("listen", "metrics_listen")
    @classmethod
    def _are_addresses(cls, value: str, field: ValidationInfo) -> str:
        empty_for_none = field.field_name == "metrics_listen" and not value
        return value if empty_for_none else checked_address(value, lowest_port=0)

    @model_validator(mode="after")
    def _consistent(self) -> "ServerSettings":
        try:
            self.run()
        except SettingsError as error:
            raise ValueError(str(error)) from error
        return self

    def run(self) -> Run:
        """What the core goes by.

        Raises:
            SettingsError: values that contradict each other.
        """
        return Run(
            learning_rate=LearningRate(
                peak=self.learning_rate,
                kind=self.schedule,
                warmup_gradients=self.warmup_gradients,
                milestones=self.milestones,
                factor=self.milestone_factor,
                cosine_gradients=self.cosine_gradients,
                final=self.final_learning_rate,
            ),
            method=self._method(),
            momentum=self.momentum,
            bucket_size=self.bucket_size,
            min_workers=self.min_workers,
            max_workers=self.max_workers,
            stop_after_gradients=self.stop_after_gradients,
            stop_after_samples=self.stop_after_samples,
            seed=self.seed,
        )

    def _method(self) -> Method:
        if self.method not in PRESETS:
            raise SettingsError(f"method {self.method!r} is not known: choose one of {', '.join(PRESETS)}")
        preset = PRESETS[self.method]
        rule, scale = self.update_rule or preset.rule, self.step_scale or preset.scale
        scheduler, discard = self.scheduler or preset.scheduler, self.discard_delay or preset.discard_delay
        same = (rule, scale, scheduler, discard) == (preset.rule, preset.scale, preset.scheduler, preset.discard_delay)
        name = preset.name if same else f"{rule} × {scale} × {scheduler}"
        return Method(rule, scale, scheduler, discard, name)
