"""How fast a run is, by hand."""

import pytest

from console.building import history, status, worker
from ormo_server.console.figures import rates_between


def test_rates_are_what_was_counted_over_the_server_s_own_time() -> None:
    older = status(worker("a", applied=10), worker("b", applied=4), uptime=100.0, applied=14, samples=448)
    newer = status(worker("a", applied=22), worker("b", applied=5), uptime=104.0, applied=27, samples=864)
    rates = rates_between(older, newer)
    assert rates is not None
    assert (rates.gradients, rates.samples, rates.workers) == (13 / 4, 104.0, {"a": 3.0, "b": 0.25})


def test_a_worker_that_came_or_joined_anew_in_between_has_no_rate_yet() -> None:
    older = status(worker("a", applied=10), worker("b", applied=4), uptime=1.0)
    newer = status(worker("a", applied=2), worker("b", applied=5), worker("c", applied=9), uptime=2.0)
    rates = rates_between(older, newer)
    assert rates is not None
    assert rates.workers == {"b": 1.0}


@pytest.mark.parametrize(
    "after",
    [
        status(uptime=0.5, epoch=2, applied=1),
        status(uptime=20.0, epoch=2, applied=1),  # it has been up for longer than the one before was
        status(uptime=10.0, applied=7),  # the same answer again
    ],
)
def test_no_rate_spans_a_restart_of_the_server(after: object) -> None:
    before = status(uptime=10.0, applied=1000, samples=32_000)
    assert rates_between(before, after) is None  # type: ignore[arg-type]
    assert history(before, after).rates is None  # type: ignore[arg-type]


def test_rates_are_back_with_the_second_answer_after_a_restart() -> None:
    before = [status(uptime=float(second), applied=100 * second) for second in range(1, 5)]
    seen = history(*before, status(uptime=0.5, epoch=2, applied=5), status(uptime=1.5, epoch=2, applied=12))
    assert seen.rates is not None
    assert seen.rates.gradients == 7.0


def test_rates_follow_a_change_within_ten_seconds() -> None:
    fast = [status(uptime=float(second), applied=100 * second) for second in range(11)]
    slow = [status(uptime=float(second), applied=1000 + second) for second in range(11, 22)]
    seen = history(*fast)
    assert seen.rates is not None
    assert seen.rates.gradients == 100.0
    for answer in slow:
        seen.add(answer)
    assert seen.rates is not None
    assert seen.rates.gradients == 1.0
