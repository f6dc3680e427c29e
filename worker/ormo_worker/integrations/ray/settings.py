"""The settings of `ormo-ray` and `ormo-ray scale`."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from ormo_runtime.settings import Settings, checked_address
from ormo_runtime.tls import ClientSettings

# What a worker's id may be, with room for its number.
_NAME_PATTERN = r"^[A-Za-z0-9._-]{1,100}$"
_ADDRESS = "`auto`: the cluster that this node is part of; HOST:PORT of its head"
_NAME = "name of the run among those of the cluster"


def _checked_cluster(value: str) -> str:
    if value.startswith("ray://"):
        raise ValueError(
            "a server of Ray Client was given, which can't run what this program needs to run on a node: expected auto "
            "or HOST:PORT, on a node of the cluster; from elsewhere use `ray job submit -- ormo-ray ...`"
        )
    return value if value in ("auto", "local") else checked_address(value, lowest_port=1)


class RaySettings(ClientSettings):
    """Train on a Ray cluster: workers as actors, the server as one or outside, until the run is over."""

    # Where a pod sets the first two, and the addresses of Services, they are for other programs.
    flags_only: ClassVar[frozenset[str]] = frozenset({"directory", "server_port"})

    address: str = Field(
        "auto",
        title="Cluster",
        description=f"{_ADDRESS}; `local`: a cluster on this machine alone, for as long as the run",
    )
    name: str = Field("ormo", pattern=_NAME_PATTERN, description=f"{_NAME}; workers are called NAME-0, NAME-1, ...")
    working_dir: Path | None = Field(
        None, description="folder that Ray copies to each worker, for a task of your own, and starts it in; none: none"
    )

    task: str = Field(
        "digits", title="Task", description="what to train: a built-in task or an import path, as for `ormo-worker`"
    )
    data_dir: Path | None = Field(None, description="where the task's data is, on each node")

    workers: int = Field(2, title="Workers", ge=1, le=4096, description="workers to begin with")
    gpus_per_worker: float = Field(
        0, ge=0, le=64, description="GPUs that Ray keeps for each; 0: it computes on the CPU"
    )
    cpus_per_worker: float = Field(
        1, ge=0, le=4096, description="CPUs that Ray keeps for each, and threads that it computes with on the CPU"
    )
    restarts_per_worker: int = Field(
        10,
        ge=0,
        le=10**6,
        description="how often each is started again after it failed; what its node takes with it does not count",
    )
    worker_flags: str = Field("", description="more flags for `ormo-worker run`, in one string")

    server: str | None = Field(
        None,
        title="Server",
        description="host and port of one that runs already; none: one is started on this node, and stopped at the end",
    )
    server_port: int = Field(
        50051, ge=1, le=65535, description="port of the one that is started, at the address that Ray has of this node"
    )
    directory: Path | None = Field(
        None,
        description="where that one keeps checkpoints and the journal, on this node; a directory with a run continues "
        "that run; none: a new one under `runs/`, named by the time",
    )
    server_flags: str = Field("", description="more flags for `ormo-server serve`, in one string")

    @field_validator("address")
    @classmethod
    def _is_cluster(cls, value: str) -> str:
        return _checked_cluster(value)

    @field_validator("server")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        return None if value is None else checked_address(value, lowest_port=1)

    @model_validator(mode="after")
    def _one_server(self) -> Self:
        if self.server is not None and (self.directory is not None or self.server_flags):
            raise ValueError(
                "--directory and --server-flags are for a server that is started here, and --server names one that "
                "runs already: give one or the other"
            )
        return self

    def directory_of_server(self) -> Path:
        """Where the server that is started here shall write; absolute, for it is started elsewhere."""
        return (self.directory or Path(time.strftime("runs/ray-%Y%m%d-%H%M%S"))).absolute()

    def server_words(self, address: str, directory: Path) -> list[str]:
        """The command line of the server; with a journal, for it is meant to come back after a crash."""
        flags = {
            "--listen": address,
            "--metrics-listen": "127.0.0.1:0",  # several runs may have their servers here
            "--directory": directory,
            "--max-workers": max(64, 2 * self.workers),
        }
        return ["serve", *_flags(flags), "--journal", *shlex.split(self.server_flags)]

    def worker_words(self, server: str) -> list[str]:
        """The command line of each worker, but for its name."""
        flags = {
            "--server": server,
            "--task": self.task,
            "--data-dir": self.data_dir,
            "--threads": max(1, int(self.cpus_per_worker)),
            # Ray hides the GPUs that are not this worker's, but not from those that have none of their own.
            "--device": "cuda" if self.gpus_per_worker else "cpu",
            "--tls-ca": self.tls_ca,
            "--tls-cert": self.tls_cert,
            "--tls-key": self.tls_key,
            "--tls-server-name": self.tls_server_name,
            "--token-file": self.token_file,
        }
        return ["run", *_flags(flags), *shlex.split(self.worker_flags)]


def _flags(values: Mapping[str, object]) -> list[str]:
    return [word for flag, value in values.items() if value not in (None, "") for word in (flag, str(value))]


class ScaleSettings(Settings):
    """Change how many workers a run of `ormo-ray` has, while it trains."""

    # Of the run that begins: what is typed here is for the one that is there.
    flags_only: ClassVar[frozenset[str]] = frozenset({"workers"})

    workers: int = Field(
        title="What is changed", ge=1, le=4096, description="workers from now on; those with the highest numbers leave"
    )
    name: str = Field("ormo", pattern=_NAME_PATTERN, description=_NAME)
    address: str = Field("auto", title="Cluster", description=_ADDRESS)

    @field_validator("address")
    @classmethod
    def _is_cluster(cls, value: str) -> str:
        return _checked_cluster(value)
