"""Many small workers against one server: how evenly they are served, how long they wait, and what they cost.

Prints, for each number of workers: exchanges per second, the slowest worker's share of the mean rate, the median and
99th percentile of the time of an exchange, and the server's threads and memory. Worker processes hold many clients
each, as threads, for there are more clients than a machine has memory for processes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, quantiles

from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_runtime.process import keep_freed_memory
from ormo_worker.client.api import ParameterClient
from ormo_worker.client.messages import Gradient

MODEL = Manifest.laid_out([TensorSpec("weight", (1000,), FLOAT32, PARAMETER)])
_CLIENTS_PER_PROCESS = 32
# Of the mean rate; less is starvation.
_FAIR_SHARE = 0.5


@dataclass(frozen=True)
class Report:
    """What so many workers met with.

    Attributes:
        workers: that worked at once.
        rate: exchanges of all of them, per second.
        slowest: exchanges of the slowest, as a share of the mean.
        median_seconds, p99_seconds: of an exchange.
        threads: of the server.
        megabytes: the server's resident memory.
    """

    workers: int
    rate: float
    slowest: float
    median_seconds: float
    p99_seconds: float
    threads: int
    megabytes: float

    @classmethod
    def of(cls, seconds: list[list[float]], window: float, pid: int) -> "Report":
        """From each worker's exchanges' times, in a window of so many seconds."""
        counts = [len(each) for each in seconds]
        cuts = quantiles((value for each in seconds for value in each), n=100)
        facts = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return cls(
            workers=len(counts),
            rate=sum(counts) / window,
            slowest=min(counts) / mean(counts),
            median_seconds=cuts[49],
            p99_seconds=cuts[98],
            threads=int(facts["Threads"]),
            megabytes=int(facts["VmRSS"].split()[0]) / 1024,
        )

    def line(self) -> str:
        """A row of a Markdown table."""
        return (
            f"| {self.workers} | {self.rate:.0f} | {self.slowest:.2f} | {1e3 * self.median_seconds:.1f} | "
            f"{1e3 * self.p99_seconds:.1f} | {self.threads} | {self.megabytes:.0f} |"
        )


HEADER = (
    "| workers | exchanges/s | slowest/mean | median, ms | 99 %, ms | server's threads | its memory, MB |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def measured(workers: int, seconds: float) -> Report:
    """Let so many workers exchange gradients for so many seconds, once all have begun."""
    with tempfile.TemporaryDirectory() as folder, _served(Path(folder), workers) as (server, address):
        shares = [len(range(start, workers, _processes(workers))) for start in range(_processes(workers))]
        with _clients(address, shares) as clients:
            _told(clients, seconds / 4)  # warm by then
            return Report.of(_told(clients, seconds), seconds, server.pid)


def _processes(workers: int) -> int:
    return -(-workers // _CLIENTS_PER_PROCESS)


@contextmanager
def _served(folder: Path, workers: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    flags = ["--listen", "127.0.0.1:0", "--metrics-listen", "", "--directory", str(folder), "--log-level", "error"]
    flags += ["--max-workers", str(workers), "--learning-rate", "1e-6", "--checkpoint-seconds", "3600"]
    with _ended("-m", "ormo_server", "serve", *flags) as server:
        yield server, _said(server).split("address=")[1].split()[0]


@contextmanager
def _clients(address: str, shares: list[int]) -> Iterator[list[subprocess.Popen[str]]]:
    with ExitStack() as stack:
        # The first one offers the model; none should wait for it longer than it has to.
        clients = [stack.enter_context(_ended(__file__, "--client", address, str(share))) for share in shares]
        for client in clients:
            assert _said(client) == "ready\n", "a client did not come up; its error is above"
        yield clients


@contextmanager
def _ended(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program that does not outlive its use."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _told(clients: list[subprocess.Popen[str]], seconds: float) -> list[list[float]]:
    for client in clients:
        assert client.stdin is not None
        client.stdin.write(f"{seconds}\n")
    return [times for client in clients for times in json.loads(_said(client))]


# In a client process


def exchange_when_told(address: str, workers: int) -> None:
    """Be so many workers; for each number of seconds on stdin, print the times of their exchanges."""
    keep_freed_memory()
    with ExitStack() as stack, ThreadPoolExecutor(workers) as threads:
        clients = [stack.enter_context(ParameterClient(address, MODEL, model=_model)) for _ in range(workers)]
        list(threads.map(_join, clients))
        _say("ready")
        for line in sys.stdin:
            end = time.perf_counter() + float(line)
            _say(json.dumps(list(threads.map(lambda client, end=end: _times(client, end), clients))))


def _model() -> Payload:
    made = Payload(PayloadLayout.of(MODEL, FLOAT32, with_buffers=True))
    made.parameters.zero_()
    return made


def _join(client: ParameterClient) -> None:
    client.join()
    client.slots[0].exchange(None)


def _times(client: ParameterClient, end: float) -> list[float]:
    gradient, times = Gradient(_model(), samples=1), []
    while (began := time.perf_counter()) < end:
        client.slots[0].exchange(gradient)
        times.append(time.perf_counter() - began)
    return times


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 16, 64, 256], help="numbers of workers")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a window")
    parser.add_argument("--client", nargs=2, metavar=("ADDRESS", "WORKERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        exchange_when_told(options.client[0], int(options.client[1]))
        return
    _say(HEADER)
    reports = []
    for workers in options.workers:
        reports.append(measured(workers, options.seconds))
        _say(reports[-1].line())
    if any(report.slowest < _FAIR_SHARE for report in reports):
        sys.exit(f"a worker starved: the slowest got less than {_FAIR_SHARE} of the mean rate")


if __name__ == "__main__":
    main()
