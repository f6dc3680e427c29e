"""The settings of a server, and of how a run trains: the same for a server and for a simulation."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import ByteSize, Field, ValidationInfo, field_validator, model_validator
from typing_extensions import override

from ormo_protos.limits import MAX_SLOTS
from ormo_runtime.channels import is_loopback
from ormo_runtime.settings import LONGEST_SECONDS, MOST, Settings, checked_address
from ormo_server.addresses import check_address, is_address, local_path
from ormo_server.core.errors import SettingsError
from ormo_server.core.method import (
    BUCKETS,
    LEAST_DELAY_THRESHOLD,
    LEAST_EPSILON,
    MOST_DELAY_THRESHOLD,
    PRESETS,
    Method,
    Run,
)
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.core.schedulers import SCHEDULERS
from ormo_server.core.step_size import KINDS, STEP_SCALES, LearningRate


def _choices(names: object) -> str:
    assert isinstance(names, dict | tuple)
    return ", ".join(f"`{name}`" for name in names)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


# Tried on pseudo-gradients of AdamW, at the momentum of 0.9.
OUTER_LEARNING_RATE = 0.4


def _usual_learning_rate(given: Mapping[str, Any]) -> float:
    # A rule that divides by second moments steps by as much whatever it is given: sums of steps or gradients.
    preset = PRESETS.get(given.get("method", ""), Method())
    rule = UPDATE_RULES.get(given.get("update_rule") or preset.rule)
    by_second_moments = rule is not None and "second_moment" in rule.vectors_of_run
    return OUTER_LEARNING_RATE if given.get("local_steps") and not by_second_moments else 0.01


class TrainingSettings(Settings):
    """How to train, and for how long."""

    method: str = Field("ormo", title="How to train", description=f"the preset to train by: {_choices(PRESETS)}")
    update_rule: str | None = Field(None, description=f"instead of the preset's: {_choices(UPDATE_RULES)}")
    step_scale: str | None = Field(None, description=f"instead of the preset's: {_choices(STEP_SCALES)}")
    scheduler: str | None = Field(None, description=f"instead of the preset's: {_choices(SCHEDULERS)}")
    bucket: str | None = Field(
        None,
        description=f"instead of the preset's: {_choices(BUCKETS)}; what a bucket's gradients count as: the mean does "
        "not grow with the number of workers, and is what counts with `--local-steps`, unless the rule averages itself",
    )
    staleness_bound: int | None = Field(
        None, ge=0, le=MOST, description="for `bounded-staleness`: the largest delay that an applied gradient may have"
    )
    delay_threshold: float | None = Field(
        None,
        ge=LEAST_DELAY_THRESHOLD,
        le=MOST_DELAY_THRESHOLD,
        description="for the step scale `delay-adaptive` and the update rule `fadas`: the delay above which steps get "
        "smaller, in K; none: 1 for `asgd-da` and `fadas`, else 2",
    )
    discard_delay: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="do not apply gradients with this delay or more; none: apply all, but `ringmaster` none from 2K on",
    )
    delay_compensation: float = Field(
        0.04, ge=0, le=1e6, description="λ of the update rule `dc`, in the units of an inverse gradient"
    )
    second_momentum: float = Field(0.99, ge=0, lt=1, description="β₂ of the update rule `fadas`, whose β₁ is β")
    epsilon: float = Field(1e-8, ge=LEAST_EPSILON, le=1, description="ε of the update rule `fadas`")
    initial_second_moment: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="where the largest second moment of the update rule `fadas` begins; above 0 its first steps are "
        "smaller",
    )

    local_steps: int = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="H: workers make up to so many steps with an optimizer of their own and push the sum; 0: they push "
        "the gradient of each step",
    )
    local_steps_by_speed: bool = Field(
        False,
        description="let slower workers make fewer local steps, an eighth at least, so that all push about as often",
    )

    # After what it depends on.
    learning_rate: float = Field(
        default_factory=_usual_learning_rate,
        title="Step sizes",
        gt=0,
        description="η after the warm-up; where a bucket is a sum, divide by about K; with `--local-steps` that of the "
        f"sums of steps, and {OUTER_LEARNING_RATE:g} unless set (`fadas`: 0.01)",
    )
    schedule: str = Field("constant", description=f"how η changes with the iteration: {_choices(KINDS)}")
    warmup_gradients: int = Field(0, ge=0, le=MOST, description="gradients over which η rises linearly from near 0")
    milestones: tuple[int, ...] = Field((), description="for `milestones`: iterations at which η is multiplied")
    milestone_factor: float = Field(0.1, gt=0, description="for `milestones`: by what η is multiplied at each")
    cosine_gradients: int = Field(
        0, ge=0, le=MOST, description="for `cosine`: the iteration at which it reaches its end"
    )
    final_learning_rate: float = Field(0.0, ge=0, description="for `cosine`: η at its end")
    momentum: float = Field(0.9, ge=0, lt=1, description="β, the momentum coefficient")
    weight_decay: float = Field(
        0.0, ge=0, le=1e6, description="λ; workers add λ·w to their gradients; with `--local-steps` theirs to set"
    )
    bucket_size: int | None = Field(
        None, ge=1, le=2**31 - 1, description="K, gradients in a bucket; none: the number of slots of the live workers"
    )

    seed: int = Field(0, title="Seed and end of the run", ge=0, description="where the workers' data orders come from")
    stop_after_gradients: int = Field(
        0, ge=0, le=MOST, description="end the run after this many applied gradients; 0: never"
    )
    stop_after_samples: int = Field(0, ge=0, le=MOST, description="end the run after this many samples; 0: never")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            self.run()
        except SettingsError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def workers_allowed(self) -> tuple[int, int]:
        """How many workers a new run waits for, and how many it takes."""
        return 1, 1

    def run(self) -> Run:
        """What the core goes by.

        Raises:
            SettingsError: values that contradict each other.
        """
        if self.local_steps and self.weight_decay:
            raise SettingsError(
                f"--weight-decay {self.weight_decay:g} with --local-steps: weights decay in the workers' own "
                "optimizers, so set it there, and leave --weight-decay at 0"
            )
        min_workers, max_workers = self.workers_allowed
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
            delay_compensation=self.delay_compensation,
            second_momentum=self.second_momentum,
            epsilon=self.epsilon,
            initial_second_moment=self.initial_second_moment,
            bucket_size=self.bucket_size,
            min_workers=min_workers,
            max_workers=max_workers,
            stop_after_gradients=self.stop_after_gradients,
            stop_after_samples=self.stop_after_samples,
            seed=self.seed,
            local_steps=self.local_steps,
            local_steps_by_speed=self.local_steps_by_speed,
        )

    def described(self) -> dict[str, str]:
        """All of it by name, with the method's choices as they are in force; empty for what is not set."""
        given = {name: getattr(self, name) for name in TrainingSettings.model_fields}
        method = self._method()
        choices = {"method": method.name, "update_rule": method.rule, "step_scale": method.scale}
        choices["delay_threshold"], choices["bucket"] = f"{method.delay_threshold:g}", method.bucket
        return {name: _text(value) for name, value in (given | choices | {"scheduler": method.scheduler}).items()}

    def _method(self) -> Method:
        if self.method not in PRESETS:
            raise SettingsError(f"method {self.method!r} is not known: choose one of {', '.join(PRESETS)}")
        preset = PRESETS[self.method]
        chosen: dict[str, Any] = {
            "rule": self.update_rule,
            "scale": self.step_scale,
            "delay_threshold": self.delay_threshold,
            "scheduler": self.scheduler,
            "discard_delay": self.discard_delay,
            "staleness_bound": self.staleness_bound,
            "bucket": self.bucket,
        }
        chosen = {choice: value for choice, value in chosen.items() if value is not None}
        rule = UPDATE_RULES.get(chosen.get("rule", preset.rule))
        if self.local_steps and rule is not None and rule.takes_mean_of_bucket:
            chosen.setdefault("bucket", "mean")
        method = replace(preset, **chosen)
        return method if method == preset else replace(method, name=method.spelt_out())


class ServerSettings(TrainingSettings):
    """Serve the parameters of one model and train them with what workers push."""

    # In the environment of a container that restarts it would begin anew each time.
    flags_only: ClassVar[frozenset[str]] = frozenset({"fresh"})
    renamed: ClassVar[Mapping[str, str]] = {
        "failure_timeout": "failure_timeout_seconds",
        "ticket_timeout": "ticket_timeout_seconds",
        "memory_limit": "memory_limit_bytes",
        "receive_window": "receive_window_bytes",
    }

    listen: str = Field(
        "127.0.0.1:50051",
        title="Addresses and directory",
        description="HOST:PORT to serve gRPC on; port 0 picks a free one",
    )
    metrics_listen: str = Field(
        "127.0.0.1:9464", description="HOST:PORT to serve Prometheus metrics on; empty for none"
    )
    directory: Path = Field(
        Path("runs/default"), description="where the run's checkpoints are written and restored from"
    )

    fresh: bool = Field(
        False,
        title="How a run begins",
        description="begin a new run: what an earlier one left in the directory is moved into `before-DATE-TIME` there",
    )
    model: str | None = Field(
        None,
        description="what a new run starts from, as a path or the address of a bucket: a file of safetensors or of "
        "tensors that PyTorch saved, a Hugging Face folder, a checkpoint; none: the first worker's model",
    )

    tls_cert: Path | None = Field(
        None,
        title="Who may call",
        description="PEM file with the server's certificate, and those up to its authority; none: no TLS",
    )
    tls_key: Path | None = Field(None, description="PEM file with the key of --tls-cert")
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file with the authorities that a client's certificate must be signed by; none: clients need "
        "no certificate",
    )
    access: Path | None = Field(
        None,
        description="TOML file that lists who may call and with which role, by certificate or bearer token; none: "
        "anyone who can reach the port",
    )
    insecure: bool = Field(
        False, description="serve other machines without TLS, or without --access: if nobody else can reach the port"
    )
    max_bytes_in_flight: ByteSize | None = Field(
        None,
        gt=0,
        description="bytes of tensors that one caller (one name of --access, or else one host) may have under way at a "
        "time, such as 2GiB; none: as many as its streams",
    )

    min_workers: int = Field(
        1,
        title="Workers and readers",
        ge=1,
        description="hand out no ticket of a new run before this many workers have joined",
    )
    max_workers: int = Field(64, ge=1, description="refuse more workers than this")
    slots_per_worker: int = Field(2, ge=1, le=MAX_SLOTS, description="in-flight places that a worker may have")
    max_readers: int = Field(8, ge=1, description="evaluators and exporters that may pull at the same time")
    failure_timeout_seconds: float = Field(
        30.0, ge=0.2, le=1e6, description="seconds without a byte or heartbeat after which a worker counts as dead"
    )
    ticket_timeout_seconds: float | None = Field(
        None,
        gt=0,
        le=LONGEST_SECONDS,
        description="seconds that a live worker may keep a ticket; none: without limit where nobody waits, else "
        "20 times the median, at least 60, and 600 before the first push",
    )

    max_gradient_norm: float | None = Field(
        None,
        title="Which gradients are accepted",
        gt=0,
        description="largest Euclidean norm of a gradient; none: any that leaves the model finite",
    )
    over_norm: Literal["clip", "refuse"] = Field(
        "clip", description="what becomes of a gradient of a larger norm: it is scaled down to it, or not applied"
    )
    max_refused_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="send a worker's process away once more than this share of its gradients was refused, as not "
        "finite or too large (smoothed over some 32 gradients); none: never",
    )

    checkpoint_seconds: float = Field(
        60.0, title="Checkpoints and journal", gt=0, le=LONGEST_SECONDS, description="time between checkpoints"
    )
    checkpoints_kept: int = Field(3, ge=1, description="how many of the last checkpoints stay on disk")
    mirror: str | None = Field(
        None,
        description="folder elsewhere, or bucket such as `s3://bucket/folder`, that each checkpoint is copied to, and "
        "that a start with an empty directory restores from; none: no copies",
    )
    journal: bool = Field(
        False, description="keep every input since the last checkpoint on disk, so that a crash loses nothing"
    )
    journal_fsync: Literal["always", "interval", "off"] = Field(
        "always",
        description="when the journal is made safe from a power cut: before each answer, once a second, or when the "
        "system sees fit; a crash of the server alone loses nothing in any case",
    )
    journal_max_bytes: ByteSize = Field(
        ByteSize(4 << 30),
        gt=0,
        description="write a checkpoint, and begin a new journal, when this one has grown to this, such as 512MiB: "
        "bounds the time of a restart; gradients wait while it is twice as large",
    )

    exit_when_finished: bool = Field(
        False, title="How the server stops", description="exit at the end of the run instead of staying up for readers"
    )
    drain_seconds: float = Field(
        20.0, gt=0, le=LONGEST_SECONDS, description="how long exchanges under way may take to end on SIGTERM"
    )

    threads: int = Field(
        1,
        title="Speed and memory",
        ge=1,
        le=1024,
        description="threads of PyTorch for an update; with more than 1, each of the server's threads starts as many "
        "of its own, and updates get slower unless the processor has nothing else to do",
    )
    receive_window_bytes: ByteSize = Field(
        ByteSize(4 << 20),
        ge=1 << 16,
        le=1 << 30,
        description="bytes of a gradient that may be under way to the server, or wait there to be read, for each slot, "
        "such as 16MiB: below bandwidth times round-trip time it slows a link down, above it only costs memory",
    )
    keep_freed_memory: bool = Field(
        True,
        description="keep freed memory in the process for the next message, instead of returning large blocks to the "
        "system and faulting them in again (glibc only); the process stays as large as its peak",
    )
    memory_limit_bytes: ByteSize | None = Field(
        None, description="refuse a model that needs more memory, such as 8GiB; none: no limit"
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", title="Logs, metrics and traces", description="least important log lines shown"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="log lines for people, or for programs: one JSON object each"
    )
    worker_series: int = Field(
        100,
        ge=0,
        description="how many workers have metrics of their own, those that joined first; others are summed up",
    )
    trace: Path | None = Field(
        None,
        description="file that every input of the run is appended to, for `ormo-sim` and pandas; none: no trace",
    )
    reflection: bool = Field(
        False, description="let clients list the service (for development: each client holds a thread)"
    )

    @property
    @override
    def workers_allowed(self) -> tuple[int, int]:
        return self.min_workers, self.max_workers

    def recorded(self) -> dict[str, Any]:
        """As JSON holds them, with the rules in force, for files that are read later: see `TracedSettings`."""
        run = self.run()
        unsaid = {name for name in ("local_steps", "local_steps_by_speed") if not getattr(self, name)} | {"mirror"}
        if run.method.rule != "fadas":
            unsaid |= {"second_momentum", "epsilon", "initial_second_moment"}
        # Without what older programs do not know, where there is none of it.
        given = self.model_dump(mode="json", exclude=unsaid) | {"waits_for_idle": run.waits_for_idle}
        return given | {"bucket": run.method.bucket} if run.local_steps else given

    @model_validator(mode="after")
    def _nobody_else_gets_in(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together: give both, or neither")
        if self.tls_cert is None and (self.tls_client_ca or self.access):
            raise ValueError("--tls-client-ca and --access need TLS: give --tls-cert and --tls-key, too")
        if self.tls_client_ca and not self.access:
            raise ValueError(
                "--tls-client-ca says whose certificates are trusted, but not who may do what: name the roles in a "
                "file for --access"
            )
        if not (self.access or self.insecure or is_loopback(self.listen.rpartition(":")[0])):
            raise ValueError(
                f"--listen is {self.listen!r}: anyone who can reach it could change or copy the model. Give "
                "--tls-cert, --tls-key and --access; or --insecure, if nobody else can reach it; or listen on 127.0.0.1"
            )
        return self

    @field_validator("mirror", "model", mode="before")
    @classmethod
    def _is_place(cls, value: str | Path | None) -> str | None:
        if value is not None:
            check_address(str(value))
        return None if value is None else str(value)

    @model_validator(mode="after")
    def _mirror_is_elsewhere(self) -> Self:
        if self.mirror and not is_address(self.mirror):
            folder, directory = local_path(self.mirror).resolve(), self.directory.resolve()
            if folder == directory or directory in folder.parents or folder in directory.parents:
                raise ValueError(
                    f"--mirror {self.mirror} and --directory {self.directory} lie in each other: expected a folder "
                    "elsewhere, best on another disk"
                )
        return self

    @field_validator("listen", "metrics_listen")
    @classmethod
    def _are_addresses(cls, value: str, field: ValidationInfo) -> str:
        empty_for_none = field.field_name == "metrics_listen" and not value
        return value if empty_for_none else checked_address(value, lowest_port=0)
