"""The processes of a run: a server that is started again whenever it ends, and workers."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from chaos.archive import Archive
from chaos.evidence import Trouble
from chaos.proxy import Proxy

_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("ORMO_")} | {
    "OMP_NUM_THREADS": "1"
}
_START_SECONDS = 120.0


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
        folder: for everything.
        flags: of the server, besides those that the stage needs.
        load: what workers do.
        environment: of the server.
    """

    def __init__(
        self,
        folder: Path,
        flags: list[str],
        load: Load,
        environment: dict[str, str],
    ) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.disk = folder / "disk.json"
        self.proxy = Proxy()
        self.archive = Archive(self.run, folder / "archive")
        self.server: subprocess.Popen[str] | None = None
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self.trouble: Trouble = []
        self.opened: list[float] = []
        self.memory: list[int] = []
        self.address = "127.0.0.1:0"
        self._flags = flags
        self._load = load
        self._environment = environment

    # The server

    def start_server(self) -> None:
        """Start it on the port it had, and wait until it serves."""
        life = self.archive.begin_life()
        given = ["--listen", self.address, "--metrics-listen", "", "--directory", self.run, *self._flags]
        with (self.folder / "server.log").open("ab") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "chaos.faulty_server", str(self.disk), str(life), "serve", *map(str, given)],
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=_ENVIRONMENT | self._environment,
                text=True,
            )
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        if not line.startswith("serving address="):
            raise RuntimeError(f"the server did not start: see {self.folder / 'server.log'}")
        self.address = line.split()[1].partition("=")[2]
        self.proxy.lead_to(self.address)
        self.opened.append(time.monotonic())

    def end_server(self, how: signal.Signals) -> int:
        """Kill it, or let it drain; returns its exit code."""
        assert self.server is not None
        if time.monotonic() - self.opened[-1] > 1.0:
            self.memory.append(psutil.Process(self.server.pid).memory_info().rss)
        os.kill(self.server.pid, how)
        code = self.server.wait(60)
        assert self.server.stdout is not None
        self.server.stdout.close()
        return code

    def set_disk(self, **state: Any) -> None:
        """Make the disk slow or full; nothing for a sound one."""
        aside = self.disk.with_suffix(".new")
        aside.write_text(json.dumps(state))
        aside.replace(self.disk)

    # Workers

    def start_worker(self, column: int) -> None:
        """Start the worker of a column, or a new process of it."""
        load = self._load
        about = [load.workers, load.elements, load.pause_seconds, load.lease_seconds]
        words = [self.proxy.address, f"w{column}", column, *about, self.diary(column)]
        with (self.folder / f"w{column}.log").open("ab") as log:
            self.workers[column] = subprocess.Popen(
                [sys.executable, "-m", "chaos.loads", *map(str, words)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=_ENVIRONMENT,
            )

    def diary(self, column: int) -> Path:
        """What the worker writes."""
        return self.folder / f"w{column}.diary"

    def answers(self) -> int:
        """How often workers were answered so far."""
        diaries = [self.diary(column) for column in self.workers]
        return sum(diary.read_bytes().count(b'"acked"') for diary in diaries if diary.exists())

    def until_answered(self, more: int, what: str) -> None:
        """Wait until workers have been answered so many times more."""
        wanted, deadline = self.answers() + more, time.monotonic() + _START_SECONDS
        while self.answers() < wanted:
            assert self.server is not None
            if self.server.poll() is not None:
                raise RuntimeError(f"the server ended by itself ({self.server.returncode}): see its log")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answers within {_START_SECONDS:g} s {what}")
            time.sleep(0.05)

    def close(self) -> None:
        """End all."""
        for process in [*self.workers.values(), self.server]:
            if process is not None and process.poll() is None:
                os.kill(process.pid, signal.SIGCONT)
                os.kill(process.pid, signal.SIGKILL)
                process.wait(30)
        self.archive.close()
        self.proxy.close()
