"""The measurement of many workers, on a few: that it works, and counts what it says."""

import os

import pytest

from benchmarks.scale import Report, measured


def test_few_workers_are_measured() -> None:
    report = measured(workers=3, seconds=0.5)
    assert report.workers == 3
    assert report.rate > 0
    assert 0 < report.slowest <= 1
    assert 0 < report.median_seconds <= report.p99_seconds
    assert report.threads > 3
    assert report.megabytes > 50


def test_report_is_of_all_workers_exchanges() -> None:
    report = Report.of([[0.1] * 30, [0.2] * 10], window=2.0, pid=os.getpid())
    assert (report.workers, report.rate) == (2, 20.0)
    assert report.slowest == 0.5
    assert (report.median_seconds, report.p99_seconds) == pytest.approx((0.1, 0.2))
    assert report.line().startswith("| 2 | 20 | 0.50 | 100.0 | 200.0 |")
