"""The histograms of the hot path count as those of the library do, and lose nothing."""

import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from ormo_server.metrics.families import _MOST_NOTED, Distribution, Distributions

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
            mine.of[side].observe(number)
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


def test_what_waits_to_be_sorted_is_bounded() -> None:
    distribution = Distribution(BOUNDS)
    for number in range(10 * _MOST_NOTED):
        distribution.observe(number % 2)
        assert len(distribution._noted) < _MOST_NOTED
    assert distribution.totals() == ([5120, 5120, 10240, 10240, 10240, 10240], 5120.0)


def test_nothing_is_lost_or_doubled_when_many_observe_and_scrape_at_once() -> None:
    distribution, often = Distribution(BOUNDS), 20_000

    def observe() -> None:
        for _ in range(often):
            distribution.observe(1)

    switches = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=observe) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            distribution.totals()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switches)
    assert distribution.totals() == ([0, 0, 4 * often, 4 * often, 4 * often, 4 * often], 4.0 * often)
