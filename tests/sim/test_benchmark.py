"""The benchmark of the simulator runs, for every scheduler."""

import pytest

from benchmarks.sim_overhead import microseconds_per_push


@pytest.mark.parametrize("method", ["ormo", "ssgdm", "ringmaster"])
def test_a_push_costs_something(method: str) -> None:
    assert microseconds_per_push(method, workers=4, gradients=40) > 1
