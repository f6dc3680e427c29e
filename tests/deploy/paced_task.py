"""A task whose gradients take a known time, and one whose gradients are not finite."""

import math
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ormo_worker.tasks import Batch, Score, Task

GRADIENT_SECONDS = 0.02


class Paced(Task):
    """y = x, learnt by one layer."""

    def build_model(self) -> nn.Module:
        return nn.Linear(8, 8)

    def train_set(self) -> TensorDataset:
        inputs = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
        return TensorDataset(inputs, inputs)

    test_set = train_set

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        time.sleep(GRADIENT_SECONDS)
        inputs, targets = batch
        return nn.functional.mse_loss(model(inputs), targets)

    def score(self, model: nn.Module, batch: Batch) -> Score:
        inputs, targets = batch
        found = model(inputs)
        near = (found - targets).abs().amax(dim=1) < 0.1
        return Score(len(inputs) * float(nn.functional.mse_loss(found, targets)), int(near.sum()), len(inputs))


class Spoiled(Paced):
    """A worker whose device computes nothing but NaN."""

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return super().loss(model, batch) * math.nan
