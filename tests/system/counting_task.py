"""A task that tells when a worker has computed its tenth gradient: before that nothing is known of it from outside."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ormo_worker.tasks import Batch, Score, Task

COMPUTED = 10
TOLD = Path("computed")


class Counting(Task):
    """One weight, whose gradient is 1."""

    def build_model(self) -> nn.Module:
        return nn.Linear(1, 1, bias=False)

    def train_set(self) -> TensorDataset:
        self.computed = 0
        return TensorDataset(torch.ones(4, 1))

    def test_set(self) -> TensorDataset:
        return TensorDataset(torch.ones(4, 1))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        self.computed += 1
        if self.computed == COMPUTED + 1:  # the tenth has become a step
            TOLD.touch()
        return model(batch[0]).mean()

    def score(self, model: nn.Module, batch: Batch) -> Score:
        return Score(float(self.loss(model, batch)) * len(batch[0]), 0, len(batch[0]))
