"""The processes of a run: a server that is started again whenever it ends, and workers."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from chaos.archive import Archive
from chaos.diaries import Process, Trouble
from chaos.disk import Disk
from chaos.memory import SERVER, Sampler
from chaos.proxy import Proxy

_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("ORMO_")} | {
    "OMP_NUM_THREADS": "1"
}
_START_SECONDS = 120.0
_END_SECONDS = 60.0


class Broken(Exception):
    """The run can't go on; says why."""


@dataclass(frozen=True)
class Load:
    """What workers do.

    Attributes:
        workers: how many there are.
        elements: of the model.
        pause_seconds: of a worker between gradients.
        lease_seconds: after which a silent peer is taken for dead.
    """

    workers: int
    elements: int
    pause_seconds: float
    lease_seconds: float


class Stage:
    """Starts, stops and kills; ends all that it started, by id.

    Args:
        folder: for everything but what the server writes.
        disk: for that.
        flags: of the server, besides those that the stage needs.
        load: what workers do.

    Attributes:
        trouble: when workers could not be answered, and which one if not all.
        processes: of the workers, with the moments at which they began and were ended.
        opened: when the server's port was open.
        start_seconds: how long its last whole start took.
    """

    def __init__(
        self,
        folder: Path,
        disk: Disk,
        flags: list[str],
        load: Load,
    ) -> None:
        self.folder = folder
        self.load = load
        self.disk = disk
        self.run = disk.path / "run"
        self.proxy = Proxy()
        self.archive = Archive(self.run, disk.path / "archive")
        self.memory = Sampler()
        self.server: subprocess.Popen[str] | None = None
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self.trouble: Trouble = []
        self.processes: list[Process] = []
        self.opened: list[float] = []
        self.start_seconds = 1.0
        self.address = "127.0.0.1:0"
        self._flags = flags

    # The server

    def start_server(self, environment: dict[str, str] | None = None) -> None:
        """Start it on the port it had, with this in its environment besides, and wait until it serves."""
        began = time.monotonic()
        self.begin_server(environment)
        assert self.server is not None
        assert self.server.stdout is not None
        ready, _, _ = select.select([self.server.stdout], [], [], _START_SECONDS)
        line = self.server.stdout.readline() if ready else ""
        if not line.startswith("serving address="):
            raise Broken(f"the server did not start: see {self.folder / 'server.log'}")
        self.address = line.split()[1].partition("=")[2]
        self.proxy.lead_to(self.address)
        self.opened.append(time.monotonic())
        self.start_seconds = self.opened[-1] - began
        self.memory.watch(SERVER, self.server.pid)

    def begin_server(self, environment: dict[str, str] | None = None) -> None:
        """Start it, and wait for nothing."""
        life = self.archive.begin_life()
        given = ["--listen", self.address, "--metrics-listen", "", "--directory", self.run, *self._flags]
        with (self.folder / "server.log").open("ab") as log:
            self.server = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "chaos.faulty_server",
                    str(self.disk.control),
                    str(life),
                    "serve",
                    *map(str, given),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=_ENVIRONMENT | (environment or {}),
                text=True,
            )

    def end_server(self, how: signal.Signals) -> int:
        """Kill it, or let it drain; returns its exit code."""
        assert self.server is not None
        self.memory.look()
        os.kill(self.server.pid, how)
        try:
            code = self.server.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            raise Broken(f"the server did not end within {_END_SECONDS:g} s of {how.name}") from None
        assert self.server.stdout is not None
        self.server.stdout.close()
        return code

    # Workers

    def start_worker(self, column: int) -> None:
        """Start the worker of a column, or a new process of it."""
        load, name = self.load, f"w{column}"
        about = [load.workers, load.elements, load.pause_seconds, load.lease_seconds]
        words = [self.proxy.address, name, column, *about, self.diary(column)]
        began = time.monotonic()
        with (self.folder / f"{name}.log").open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "chaos.loads", *map(str, words)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=_ENVIRONMENT,
            )
        self.workers[column] = worker
        self.processes.append(Process(name, worker.pid, began))
        self.memory.watch(name, worker.pid)

    def end_worker(self, column: int, how: signal.Signals) -> int | None:
        """Kill it, or let it end; returns its exit code, None if it does not end."""
        worker = self.workers[column]
        os.kill(worker.pid, how)
        try:
            return worker.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return None
        finally:
            next(each for each in self.processes if each.pid == worker.pid).ended = time.monotonic()

    def finish(self) -> list[str]:
        """End all as one does after a training; returns a sentence for each that does not end as it should."""
        wrong = []
        try:
            self.until_answered(0, "at the end", each=1)
        except Broken as broken:
            if self.server is None or self.server.poll() is not None:
                raise
            wrong.append(str(broken))
        for column, worker in self.workers.items():
            code = worker.poll() if worker.poll() is not None else self.end_worker(column, signal.SIGTERM)
            if code is None:
                wrong.append(f"worker w{column} did not end within {_END_SECONDS:g} s of SIGTERM")
            elif code:
                wrong.append(f"worker w{column} ended with {code}: see {self.folder / f'w{column}.log'}")
        code = self.end_server(signal.SIGTERM)
        return [*wrong, f"the server ended with {code}: see its log"] if code else wrong

    def diary(self, column: int) -> Path:
        """What the worker writes."""
        return self.folder / f"w{column}.diary"

    def answers(self, column: int) -> int:
        """How often a worker was answered so far."""
        diary = self.diary(column)
        return diary.read_bytes().count(b'"acked"') if diary.exists() else 0

    def until_answered(self, more: int, what: str, *, each: int = 0) -> None:
        """Wait until workers have been answered so many times more, and each of them so often.

        Raises:
            Broken: that takes too long, or somebody has ended whom no fault ended.
        """
        before, deadline = {column: self.answers(column) for column in self.workers}, time.monotonic() + _START_SECONDS
        while True:
            got = [self.answers(column) - count for column, count in before.items()]
            if sum(got) >= more and min(got) >= each:
                return
            self._check_all_live(what)
            if time.monotonic() > deadline:
                fewest = min(self.workers, key=lambda column: self.answers(column) - before[column])
                raise Broken(f"no answers within {_START_SECONDS:g} s {what}, fewest to worker w{fewest}")
            time.sleep(0.05)

    def _check_all_live(self, what: str) -> None:
        assert self.server is not None
        for name, process in [("the server", self.server), *((f"worker w{at}", w) for at, w in self.workers.items())]:
            if process.poll() is not None:
                raise Broken(f"{name} ended by itself with {process.returncode} {what}: see its log")

    def close(self) -> None:
        """End all."""
        for process in [*self.workers.values(), self.server]:
            if process is not None and process.poll() is None:
                os.kill(process.pid, signal.SIGCONT)
                os.kill(process.pid, signal.SIGKILL)
                process.wait(30)
        self.memory.close()
        self.archive.close()
        self.proxy.close()
        noted = {
            "trouble": self.trouble,
            "opened": self.opened,
            "processes": [vars(process) for process in self.processes],
            "memory": self.memory.samples,
        }
        (self.folder / "stage.json").write_text(json.dumps(noted))
