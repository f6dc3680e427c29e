"""What the simulator itself costs per push: everything but computing gradients and evaluations.

    python tests/benchmarks/sim_overhead.py [--profile]

The workload gives the same gradient every time, so nearly all of the time measured is the simulator's and the core's.
"""

import argparse
import cProfile
import pstats
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from ormo_server.core.method import PRESETS
from ormo_server.sim.config import SimSettings
from ormo_server.sim.run import Plan
from ormo_server.sim.workload import Computed, Model, Scores

NOTHING = torch.zeros(0)
NO_INTS = torch.zeros(0, dtype=torch.int64)


class ConstantGradient:
    """A workload that computes nothing."""

    epoch_samples = 1_000_000
    batch_samples = 1

    def __init__(self, elements: int) -> None:
        self.elements = elements

    def initial(self, seed: int) -> Model:
        return Model(torch.zeros(self.elements), NOTHING, NO_INTS)

    def start_worker(self, data_seed: int, model: Model) -> "ConstantGradient":
        return self

    def gradient(self, ticket: int, params: torch.Tensor, out: torch.Tensor) -> Computed:
        out.fill_(1e-9)
        return Computed(1, 0.0, NOTHING, NO_INTS)

    def evaluate(self, model: Model) -> Scores:
        return Scores(0.0, 0.0, 0.0)


def small(**_: object) -> ConstantGradient:
    """10,000 parameters, as many as the digits task has."""
    return ConstantGradient(10_000)


def simulate(method: str, workers: int, gradients: int) -> dict[str, float]:
    settings = SimSettings(
        method=method,
        workers=workers,
        slow=f"{max(1, workers // 16)}:10x",
        stop_after_gradients=gradients,
        evaluate_every=gradients,
        workload="benchmarks.sim_overhead:small",
    )
    plan = Plan(settings)
    import time

    started = time.perf_counter()
    result = plan.run()
    seconds = time.perf_counter() - started - result.record.compute_seconds
    return {"microseconds": 1e6 * seconds / gradients, "delay_mean": result.summary["delay"]["mean"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gradients", type=int, default=20_000)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.profile:
        with cProfile.Profile() as profile:
            simulate("ormo", 64, arguments.gradients)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    for workers in (16, 64, 1000):
        for method in PRESETS:
            found = simulate(method, workers, arguments.gradients)
            sys.stdout.write(f"K = {workers:4d}  {method:13s} {found['microseconds']:6.1f} us per push\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
