"""A task whose every gradient can be computed again: worker k always has the k-th batch of its own, by its id."""

import os

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ormo_worker.tasks import Batch, Score, Task

WORKERS = 3


class Model(nn.Module):
    """Tied weights, a norm layer with buffers, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.decode = nn.Linear(6, 6, bias=False)
        self.decode.weight = self.encode.weight
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.decode(torch.tanh(self.norm(self.encode(inputs)))) * self.frozen


def model() -> Model:
    torch.manual_seed(7)
    return Model()


def batch_of(worker: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(worker))
    return inputs, inputs.flip(1)


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


class Linear(Task):
    """Each worker has one batch, chosen by the number that the environment gives it."""

    def build_model(self) -> nn.Module:
        return model()

    def train_set(self) -> TensorDataset:
        return TensorDataset(*batch_of(int(os.environ["BATCH_OF"])))

    def test_set(self) -> TensorDataset:
        return TensorDataset(*batch_of(0))

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return loss(model, batch)

    def score(self, model: nn.Module, batch: Batch) -> Score:
        return Score(float(self.loss(model, batch)) * len(batch[0]), 0, len(batch[0]))
