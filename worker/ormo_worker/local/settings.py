"""The settings of `ormo-local`."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from ormo_protos.limits import MAX_SLOTS
from ormo_runtime.settings import LONGEST_SECONDS, Settings, slow_factors


class LocalSettings(Settings):
    """Train on this machine: a server, some workers, an evaluator, and a line that shows how it goes."""

    # Where a pod or an image sets ORMO_DIRECTORY for `ormo-server serve`, this would train that run's model further.
    flags_only: ClassVar[frozenset[str]] = frozenset({"directory"})
    renamed: ClassVar[Mapping[str, str]] = {"evaluate_every": "evaluate_every_seconds"}

    task: str = Field("digits", description="what to train: a built-in task or an import path, as for `ormo-worker`")
    data_dir: Path | None = Field(None, description="where the task's data is")
    workers: int = Field(4, ge=1, le=256, description="worker processes")
    slow: str = Field("", description="make some slower: `1:10x` is one worker ten times slower, `1:10x,2:3x` three")
    batch_size: int = Field(32, ge=1, description="samples in a worker's mini-batch")
    in_flight: int = Field(
        1,
        ge=1,
        le=MAX_SLOTS,
        description="gradients of each worker that may be on their way, as for `ormo-worker`",
    )
    device: str = Field("auto", description="where workers compute: auto, cpu, cuda or cuda:N")
    stop_after_gradients: int = Field(1500, ge=0, description="end the run after this many gradients; 0: no such end")
    stop_after_samples: int = Field(0, ge=0, description="end the run after this many samples; 0: no such end")
    method: str = Field("ormo", description="the server's preset to train by")
    learning_rate: float = Field(0.01, gt=0, description="η; the gradients of all workers are summed in a bucket")
    momentum: float = Field(0.9, ge=0, lt=1, description="β")
    weight_decay: float = Field(0.0, ge=0, description="λ")
    evaluate_every_seconds: float = Field(
        2.0, gt=0, le=LONGEST_SECONDS, description="seconds between evaluations on the test set"
    )
    directory: Path | None = Field(
        None,
        description="where checkpoints and logs go; an earlier run's directory goes on with that run; none: a new one "
        "under `runs/`, named by the time",
    )
    metrics_listen: str = Field("127.0.0.1:0", description="host and port of the server's metrics; port 0: a free one")
    server_flags: str = Field("", description="more flags for `ormo-server serve`, in one string")
    worker_flags: str = Field("", description="more flags for `ormo-worker run`, in one string")

    @model_validator(mode="after")
    def _slow_workers_exist(self) -> "LocalSettings":
        try:
            self.slow_factors()
        except ValueError as error:
            raise ValueError(f"--slow: {error}") from None
        return self

    def slow_factors(self) -> list[float]:
        """How much slower each worker is made; 1 for not at all. The slow ones come last."""
        return slow_factors(self.slow, self.workers)
