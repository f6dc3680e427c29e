"""The settings of `ormo-worker run` and `ormo-worker evaluate`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from ormo_protos.limits import MAX_SLOTS, WORKER_ID, WORKER_ID_IN_WORDS
from ormo_runtime.settings import (
    LONGEST_SECONDS,
    InnerLearningRate,
    InnerOptimizer,
    InnerSchedule,
    InnerWarmup,
    checked_address,
)
from ormo_runtime.tls import ClientSettings
from ormo_runtime.tracking import TRACK

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


class _Common(ClientSettings):
    """What both commands need."""

    renamed: ClassVar[Mapping[str, str]] = {
        "connect_timeout": "connect_timeout_seconds",
        "failure_timeout": "failure_timeout_seconds",
        "give_up_after": "give_up_after_seconds",
    }

    server: str = Field("127.0.0.1:50051", title="Server and task", description="host and port of the parameter server")
    task: str = Field(
        "digits",
        description="model and data: `digits`, `code-lm`, `cifar10`, `image-folder`, `image-folder-cnn`, or the import "
        "path of your own, as in `package.module:MyTask` or `file.py:MyTask`",
    )
    data_dir: Path | None = Field(None, description="folder with the task's data, for tasks that need one")

    device: str = Field(
        "auto",
        title="Device and memory",
        description="`cpu`, `cuda`, `cuda:1` and so on; `auto`: the first GPU, if there is one",
    )
    threads: int = Field(1, ge=1, description="threads that PyTorch computes with on the CPU")
    keep_freed_memory: bool = Field(
        True,
        description="keep freed memory in the process for the next message, instead of returning large blocks to the "
        "system and faulting them in again (glibc only); the process stays as large as its peak",
    )

    connect_timeout_seconds: float = Field(
        60.0, title="Timeouts", gt=0, le=LONGEST_SECONDS, description="seconds to wait for a first contact"
    )
    failure_timeout_seconds: float = Field(
        30.0, gt=0, le=1e6, description="seconds of silence after which the connection to the server is made again"
    )
    give_up_after_seconds: float | None = Field(
        None,
        gt=0,
        le=LONGEST_SECONDS,
        description="seconds without contact, once there was some, after which to fail; none: keep trying",
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", title="Logs and metrics", description="least important log lines shown"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="log lines for people, or for programs: one JSON object each"
    )
    metrics_listen: str = Field(
        "", description="host and port to serve this process's own metrics on, for Prometheus; empty for none"
    )

    @field_validator("server")
    @classmethod
    def _is_address(cls, value: str) -> str:
        return checked_address(value, lowest_port=1)

    @field_validator("metrics_listen")
    @classmethod
    def _is_address_or_empty(cls, value: str) -> str:
        return checked_address(value, lowest_port=0) if value else value

    @field_validator("device")
    @classmethod
    def _is_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError("expected auto, cpu, cuda, or cuda:N with N the number of a GPU, from 0 up")
        return value


class RunSettings(_Common):
    """Train a task as one of a parameter server's workers."""

    # Not `stop_after_gradients`, for a pod may have that in its environment for the server: it is the end of the run.
    renamed: ClassVar[Mapping[str, str]] = {**_Common.renamed, "stop_after": "leave_after_gradients"}

    batch_size: int = Field(32, title="Mini-batches", ge=1, description="samples in each mini-batch")
    loader_processes: int = Field(
        0, ge=0, description="processes that read samples ahead, for data sets that are not kept in memory"
    )
    amp: Literal["off", "bfloat16", "float16"] = Field(
        "off", description="automatic mixed precision: the dtype to compute in where PyTorch thinks it safe"
    )
    slow_factor: float = Field(
        1.0, ge=1, le=1e6, description="take this many times as long for each gradient, to imitate a slower machine"
    )

    inner: InnerOptimizer | None = Field(
        None,
        title="Local steps, for servers with --local-steps",
        description="optimizer of the local steps: `adamw`, `muon` (of matrices, with `adamw` for all else), `sgd`; "
        "none: push the gradient of each step",
    )
    inner_lr: InnerLearningRate = 3e-4
    inner_schedule: InnerSchedule = "constant"
    inner_warmup: InnerWarmup = 0.05

    worker_id: str | None = Field(
        None,
        title="Name and transfer",
        pattern=f"^{WORKER_ID}$",
        description=f"name of this worker: {WORKER_ID_IN_WORDS}; none: generated from host name, "
        "process id and a random part",
    )
    wire_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "float32",
        description="how parameters and gradients travel; `bfloat16` halves the bytes; `int8`, with `--inner`: sums of "
        "steps as int8 and parameters as bfloat16, 0.38 of the bytes",
    )
    in_flight: int = Field(
        1,
        ge=1,
        le=MAX_SLOTS,
        description="gradients that may be under way: with `2` the next one is computed while the last one travels; "
        "the server allows as many as its `--slots-per-worker`",
    )

    seed: int = Field(
        0,
        title="Seed and end",
        ge=0,
        description="where the initial parameters come from, if it is this worker's model that is trained",
    )
    leave_after_gradients: int = Field(
        0, ge=0, description="leave after this many gradients of this worker; 0: at the run's end"
    )


class EvaluateSettings(_Common):
    """Evaluate a run's parameters on its task's test set while it goes on."""

    batch_size: int = Field(256, title="Evaluation", ge=1, description="samples in each batch of the test set")
    every_seconds: float = Field(
        10.0, gt=0, le=LONGEST_SECONDS, description="seconds between evaluations; skipped if nothing is newer"
    )
    once: bool = Field(False, description="evaluate once and exit")
    track: str = Field("", description=TRACK)
