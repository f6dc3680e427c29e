"""The metrics of the hot path count as those of the library do, and lose nothing."""

import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from ormo_server.metrics import Metrics
from ormo_server.metrics.noted import Distribution, Distributions, Noted, Tally
from service.wire import SMALL, WireWorker, connected, eventually, payload, served

BOUNDS = (0, 0.5, 1, 2.5, 10)
values = st.one_of(st.sampled_from(BOUNDS), st.floats(-1, 20), st.just(float("inf")))


@given(st.lists(values, max_size=50), st.lists(values, max_size=50))
def test_exposition_is_that_of_the_library(first: list[float], second: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Distributions("h", "Some.", BOUNDS, ours, "side", ["left", "right"])
    library = Histogram("h", "Some.", ["side"], buckets=BOUNDS, registry=theirs)
    for side, numbers in (("left", first), ("right", second)):
        library.labels(side)
        for number in numbers:
            mine.of[side].note(number)
            library.labels(side).observe(number)
    assert counts(generate_latest(ours)) == pytest.approx(counts(generate_latest(theirs)), nan_ok=True)


def counts(page: bytes) -> dict[str, float]:
    lines = [line for line in page.decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_without_a_label_there_is_one_series_from_the_start() -> None:
    registry = CollectorRegistry()
    Distributions("h_seconds", "Some.", (1.0,), registry)
    assert counts(generate_latest(registry)) == {
        'h_seconds_bucket{le="1.0"}': 0,
        'h_seconds_bucket{le="+Inf"}': 0,
        "h_seconds_count": 0,
        "h_seconds_sum": 0,
    }


def test_a_scrape_has_all_that_was_noted_whatever_the_order_of_the_metrics() -> None:
    metrics = Metrics()
    metrics.traffic.applied.note(1)
    metrics.traffic.received_bytes["PushPull"].note(4096)
    metrics.traffic.stage["apply"].note(0.25)
    page = counts(generate_latest(metrics.registry))
    assert page['ormo_pushes_total{outcome="applied",reason=""}'] == 1
    assert page['ormo_received_bytes_total{method="PushPull"}'] == 4096
    assert page['ormo_exchange_stage_seconds_sum{stage="apply"}'] == 0.25


def test_what_waits_to_be_counted_is_bounded_though_nobody_scrapes(tmp_path: Path) -> None:
    with served(tmp_path, failure_timeout_seconds=1.0) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", SMALL)
        worker.join()
        worker.pull()
        worker.push(payload(SMALL, 1e-6))
        traffic = server.metrics.traffic
        eventually(lambda: not (traffic.received_bytes["PushGradient"]._values or traffic.stage["receive"]._values))
        assert traffic.pulls.labels("ticket", "")._value.get() == 1


@pytest.mark.parametrize("noted", [Distribution(BOUNDS), Tally(Counter("c", "Some.", registry=None))])
def test_nothing_is_lost_or_doubled_when_many_note_and_scrape_at_once(noted: Noted) -> None:
    often = 20_000

    def note() -> None:
        for _ in range(often):
            noted.note(1)

    switches = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=note) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            noted.settle()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switches)
    total = 4.0 * often
    if isinstance(noted, Tally):
        assert noted.total() == total
    else:
        assert isinstance(noted, Distribution)
        assert noted.totals() == ([0, 0, total, total, total, total], total)
