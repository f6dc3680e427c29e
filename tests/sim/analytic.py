"""A workload that a reader can check by hand: least squares on a few points, 30 µs a gradient, no files."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ormo_runtime.settings import UsageError
from ormo_runtime.workload import Computed, Model, Scores

FEATURES = 8
TRAIN_SAMPLES = 256
TEST_SAMPLES = 128
ENDLESS = "TEST_ENDLESS"
BROKEN_SEED = 13
_DATA_SEED = 2024
_NOISE = 0.3
_NOTHING = torch.empty(0)
_NO_COUNTS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Points:
    """Inputs, shape (n, FEATURES), and targets, shape (n,)."""

    inputs: torch.Tensor
    targets: torch.Tensor


class LeastSquares:
    """Loss: mean of (x·w - y)²/2. Accuracy: the share of test points on the right side of 0.

    The gradient is a function of the worker's data seed, the ticket's number and the parameters, and of nothing else.
    """

    def __init__(self, *, batch_size: int = 4, weight_decay: float = 0.0, **unused: object) -> None:
        random = torch.Generator().manual_seed(_DATA_SEED)
        self.solution = torch.randn(FEATURES, generator=random)
        self.train = _points(TRAIN_SAMPLES, self.solution, random)
        self.test = _points(TEST_SAMPLES, self.solution, random)
        self.epoch_samples = TRAIN_SAMPLES
        self.batch_samples = batch_size
        self.weight_decay = weight_decay

    def initial(self, seed: int) -> Model:
        params = torch.randn(FEATURES, generator=torch.Generator().manual_seed(seed))
        return Model(params, _NOTHING, _NO_COUNTS)

    def start_worker(self, data_seed: int, model: Model) -> "Worker":
        return Worker(self, data_seed)

    def evaluate(self, model: Model) -> Scores:
        predicted = self.test.inputs @ model.params
        right = (predicted > 0) == (self.test.targets > 0)
        train_loss, test_loss = loss(self.train, model.params), loss(self.test, model.params)
        return Scores(train_loss, test_loss, right.float().mean().item())


class Worker:
    """Draws each mini-batch anew."""

    def __init__(self, workload: LeastSquares, data_seed: int) -> None:
        self._workload = workload
        self._data_seed = data_seed

    def gradient(self, ticket: int, params: torch.Tensor, out: torch.Tensor) -> Computed:
        workload = self._workload
        random = torch.Generator().manual_seed((self._data_seed * 1_000_003 + ticket) % 2**63)
        rows = torch.randint(TRAIN_SAMPLES, (workload.batch_samples,), generator=random)
        batch = Points(workload.train.inputs[rows], workload.train.targets[rows])
        errors = batch.inputs @ params - batch.targets
        torch.mv(batch.inputs.T, errors / len(rows), out=out)
        out.add_(params, alpha=workload.weight_decay)
        return Computed(len(rows), errors.square().mean().item() / 2, _NOTHING, _NO_COUNTS)


class LocalWorker(Worker):
    """Makes its local steps by plain gradient descent; each with the batch that the ticket's first one has."""

    def local_steps(
        self, ticket: int, params: torch.Tensor, out: torch.Tensor, *, steps: int, progress: float
    ) -> Computed:
        local, gradient, done = params.clone(), torch.empty_like(params), None
        for _ in range(steps):
            done = self.gradient(ticket, local, gradient)
            local -= 0.05 * gradient
        assert done is not None
        torch.sub(params, local, out=out)
        return Computed(steps * done.samples, done.loss, _NOTHING, _NO_COUNTS)


class Local(LeastSquares):
    """Its workers can make local steps, too."""

    def start_worker(self, data_seed: int, model: Model) -> LocalWorker:
        return LocalWorker(self, data_seed)


class Endless(LeastSquares):
    """Where `ENDLESS` is in the environment, it comes to an end from seed 0 alone: else it waits to be interrupted."""

    def initial(self, seed: int) -> Model:
        if seed and ENDLESS in os.environ:
            time.sleep(3600)
        return super().initial(seed)


class Broken(LeastSquares):
    """Can't start from `BROKEN_SEED`."""

    def initial(self, seed: int) -> Model:
        if seed == BROKEN_SEED:
            raise UsageError(f"seed {seed} does not work here")
        return super().initial(seed)


class Deadly(LeastSquares):
    """Ends its process if it has to start from `BROKEN_SEED`."""

    def initial(self, seed: int) -> Model:
        if seed == BROKEN_SEED:
            os._exit(9)
        return super().initial(seed)


class FromFile(LeastSquares):
    """Needs a file in its data folder."""

    def __init__(self, *, data_dir: Path | None, **settings: object) -> None:
        if data_dir is None or not (data_dir / "points").exists():
            raise UsageError(f"no points in {data_dir}: give the folder with --data-dir")
        super().__init__(batch_size=4)


def loss(points: Points, params: torch.Tensor) -> float:
    """Mean of (x·w - y)²/2."""
    return (points.inputs @ params - points.targets).square().mean().item() / 2


def _points(number: int, solution: torch.Tensor, random: torch.Generator) -> Points:
    inputs = torch.randn(number, FEATURES, generator=random)
    return Points(inputs, inputs @ solution + _NOISE * torch.randn(number, generator=random))
