"""Numbers and texts as people read them."""

import pytest

from ormo_server.console.figures import duration, memory, phase_word, rate, shortened


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-0.1, "0.0 s"),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10.0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (266_400, "3 d 2 h"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (273_400_000, "273 MB"), (1.5e9, "1.5 GB"), (4e15, "4000 TB")]
)
def test_memory_has_three_digits(size: float, text: str) -> None:
    assert memory(size) == text


@pytest.mark.parametrize(
    ("per_second", "text"), [(None, "–"), (0.0, "0"), (0.25, "0.25"), (33.33, "33.3"), (6784, "6,784")]
)
def test_rates_have_three_digits(per_second: float | None, text: str) -> None:
    assert rate(per_second) == text


def test_a_long_id_keeps_both_ends() -> None:
    assert shortened("gpu-node-7-of-the-basement-1042-ab12cd", 21) == "gpu-node-7…042-ab12cd"
    assert len(shortened("x" * 128, 28)) == 28
    assert shortened("worker-1", 28) == "worker-1"


def test_a_phase_that_only_a_newer_server_knows_has_a_word() -> None:
    assert phase_word(1) == "waiting_for_model"
    assert phase_word(3) == "training"
    assert phase_word(99) == "phase_99"
