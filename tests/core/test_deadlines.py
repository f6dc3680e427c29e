"""Silence and slow tickets, found by a clock that is an argument; what to do about them is the driver's."""

import pytest

from core.driving import driver_of, fingerprint, run_of
from ormo_server.core.deadlines import Leases, TicketTimeout


def test_a_lease_lapses_after_more_than_its_seconds_of_silence() -> None:
    leases = Leases(lease_seconds=10.0)
    leases.grant("a", 0.0)
    leases.grant("b", 5.0)
    assert {now: leases.expired(now) for now in (10.0, 10.5, 15.0, 15.5)} == {
        10.0: [],
        10.5: ["a"],
        15.0: ["a"],
        15.5: ["a", "b"],
    }


def test_a_heartbeat_renews_a_lease() -> None:
    leases = Leases(lease_seconds=10.0)
    leases.grant("a", 0.0)
    leases.renew("a", 8.0)
    assert (leases.expired(18.0), leases.expired(18.5)) == ([], ["a"])


def test_a_forgotten_worker_has_no_lease() -> None:
    leases = Leases(lease_seconds=1.0)
    leases.grant("a", 0.0)
    leases.forget("a")
    leases.forget("nobody")
    assert leases.expired(99.0) == []


def test_a_late_word_of_somebody_without_a_lease_does_not_give_it_one() -> None:
    leases = Leases(lease_seconds=1.0)
    leases.grant("a", 0.0)
    leases.forget("a")
    leases.renew("a", 1.0)
    leases.renew("nobody", 1.0)
    assert leases.expired(99.0) == []


def test_silence_is_measured_from_the_last_word_and_unknown_workers_are_not_silent() -> None:
    leases = Leases(lease_seconds=1.0)
    leases.grant("a", 2.0)
    assert (leases.silent_seconds("a", 5.5), leases.silent_seconds("nobody", 5.5)) == (3.5, 0.0)


@pytest.mark.parametrize(
    ("seconds", "automatic", "taken", "limit"),
    [
        (None, False, [], None),
        (None, False, [1.0], None),
        (30.0, False, [], 30.0),
        (30.0, True, [100.0], 30.0),  # a number that was set wins
        (None, True, [], 600.0),  # nothing to go by yet
        (None, True, [1.0], 60.0),  # 20 times 1 s is less than a minute
        (None, True, [3.0], 60.0),
        (None, True, [5.0], 100.0),
        (None, True, [1.0, 10.0, 1000.0], 200.0),  # the median: one slow machine does not count
        (None, True, [1.0] * 300 + [10.0] * 256, 200.0),  # only the last 256
    ],
)
def test_the_limit_is_the_one_set_or_twenty_medians_and_at_least_a_minute(
    seconds: float | None, automatic: bool, taken: list[float], limit: float | None
) -> None:
    timeout = TicketTimeout(seconds, automatic=automatic)
    for each in taken:
        timeout.redeemed(each)
    assert timeout.limit_seconds() == limit


def test_tickets_out_for_longer_than_the_limit_are_overdue_and_stay_in_flight() -> None:
    driver = driver_of(run_of(), "a", "b")
    driver.request("a")
    driver.request("b")
    first, second = (granted.ticket for granted in driver.granted)
    start, state, timeout = first.handed_out_seconds, driver.machine.state, TicketTimeout(10.0, automatic=False)
    before = fingerprint(driver.machine)
    assert second.handed_out_seconds == start + 1
    assert [timeout.overdue(state, start + seconds) for seconds in (10.0, 11.0, 11.5)] == [[], [first], [first, second]]
    assert fingerprint(driver.machine) == before


def test_without_a_limit_nothing_is_overdue() -> None:
    driver = driver_of(run_of(), "a")
    driver.request("a")
    assert TicketTimeout(None, automatic=False).overdue(driver.machine.state, 1e9) == []


def test_before_the_first_push_every_lapse_doubles_the_automatic_limit_and_none_after_it() -> None:
    timeout = TicketTimeout(None, automatic=True)
    timeout.lapsed()
    assert timeout.limit_seconds() == 1200.0
    timeout.lapsed()
    assert timeout.limit_seconds() == 2400.0
    timeout.redeemed(1000.0)
    timeout.lapsed()
    assert timeout.limit_seconds() == 20_000.0


def test_a_lapse_leaves_a_limit_that_was_set_as_it_is() -> None:
    timeout = TicketTimeout(5.0, automatic=True)
    timeout.lapsed()
    assert timeout.limit_seconds() == 5.0
