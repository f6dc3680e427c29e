"""The processes of one local run: how many and which, started in order, watched, stopped in order."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, ClassVar, Literal

from pydantic import Field, model_validator

from ormo_protos.limits import MAX_SLOTS
from ormo_runtime.logs import announced, printable
from ormo_runtime.settings import LONGEST_SECONDS, Settings, slow_factors, variables_of
from ormo_runtime.tracking import TRACK
from ormo_worker.local.exported import metrics_page

_STOP_SECONDS = 30.0
_KIB = 1024


class LocalSettings(Settings):
    """Train on this machine: a server, some workers, an evaluator, and a line that shows how it goes."""

    # Where a pod or an image sets ORMO_DIRECTORY for `ormo-server serve`, this would train that run's model further.
    flags_only: ClassVar[frozenset[str]] = frozenset({"directory"})
    renamed: ClassVar[Mapping[str, str]] = {"evaluate_every": "evaluate_every_seconds"}

    task: str = Field(
        "digits", title="Task", description="what to train: a built-in task or an import path, as for `ormo-worker`"
    )
    data_dir: Path | None = Field(None, description="where the task's data is")

    workers: int = Field(4, title="Workers", ge=1, le=256, description="worker processes")
    slow: str = Field("", description="make some slower: `1:10x` is one worker ten times slower, `1:10x,2:3x` three")
    batch_size: int = Field(32, ge=1, description="samples in a worker's mini-batch")
    in_flight: int = Field(
        1,
        ge=1,
        le=MAX_SLOTS,
        description="gradients of each worker that may be on their way, as for `ormo-worker`",
    )
    device: str = Field("auto", description="where workers compute: auto, cpu, cuda or cuda:N")

    method: str | None = Field(
        None,
        title="How to train",
        description="the server's preset to train by; none: `ormo`, with --local-steps `local-ormo`",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="η; the gradients of all workers are summed in a bucket; none: what `ormo-server` takes by itself",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="β")
    weight_decay: float = Field(0.0, ge=0, description="λ")

    inner: Literal["adamw", "muon", "sgd"] | None = Field(
        None,
        title="Local steps",
        description="optimizer of the workers' local steps, as for `ormo-worker`; none: `adamw` with --local-steps",
    )
    inner_lr: float = Field(3e-4, gt=0, le=1e6, description="its learning rate")
    local_steps: int = Field(
        0, ge=0, le=2**31 - 1, description="local steps in each push; 0: workers push the gradient of each step"
    )
    local_steps_by_speed: bool = Field(False, description="let slower workers make fewer, as for `ormo-server`")

    stop_after_gradients: int | None = Field(
        None,
        title="End of the run",
        ge=0,
        description="end the run after this many gradients; 0: no such end; none: 1500, with --local-steps 300",
    )
    stop_after_samples: int = Field(0, ge=0, description="end the run after this many samples; 0: no such end")

    evaluate_every_seconds: float = Field(
        2.0,
        title="Evaluation and output",
        gt=0,
        le=LONGEST_SECONDS,
        description="seconds between evaluations on the test set",
    )
    directory: Path | None = Field(
        None,
        description="where checkpoints and logs go; an earlier run's directory continues that run; none: a new one "
        "under `runs/`, named by the time",
    )
    track: str = Field("", description=TRACK)
    metrics_listen: str = Field("127.0.0.1:0", description="host and port of the server's metrics; port 0: a free one")

    server_flags: str = Field(
        "", title="Flags of the programs it starts", description="more flags for `ormo-server serve`, in one string"
    )
    worker_flags: str = Field("", description="more flags for `ormo-worker run`, in one string")

    @model_validator(mode="after")
    def _local_steps_are_wanted(self) -> "LocalSettings":
        if not self.local_steps and (self.inner or self.local_steps_by_speed):
            raise ValueError("--inner and --local-steps-by-speed are for local steps: say how many with --local-steps")
        return self

    @property
    def preset(self) -> str:
        """The method that the server trains by."""
        return self.method or ("local-ormo" if self.local_steps else "ormo")

    @property
    def updates(self) -> int:
        """How many gradients, or sums of local steps, end the run; 0 for none."""
        if self.stop_after_gradients is None:
            return 300 if self.local_steps else 1500
        return self.stop_after_gradients

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


class Child:
    """One program of this package, run by this Python.

    Args:
        name: what messages and its log file call it.
        module: the module that Python runs.
        arguments: the words after it on the command line.
        environment: the variables that it sees.
        log: directory for the file with what it writes on stderr.

    Attributes:
        peak_bytes: the most memory that it had, known after its end.
    """

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.log_path = log / f"{name}.log"
        self.peak_bytes = 0
        with self.log_path.open("ab") as stderr:
            # A session of its own: Ctrl-C reaches us alone, and we stop the children in order.
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", module, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                encoding="utf-8",
                errors="replace",  # a task may print anything, and who does not read it to its end stops it
            )

    @property
    def output(self) -> IO[str]:
        """What it writes on stdout."""
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ended(self) -> int | None:
        """Its exit code, or None while it runs."""
        if self._process.returncode is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                self.peak_bytes = usage.ru_maxrss * _KIB
        return self._process.returncode

    def stop(self) -> int:
        """Ask it to end, insist after a while, and return its exit code."""
        self.ask_to_stop()
        deadline = time.monotonic() + _STOP_SECONDS
        while self.ended() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.02)
        self.output.close()
        code = self.ended()
        assert code is not None
        return code

    def ask_to_stop(self) -> None:
        """Send SIGTERM if it still runs."""
        if self.ended() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL if it still runs."""
        if self.ended() is None:
            os.kill(self.pid, signal.SIGKILL)

    def last_words(self, lines: int = 5) -> str:
        """The end of its log."""
        return "\n".join(map(printable, self.log_path.read_text(errors="replace").splitlines()[-lines:]))


# Looked at by a process of its own: PyTorch, and what the task's module does, would stay in this one for the whole run.
_LOOK = """
import sys
from pathlib import Path
from ormo_worker.tasks import TaskError, load_task
try:
    load_task(sys.argv[1], *map(Path, sys.argv[2:]))
except TaskError as error:
    sys.exit(str(error))
"""


class ClusterError(RuntimeError):
    """A process that the run can't do without has ended; the sentence says which and what it last said."""


def refuse_unusable_task(settings: LocalSettings) -> None:
    """Make the task as workers will, before anything is started that would have to be stopped again.

    Raises:
        ClusterError: there is no such task, or it can't be used: something is missing, or its data folder is.
    """
    words = [settings.task, *([] if settings.data_dir is None else [str(settings.data_dir)])]
    command = [sys.executable, "-c", _LOOK, *words]
    looked = subprocess.run(  # noqa: S603
        command,
        env=_environment_of_children(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",  # as of all children
        check=False,
    )
    if looked.returncode:
        said = "\n".join(map(printable, looked.stderr.strip().splitlines()))
        raise ClusterError(
            said or f"the task {settings.task!r} made Python exit with code {looked.returncode} while it was loaded"
        )


class Cluster:
    """A server, workers and an evaluator on this machine.

    Attributes:
        directory: where checkpoints and logs are.
        address: HOST:PORT of the server, once it is up.
        metrics_address: HOST:PORT of the server's metrics; empty if there are none.
        workers: the worker processes.
    """

    def __init__(self, settings: LocalSettings) -> None:
        self.settings = settings
        self.address = ""
        self.metrics_address = ""
        self.workers: list[Child] = []
        self.server: Child | None = None
        self.evaluator: Child | None = None
        self._reader: threading.Thread | None = None  # of the evaluator's lines
        self.directory = settings.directory or Path(time.strftime("runs/local-%Y%m%d-%H%M%S"))
        self._logs = self.directory / "logs"

    def start(self, evaluated: Callable[[dict[str, float]], None]) -> None:
        """Start everything.

        Args:
            evaluated: told of each evaluation, in another thread: iteration, loss, accuracy, seconds and samples.

        Raises:
            ClusterError: the server did not come up, or the system starts no more programs.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        self.server = self._child("server", "ormo_server", self._server_arguments())
        self._await_server(self.server)
        for number, factor in enumerate(self.settings.slow_factors()):
            arguments = self._worker_arguments(number, factor)
            self.workers.append(self._child(f"worker-{number}", "ormo_worker", arguments))
        for worker in self.workers:
            _in_background(lambda worker=worker: [None for _ in worker.output])  # type: ignore[misc]
        evaluator = self._child("evaluator", "ormo_worker", self._evaluator_arguments())
        self.evaluator = evaluator
        self._reader = _in_background(lambda: _report(evaluator, evaluated))

    def _child(self, name: str, module: str, arguments: Sequence[str]) -> Child:
        try:
            return Child(name, module, arguments, _environment_of_children(), self._logs)
        except OSError as error:
            raise ClusterError(
                f"{name} can't be started ({error.strerror}): take fewer --workers, or raise the limits of processes "
                "and of open files (`ulimit -u`, `ulimit -n`)"
            ) from error

    def _await_server(self, server: Child) -> None:
        ready = announced(server.output.readline())
        if "address" not in ready:
            server.stop()
            raise ClusterError(f"the server did not start: {server.last_words(1)}")
        self.address, self.metrics_address = ready["address"], ready["metrics"]
        _in_background(lambda: [None for _ in server.output])

    def check(self) -> None:
        """Look after the processes.

        Raises:
            ClusterError: the server, or the last worker, has ended before the run.
        """
        assert self.server is not None
        if self.server.ended() is not None:
            raise ClusterError(f"the server ended with code {self.server.ended()}:\n{self.server.last_words()}")
        failed = [worker for worker in self.workers if worker.ended() not in (None, 0)]
        if len(failed) == len(self.workers):
            last = failed[-1]
            raise ClusterError(f"all workers failed; {last.name} with code {last.ended()}:\n{last.last_words()}")

    def failed_workers(self) -> list[Child]:
        """Workers that ended with an error."""
        return [worker for worker in self.workers if worker.ended() not in (None, 0)]

    @property
    def _clients(self) -> list[Child]:
        return [*self.workers, *([self.evaluator] if self.evaluator else [])]

    def all_done(self) -> bool:
        """Whether workers and evaluator have come to their end by themselves, and all evaluations are told."""
        told = self._reader is None or not self._reader.is_alive()
        return told and all(child.ended() is not None for child in self._clients)

    def stop(self) -> None:
        """Stop workers and evaluator together, then the server, which writes its checkpoint."""
        for client in self._clients:
            client.ask_to_stop()
        for client in self._clients:
            client.stop()
        if self.server is not None:
            self.server.stop()

    def kill(self) -> None:
        """End all programs at once."""
        children = [*self._clients, *([self.server] if self.server else [])]
        for child in children:
            child.kill()
        for child in children:
            child.stop()

    def metrics(self) -> str:
        """The server's metrics as they are now, as text; empty if they can't be had."""
        return metrics_page(self.metrics_address) if self.metrics_address else ""

    def newest_checkpoint(self) -> Path | None:
        """The model of the run's last checkpoint."""
        return max(self.directory.glob("checkpoint-*/model.safetensors"), default=None)

    def _server_arguments(self) -> list[str]:
        settings = self.settings
        flags = {
            "--listen": "127.0.0.1:0",
            "--metrics-listen": settings.metrics_listen,
            "--directory": self.directory,
            "--method": settings.preset,
            "--momentum": settings.momentum,
            "--weight-decay": settings.weight_decay,
            "--min-workers": settings.workers,
            "--max-workers": max(64, settings.workers),
            "--slots-per-worker": max(2, settings.in_flight),
            "--stop-after-gradients": settings.updates,
            "--stop-after-samples": settings.stop_after_samples,
        }
        if settings.learning_rate is not None:
            flags["--learning-rate"] = settings.learning_rate
        if settings.local_steps:
            flags["--local-steps"] = settings.local_steps
        by_speed = ["--local-steps-by-speed"] if settings.local_steps_by_speed else []
        return ["serve", *_flags(flags), *by_speed, *shlex.split(settings.server_flags)]

    def _worker_arguments(self, number: int, factor: float) -> list[str]:
        settings = self.settings
        flags = {
            "--worker-id": f"worker-{number}",
            "--batch-size": settings.batch_size,
            "--in-flight": settings.in_flight,
            "--slow-factor": factor,
            "--threads": max(1, (os.cpu_count() or 1) // settings.workers),
        }
        if settings.local_steps:
            flags |= {"--inner": settings.inner or "adamw", "--inner-lr": settings.inner_lr}
        return ["run", *_flags(flags), *self._task_arguments(), *shlex.split(settings.worker_flags)]

    def _evaluator_arguments(self) -> list[str]:
        return ["evaluate", *_flags({"--every-seconds": self.settings.evaluate_every_seconds}), *self._task_arguments()]

    def _task_arguments(self) -> list[str]:
        settings = self.settings
        flags = {"--server": self.address, "--task": settings.task, "--device": settings.device}
        return _flags(flags) + ([] if settings.data_dir is None else ["--data-dir", str(settings.data_dir)])


def _flags(values: Mapping[str, object]) -> list[str]:
    return [word for flag, value in values.items() for word in (flag, str(value))]


def _environment_of_children() -> dict[str, str]:
    """Ours without our own settings, which children have as flags: of a port, say, the server's alone."""
    ours = variables_of(LocalSettings)
    return {name: value for name, value in os.environ.items() if name.upper() not in ours}


def _in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _report(evaluator: Child, evaluated: Callable[[dict[str, float]], None]) -> None:
    for line in evaluator.output:
        fields = announced(line)
        if "accuracy" in fields:
            evaluated({name: float(value) for name, value in fields.items()})
