"""A contender at work: its server, its workers, and what they use."""

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.round_trips.place import Place

_TESTS = Path(__file__).parents[2]
_Process = subprocess.Popen[str]
# Peers tell much of their ends, and gRPC of its own.
_QUIET = {"GRPC_VERBOSITY": "ERROR", "TORCH_CPP_LOG_LEVEL": "FATAL", "PYTHONWARNINGS": "ignore"}
_TICKS = os.sysconf("SC_CLK_TCK")
_STAGE = re.compile(r'ormo_exchange_stage_seconds_(sum|count)\{stage="(\w+)"\} (\S+)')


@dataclass(frozen=True)
class Turn:
    """What a contender did in one turn.

    Attributes:
        trips: round trips of all workers.
        seconds: of wall-clock time.
        processor_seconds: of server and workers.
    """

    trips: int
    seconds: float
    processor_seconds: float


class Team:
    """The processes of one contender, which are idle but in its turns.

    Attributes:
        name: of the contender.
    """

    def __init__(self, name: str, server: _Process, metrics: str, workers: list[_Process]) -> None:
        self.name = name
        self._server = server
        self._metrics = metrics
        self._workers = workers

    def trips(self, number: int) -> Turn:
        """So many round trips of one worker."""
        return self._turn(f"trips {number}")

    def window(self, seconds: float) -> Turn:
        """Round trips of all workers at once, for so many seconds."""
        return self._turn(f"seconds {seconds}")

    def _turn(self, order: str) -> Turn:
        before = self._server_seconds()
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{order}\n")
        said = [_said(worker) for worker in self._workers]
        if not all(said):
            raise ChildProcessError(f"a worker of {self.name} has ended; its error, if it had time for one, is above")
        told = [json.loads(line) for line in said]
        return Turn(
            trips=sum(each["trips"] for each in told),
            seconds=max(each["seconds"] for each in told),
            processor_seconds=sum(each["processor_seconds"] for each in told) + self._server_seconds() - before,
        )

    def peak_bytes(self) -> int:
        """The server's largest resident memory so far."""
        status = Path(f"/proc/{self._server.pid}/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]

    def stages(self) -> dict[str, float]:
        """Mean seconds of an exchange's stages, from the server's own metrics; empty for who has none."""
        if not self._metrics:
            return {}
        with urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=30) as page:
            found = {(kind, stage): float(value) for kind, stage, value in _STAGE.findall(page.read().decode())}
        stages = {stage for _, stage in found}
        return {stage: found["sum", stage] / found["count", stage] for stage in stages if found["count", stage]}

    def _server_seconds(self) -> float:
        fields = Path(f"/proc/{self._server.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


@contextmanager
def team(name: str, elements: int, workers: int) -> Iterator[Team]:
    """A contender whose workers have each made a round trip. All its processes end with the block."""
    with tempfile.TemporaryDirectory(prefix="ormo-bench-") as folder, ExitStack() as stack:
        place = Place(elements, workers, 0, "", Path(folder))
        server, address, metrics = stack.enter_context(started(name, place))
        yield stack.enter_context(joined(name, replace(place, address=address), server, metrics))


@contextmanager
def joined(name: str, place: Place, server: _Process, metrics: str) -> Iterator[Team]:
    """A contender's workers at a server that has started; each has made a round trip."""
    with ExitStack() as stack:
        ranks = range(place.workers)
        members = [stack.enter_context(_child("worker", name, replace(place, rank=rank))) for rank in ranks]
        for member in members:
            assert _said(member) == "ready\n", f"a worker of {name} did not come up; its error is above"
        yield Team(name, server, metrics, members)


@contextmanager
def started(name: str, place: Place) -> Iterator[tuple[_Process, str, str]]:
    """A contender's server, its address and that of its metrics, empty if it has none."""
    with _child("server", name, place) as server:
        address, metrics = re.findall(r"(?:address|metrics)=(\S*)", _said(server))
        yield server, address, metrics


@contextmanager
def _child(role: str, name: str, place: Place) -> Iterator[_Process]:
    words = (role, name, place.elements, place.workers, place.rank, place.address, place.folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.round_trips.child", *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        cwd=_TESTS,
        env=os.environ | _QUIET,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def _said(process: _Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline()
