"""The real programs as processes, ended by their ids and nothing else."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_runtime.logs import announced
from system.forked import Forked

# One thread each: several processes share two cores.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("ORMO_")} | {
    "OMP_NUM_THREADS": "1"
}


class Program:
    """One running program."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *arguments: object,
        module: str,
        environment: Mapping[str, str],
        through: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        words = [str(argument) for argument in arguments]
        self.process: subprocess.Popen[str] | Forked
        if environment or through:  # which may matter before anything is imported
            self.process = self._started([*through, sys.executable, "-m", module, *words], folder, environment)
        else:
            self.process = Forked(module, words, folder=folder, log=self.log, environment=ENVIRONMENT)

    def _started(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> "subprocess.Popen[str]":
        with self.log.open("ab") as stderr:
            return subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                cwd=folder,
                env=ENVIRONMENT | dict(environment),
                text=True,
            )

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def terminate(self, seconds: float = 20.0) -> int:
        os.kill(self.process.pid, signal.SIGTERM)
        return self.process.wait(seconds)

    def wait(self, seconds: float = 60.0) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end; its log:\n{self.log.read_text()}") from None

    def printed(self) -> tuple[int, str]:
        """Its exit code, and all that it printed."""
        assert self.process.stdout is not None
        text = self.process.stdout.read()
        return self.wait(), text

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Stage:
    """A folder in which programs run; all of them end with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = "127.0.0.1:0"
        self.metrics = ""
        self.programs: list[Program] = []

    def program(
        self,
        name: str,
        *arguments: object,
        module: str,
        environment: Mapping[str, str] | None = None,
        through: Sequence[str] = (),
    ) -> Program:
        program = Program(self.folder, name, *arguments, module=module, environment=environment or {}, through=through)
        self.programs.append(program)
        return program

    def server(self, *, through: Sequence[str] = (), **flags: Any) -> Program:
        """Start a server, on the port of the one before it, by a program such as `prlimit`; wait until it serves."""
        given = {"listen": self.address, "metrics-listen": "", "directory": "run"} | flags
        server = self.program("server", "serve", *as_flags(given), module="ormo_server", through=through)
        assert server.process.stdout is not None
        ready = server.process.stdout.readline()
        if given.get("log_format") == "json":
            assert json.loads(ready)["message"] == "serving"
        else:
            assert ready.startswith("serving address="), server.log.read_text()
        told = announced(ready)
        self.address, self.metrics = told["address"], told["metrics"]
        return server

    def worker(self, name: str, environment: Mapping[str, str] | None = None, **flags: Any) -> Program:
        given = {"server": self.address, "worker-id": name} | flags
        return self.program(name, "run", *as_flags(given), module="ormo_worker", environment=environment)

    def evaluator(self, name: str, **flags: Any) -> Program:
        return self.program(name, "evaluate", *as_flags({"server": self.address} | flags), module="ormo_worker")

    def status(self) -> pb.GetStatusResponse:
        with grpc.insecure_channel(self.address) as channel:
            return ParameterServerStub(channel).GetStatus(pb.GetStatusRequest(), timeout=5, wait_for_ready=True)

    def until(
        self, condition: Callable[[pb.GetStatusResponse], bool], what: str, seconds: float = 60.0
    ) -> pb.GetStatusResponse:
        deadline = time.monotonic() + seconds
        while not condition(status := self.status()):
            assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}; now {status}"
            time.sleep(0.05)
        return status

    def model(self) -> Path:
        """The state_dict of the newest checkpoint."""
        return max((self.folder / "run").glob("checkpoint-*/model.safetensors"))

    def close(self) -> None:
        for program in self.programs:
            program.close()


def as_flags(values: Mapping[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in _flag(name.replace("_", "-"), value)]


def _flag(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, bool):
        return (f"--{name}",) if value else (f"--no-{name}",)
    return f"--{name}", str(value)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    stage = Stage(folder)
    try:
        yield stage
    finally:
        stage.close()
