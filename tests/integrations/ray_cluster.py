"""A real Ray cluster on this machine: nodes with addresses, CPUs and processes of their own, which can be killed."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from integrations.ports import free_ports
from system.programs import ENVIRONMENT

_SECONDS = 120.0
_BIN = Path(sys.executable).parent
# The GCS finds a dead node in about as many seconds instead of twenty.
_SYSTEM = '{"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 4}'


# Nothing goes to Ray's makers, and no token of the user's is asked for.
APART = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


class Node:
    """One node: `ray start --block` and all that it started."""

    def __init__(self, address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.address = address
        self.log = log
        self._process = process

    def processes(self) -> list[psutil.Process]:
        try:
            first = psutil.Process(self._process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """End all of its processes at once, as when its power is cut."""
        for how in (signal.SIGSTOP, signal.SIGKILL):  # none sees another one go
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(how)
        self._process.wait(30)

    def close(self) -> None:
        """End it as one does, and what does not end."""
        processes = self.processes()
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(60)
        _, left = psutil.wait_procs(processes, timeout=20)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class Cluster:
    """Nodes 127.0.0.2, 127.0.0.3 and so on; the first one is the head."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = ENVIRONMENT | APART | dict(environment)
        self.nodes: list[Node] = []
        self._ports = free_ports(2)
        self.address = f"127.0.0.2:{self._ports[0]}"
        # Paths of sockets in it may have 107 characters.
        self._temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")

    def add(self, cpus: int) -> Node:
        """Start a node and wait until it is part of the cluster."""
        host = f"127.0.0.{len(self.nodes) + 2}"
        port, client = self._ports
        head = ["--head", "--port", port, "--include-dashboard", "false", "--temp-dir", self._temporary]
        head += ["--system-config", _SYSTEM, "--ray-client-server-port", client, "--disable-usage-stats"]
        words = head if not self.nodes else ["--address", self.address]
        resources = ["--num-cpus", cpus, "--num-gpus", 0, "--object-store-memory", 100_000_000]
        log = self.folder / f"node-{host}.log"
        command = [_BIN / "ray", "start", "--block", "--node-ip-address", host, *words, *resources]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
            )
        self.nodes.append(Node(host, process, log))
        until(lambda: "Ray runtime started" in log.read_text(), log)
        return self.nodes[-1]

    def close(self) -> None:
        for node in reversed(self.nodes):
            node.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


class Command:
    """`ormo-ray`, or another program of the cluster's users."""

    def __init__(self, log: Path, environment: Mapping[str, str], *words: object) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=log.parent,
                env=dict(environment),
            )

    @property
    def text(self) -> str:
        """All that it wrote, without colours."""
        return re.sub(r"\x1b\[\d*m", "", self.log.read_text(errors="replace"))

    def until(self, *texts: str) -> None:
        """Wait until it has written these.

        Raises:
            AssertionError: it did not, or ended first.
        """
        until(lambda: all(text in self.text for text in texts), self.log, self.process)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        try:
            return self.process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end:\n{self.text}") from None

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


def until(condition: Callable[[], bool], log: Path, process: "subprocess.Popen[bytes] | None" = None) -> None:
    """Wait until it holds.

    Raises:
        AssertionError: it does not, and what the log says.
    """

    deadline = time.monotonic() + _SECONDS
    while not condition():
        ended = process is not None and process.poll() is not None and not condition()
        assert not ended, f"it ended:\n{log.read_text(errors='replace')}"
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.1)


@contextlib.contextmanager
def cluster(folder: Path, **environment: str) -> Iterator[Cluster]:
    made = Cluster(folder, environment)
    try:
        yield made
    finally:
        made.close()
