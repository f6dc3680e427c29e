"""The benchmark of metrics measures what it says: with them everything is counted, without them nothing."""

import re
from pathlib import Path

from prometheus_client import generate_latest

from benchmarks.metrics_cost import MODEL, in_turns, microseconds_per_push, microseconds_per_round_trip, without_metrics
from service.wire import WireWorker, connected, payload, served


def applied(folder: Path) -> set[str]:
    with served(folder) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", MODEL)
        worker.join()
        worker.pull()
        worker.push(payload(MODEL, 1.0))
        lines = generate_latest(server.metrics.registry).decode().splitlines()
    counted = ('ormo_pushes_total{outcome="applied"', "ormo_gradient_norm_count", "ormo_lock_wait_seconds_count")
    moved = [line for line in lines if line.startswith(counted) and not line.endswith(" 0.0")]
    return {re.split(r"[{ ]", line)[0] for line in moved}


def test_nothing_is_counted_without_metrics_and_everything_afterwards(tmp_path: Path) -> None:
    with without_metrics():
        assert applied(tmp_path / "without") == set()
    assert len(applied(tmp_path / "with")) == 3


def test_each_way_of_measuring_gives_a_time() -> None:
    assert microseconds_per_push(50) > 1
    assert in_turns(microseconds_per_round_trip, 20, 1) > 0
