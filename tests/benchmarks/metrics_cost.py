"""What the server's metrics cost: processor time per push, and a scrape with many workers.

    python tests/benchmarks/metrics_cost.py [--exchanges N] [--rounds N] [--workers N]

A push is an exchange on an open PushPull stream, given to the servicer without a network, and then over gRPC. It is
measured in turns with metrics and without: counters, histograms, records of workers and the timing of the lock are
replaced by nothing, and the gradient's norm by the search for NaN alone. Without a network the time is
the process's own on the processor.
"""

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from prometheus_client import Counter

from ormo_protos.framing import Frame, Headed
from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.core.vectors import SquaredNorm, all_finite
from ormo_server.metrics.noted import Noted
from ormo_server.metrics.view import Observations, WorkerObservation
from ormo_server.security import OpenAccess
from ormo_server.service import engine, servicer, transfers
from ormo_server.service.admin import Controls
from ormo_server.service.figures import Figures
from ormo_server.service.lock import MachineLock
from ormo_server.service.server import Server
from ormo_server.service.servicer import Servicer
from service.wire import SMALL, WireWorker, connected, payload, served

MODEL = Manifest.laid_out([TensorSpec("weight", (1000,), FLOAT32, PARAMETER)])
STOPPED = SimpleNamespace(perf_counter=lambda: 0.0, monotonic=lambda: 0.0)


@contextlib.contextmanager
def without_metrics() -> Iterator[None]:
    """Everything as it is, but that nothing is counted, timed or recorded."""

    def nothing(*_: object, **__: object) -> None:
        return None

    begin = Noted.__init__

    def note_nothing(noted: Noted) -> None:
        begin(noted)
        noted.note = nothing

    record = WorkerObservation()
    with contextlib.ExitStack() as patches:
        for owner, name, instead in (
            (Counter, "inc", nothing),
            (Noted, "__init__", note_nothing),
            (Figures, "record", nothing),
            (SquaredNorm, "count", nothing),
            (SquaredNorm, "total", lambda norm: 1.0 if all_finite(norm._vector) else None),
            (transfers, "time", STOPPED),
            (engine, "time", STOPPED),
            (servicer, "time", STOPPED),
            (MachineLock, "_acquire", lambda lock: lock._lock.acquire()),
            (MachineLock, "_release", lambda lock: lock._lock.release()),
            (Observations, "of", lambda *_: record),
        ):
            patches.enter_context(mock.patch.object(owner, name, instead))
        yield


class Context(SimpleNamespace):
    """As much of a call as the servicer looks at."""

    def is_active(self) -> bool:
        return True

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def add_callback(self, _: object) -> bool:
        return True

    def cancel(self) -> None: ...


def microseconds_per_push(exchanges: int) -> float:
    """Of processor time, with metrics or whatever has been put in their place."""
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", MODEL)
        worker.join()
        return _timed(server, worker, exchanges)


def _timed(server: Server, worker: WireWorker, exchanges: int) -> float:
    gradient, ticket = payload(MODEL, 1e-6), pb.Ticket()

    def requests() -> Iterator[Frame[pb.PushPullRequest]]:
        for number in itertools.count():
            worker.ticket = ticket
            yield Headed(worker.exchange(gradient if number else None))
            if number:
                yield from gradient.chunks()

    controls = Controls(server.host, server.told_to_stop)
    servicer = Servicer(server.host, server.streams, OpenAccess(), controls)
    answers: Any = servicer.PushPull(requests(), Context())  # type: ignore[arg-type]
    done, started = -1, time.process_time()
    for answer in answers:
        if isinstance(answer, Headed) and answer.message.WhichOneof("part") == "delivery":
            ticket = answer.message.delivery.ticket
            done += 1
            if done == exchanges // 5:  # warm by now
                started = time.process_time()
            if done == exchanges:
                break
    seconds = time.process_time() - started
    answers.close()
    return 1e6 * seconds / (exchanges - exchanges // 5)


def microseconds_per_round_trip(exchanges: int) -> float:
    """Of time, over gRPC on loopback, with client and server in this one process."""
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", MODEL)
        worker.join()
        stream, gradient = worker.open(), payload(MODEL, 1e-6)
        stream.begin(None)
        stream.delivery()
        started = time.perf_counter()
        for _ in range(exchanges):
            stream.begin(gradient)
            stream.result()
            stream.delivery()
        seconds = time.perf_counter() - started
        stream.finish()
        return 1e6 * seconds / exchanges


def scrape(workers: int) -> tuple[float, int, float]:
    """Milliseconds and bytes of a scrape over HTTP, and series per worker."""
    with (
        tempfile.TemporaryDirectory() as folder,
        served(Path(folder), max_workers=workers + 1, metrics_listen="127.0.0.1:0") as server,
        connected(server) as stub,
    ):
        empty = len(_page(server)[1].splitlines())
        for number in range(workers):
            worker = WireWorker(stub, f"worker-{number:03d}", SMALL)
            worker.join()
            worker.pull()
            worker.push(payload(SMALL, 1.0), loss=0.5)
        pages = [_page(server) for _ in range(9)]
        per_worker = sum('worker="worker-000"' in line for line in pages[0][1].splitlines())
        assert len(pages[0][1].splitlines()) > empty + workers
        return 1e3 * median(seconds for seconds, _ in pages), len(pages[0][1]), per_worker


def _page(server: Server) -> tuple[float, str]:
    started = time.perf_counter()
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as answer:
        text = answer.read().decode()
    return time.perf_counter() - started, text


def in_turns(measure: Callable[[int], float], exchanges: int, rounds: int) -> float:
    """Median of what it takes with metrics, divided by what it takes without, turn by turn."""
    ratios = []
    for _ in range(rounds):
        with_them = measure(exchanges)
        with without_metrics():
            ratios.append(with_them / measure(exchanges))
    return median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exchanges", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=64)
    arguments = parser.parse_args()
    with_them, without = [], []
    for _ in range(arguments.rounds):
        with_them.append(microseconds_per_push(arguments.exchanges))
        with without_metrics():
            without.append(microseconds_per_push(arguments.exchanges))
    cost = [a - b for a, b in zip(with_them, without, strict=True)]
    print(f"a push of 4 KB: {median(with_them):.1f} us with metrics, {median(without):.1f} without")  # noqa: T201
    print(f"metrics cost {median(cost):.1f} us a push ({min(cost):.1f} to {max(cost):.1f} in {len(cost)} pairs)")  # noqa: T201
    ratio = in_turns(microseconds_per_round_trip, arguments.exchanges // 5, arguments.rounds)
    print(f"a round trip of 4 KB over gRPC takes {ratio:.3f} times as long as without metrics")  # noqa: T201
    milliseconds, size, per_worker = scrape(arguments.workers)
    what = f"{milliseconds:.1f} ms, {size:,} bytes, {per_worker} series a worker"
    print(f"a scrape with {arguments.workers} workers: {what}")  # noqa: T201


if __name__ == "__main__":
    main()
