"""What the simulator itself costs per push: everything but computing gradients and evaluations.

    python tests/benchmarks/sim_overhead.py [--gradients N] [--profile]

The workload gives the same gradient every time, so nearly all of the time measured is the simulator's and the core's.
The time is the process's own on the processor: a shared machine's other work is not in it, but for the caches.
"""

import argparse
import cProfile
import pstats
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from ormo_runtime.workload import Computed, Model, Scores
from ormo_server.core.method import PRESETS
from ormo_server.sim.plan import Plan
from ormo_server.sim.settings import SimSettings

NO_FLOATS, NO_INTS = torch.zeros(0), torch.zeros(0, dtype=torch.int64)


class ConstantGradient:
    """A workload that computes nothing."""

    epoch_samples = 1_000_000
    batch_samples = 1

    def __init__(self, elements: int) -> None:
        self.elements = elements

    def initial(self, seed: int) -> Model:
        return Model(torch.zeros(self.elements), NO_FLOATS, NO_INTS)

    def start_worker(self, data_seed: int, model: Model) -> "ConstantGradient":
        return self

    def gradient(self, ticket: int, params: torch.Tensor, out: torch.Tensor) -> Computed:
        out.fill_(1e-9)
        return Computed(1, 0.0, NO_FLOATS, NO_INTS)

    def evaluate(self, model: Model) -> Scores:
        return Scores(0.0, 0.0, 0.0)


def small(**_: object) -> ConstantGradient:
    """10,000 parameters, as many as the digits task has."""
    return ConstantGradient(10_000)


def microseconds_per_push(method: str, workers: int, gradients: int) -> float:
    """Of processor time, one worker in 16 being ten times slower."""
    settings = SimSettings(
        method=method,
        workers=workers,
        slow=f"{max(1, workers // 16)}:10x",
        stop_after_gradients=gradients,
        evaluate_every_gradients=gradients,
        workload="benchmarks.sim_overhead:small",
    )
    plan = Plan(settings)
    started = time.process_time()
    result = plan.run()
    seconds = time.process_time() - started
    pushes = result.record.delays.total() + result.record.discarded
    return 1e6 * seconds / pushes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gradients", type=int, default=5_000)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.profile:
        with cProfile.Profile() as profile:
            microseconds_per_push("ormo", 64, arguments.gradients)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    for workers in (16, 64, 1000):
        for method in PRESETS:
            found = median(microseconds_per_push(method, workers, arguments.gradients) for _ in range(3))
            sys.stdout.write(f"K = {workers:4d}  {method:13s} {found:6.1f} us per push\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
