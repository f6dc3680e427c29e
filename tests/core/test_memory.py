"""The memory that a run needs, by hand: vectors of 1000 numbers are 4000 bytes."""

import pytest

from core.driving import run_of
from ormo_server.core.memory import need


@pytest.mark.parametrize(
    ("rule", "scheduler", "slots", "vectors"),
    [
        ("sgd", "asynchronous", 1, 1),  # w
        ("ormo", "asynchronous", 1, 2),  # w, u
        ("ormo", "asynchronous", 8, 2),
        ("sgd", "synchronous", 1, 2),  # w, the round's opening
        ("ormo", "synchronous", 3, 3),
    ],
)
def test_need_is_the_state_one_buffer_for_each_slot_and_the_copy_for_the_checkpoint(
    rule: str, scheduler: str, slots: int, vectors: int
) -> None:
    got = need(run_of(rule, scheduler), elements=1000, slots=slots)
    assert (got.state_bytes, got.exchange_bytes, got.checkpoint_bytes) == (4000 * vectors, 4000 * slots, 4000 * vectors)
    assert got.total_bytes == 4000 * (2 * vectors + slots)
