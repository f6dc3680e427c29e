"""What `--in-flight 2`, and bfloat16 and int8 on the wire, gain on a link that is slower than memory.

    python tests/benchmarks/links.py [--pairs N] [--steps N] [--parameters N]

Server and link are processes of their own. Each comparison is made in turns (A B A B ...), each turn with a worker that
has just joined and taken two steps, and its figure is the ratio within a pair: median, smallest and largest. Computing
a gradient is sleeping, as it is for the processor while a GPU computes.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from benchmarks.links_proxy import linked
from ormo_worker import RemoteOptimizer
from system.programs import staged

_WARM_UP_STEPS = 2
_GIGABIT = 1000.0


class Flat(nn.Module):
    """A model of so many parameters, with a gradient that is there already."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(parameters))
        self.weight.grad = torch.full((parameters,), 1e-9)


@dataclass(frozen=True)
class Compared:
    """What pairs of measurements found.

    Attributes:
        seconds: a step's, median for each of the two.
        ratios: how many times as fast the second was, for each pair.
    """

    seconds: tuple[float, float]
    ratios: tuple[float, ...]

    def __str__(self) -> str:
        slow, fast = (1000 * each for each in self.seconds)
        low, high = min(self.ratios), max(self.ratios)
        return (
            f"{median(self.ratios):.2f} times as fast ({low:.2f} to {high:.2f}, {len(self.ratios)} pairs); "
            f"a step takes {slow:.0f} ms and {fast:.0f} ms"
        )


def in_turns(first: Callable[[], float], second: Callable[[], float], pairs: int) -> Compared:
    """Measure both, one after the other."""
    found = [(first(), second()) for _ in range(pairs)]
    seconds = (median(one for one, _ in found), median(other for _, other in found))
    return Compared(seconds, tuple(one / other for one, other in found))


def seconds_per_step(
    address: str, parameters: int, steps: int, compute_seconds: float = 0.0, *, local: bool = False, **options: Any
) -> float:
    """Of a worker that has just joined; with an optimizer of its own, if it is local."""
    model = Flat(parameters)
    inner = torch.optim.SGD(model.parameters(), lr=1e-3) if local else None
    with RemoteOptimizer(model, address, inner=inner, **options) as optimizer:
        for _ in range(_WARM_UP_STEPS):
            optimizer.step()
        started = time.perf_counter()
        for _ in range(steps):
            time.sleep(compute_seconds)
            optimizer.step()
        return (time.perf_counter() - started) / steps


def in_flight(
    parameters: int,
    compute_seconds: float,
    *,
    round_trip_ms: float,
    pairs: int,
    steps: int,
    megabits_per_second: float = _GIGABIT,
) -> Compared:
    """Two gradients in flight against one."""
    with tempfile.TemporaryDirectory() as folder, staged(Path(folder)) as stage:
        stage.server()
        with linked(stage.address, megabits_per_second=megabits_per_second, round_trip_ms=round_trip_ms) as address:

            def measured(number: int) -> float:
                return seconds_per_step(address, parameters, steps, compute_seconds, in_flight=number)

            return in_turns(lambda: measured(1), lambda: measured(2), pairs)


def on_the_wire(
    dtype: torch.dtype, parameters: int, *, pairs: int, steps: int, megabits_per_second: float = _GIGABIT
) -> Compared:
    """This dtype against float32, with nothing to compute; int8 with local steps, one in each push."""
    local = dtype == torch.int8
    with tempfile.TemporaryDirectory() as folder, staged(Path(folder)) as stage:
        stage.server(local_steps=int(local))
        with linked(stage.address, megabits_per_second=megabits_per_second) as address:

            def measured(dtype: torch.dtype) -> float:
                return seconds_per_step(address, parameters, steps, wire_dtype=dtype, local=local)

            return in_turns(lambda: measured(torch.float32), lambda: measured(dtype), pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--parameters", type=int, default=11_250_000)
    arguments = parser.parse_args()
    pairs, steps, large = arguments.pairs, arguments.steps, arguments.parameters
    torch.set_num_threads(1)
    for parameters, compute_ms in ((1_000_000, 50), (1_000_000, 100), (1_000_000, 200), (large, 1000)):
        found = in_flight(
            parameters,
            compute_ms / 1000,
            round_trip_ms=20.0,
            pairs=pairs,
            steps=steps if parameters < large else max(1, steps // 4),
        )
        what = f"{4e-6 * parameters:.0f} MB, computing {compute_ms} ms, 20 ms there and back, 1 Gbit/s"
        say(f"--in-flight 2 against 1, {what}: {found}")
    for name, dtype in (("bfloat16", torch.bfloat16), ("int8", torch.int8)):
        found = on_the_wire(dtype, large, pairs=pairs, steps=max(1, steps // 2))
        say(f"{name} against float32, {4e-6 * large:.0f} MB in float32, 1 Gbit/s: {found}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
