"""What follows from the failure timeout keeps its order, whatever the number."""

import pytest

from ormo_runtime.timeouts import DESCRIPTIONS, FailureDetection


@pytest.mark.parametrize("seconds", [0.2, 1.0, 5.0, 15.0, 30.0, 600.0])
def test_signs_of_life_come_several_times_within_what_they_keep(seconds: float) -> None:
    failures = FailureDetection(seconds)
    assert failures.heartbeat_seconds * 3 <= failures.lease_seconds == seconds
    assert failures.check_seconds <= min(1.0, seconds / 4)
    assert failures.ping_seconds <= min(10.0, seconds)
    assert failures.ping_timeout_seconds >= seconds
    assert 0 < failures.shortest_pause_seconds <= failures.longest_pause_seconds <= min(1.0, seconds / 4)


def test_a_server_that_is_back_is_found_within_a_second_or_two_however_long_the_timeout() -> None:
    assert FailureDetection(3600.0).longest_pause_seconds == 1.0


def test_each_value_is_described() -> None:
    shown = {name for name, value in vars(FailureDetection).items() if isinstance(value, property)}
    assert shown - set(DESCRIPTIONS) == {"shortest_pause_seconds"}
