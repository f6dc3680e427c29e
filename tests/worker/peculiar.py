"""Tasks for tests, each with one peculiarity of real ones."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ormo_worker.tasks import Score
from worker.lines import Lines
from worker.models import Tied


class Peculiar(Lines):
    """Tied weights, a frozen layer, batch norm, buffers of every kind; double decay, but none for norms and biases."""

    def build_model(self) -> nn.Module:
        return Tied()

    def train_set(self) -> Dataset[Any]:
        return points(20, seed=1)

    def test_set(self) -> Dataset[Any]:
        return points(10, seed=2)

    def weight_decay_scale(self, name: str, parameter: nn.Parameter) -> float:
        return 0.0 if parameter.ndim == 1 else 2.0


class Unused(Peculiar):
    """A layer that the loss does not depend on."""

    def build_model(self) -> nn.Module:
        return LastOnly(nn.Linear(3, 4), nn.Linear(3, 4))


class LastOnly(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        return self[-1](inputs)


class BFloat16(Peculiar):
    """Parameters in bfloat16."""

    def build_model(self) -> nn.Module:
        return nn.Linear(3, 4).to(torch.bfloat16)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return super().loss(model, (inputs.to(torch.bfloat16), targets))


class Random(Peculiar):
    """Draws from the global generator: for the model's parameters, in each item, and in each forward pass."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.BatchNorm1d(8), nn.Linear(8, 4))

    def train_set(self) -> Dataset[Any]:
        return Noisy(*points(20, seed=1).tensors)


class Noisy(TensorDataset):
    """Items with noise."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        inputs, targets = super().__getitem__(index)
        return inputs + 0.1 * torch.randn(3), targets


class Augmenting(Peculiar):
    """Moves the samples far away for training."""

    def train_set(self) -> Dataset[Any]:
        return Moved(*points(20, seed=1).tensors)


class Moved(TensorDataset):
    def augment(self, batch: Any, generator: torch.Generator) -> Any:
        inputs, targets = batch
        return inputs, targets + 100.0


class Changing(Peculiar):
    """Changes the batch that it scores."""

    def score(self, model: nn.Module, batch: Any) -> Score:
        inputs, _ = batch
        inputs.mul_(2.0)
        return super().score(model, batch)


class Double(Peculiar):
    """A model that no server takes."""

    def build_model(self) -> nn.Module:
        return nn.Linear(3, 4).double()


class NegativeDecay(Peculiar):
    """A scale that no optimizer takes."""

    def weight_decay_scale(self, name: str, parameter: nn.Parameter) -> float:
        return -1.0


class NothingToTest(Peculiar):
    """No samples to test on."""

    def test_set(self) -> Dataset[Any]:
        return TensorDataset(torch.empty(0, 3), torch.empty(0, 4))


def points(number: int, seed: int) -> TensorDataset:
    """Inputs of shape (number, 3) and targets of shape (number, 4)."""
    random = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(number, 3, generator=random), torch.randn(number, 4, generator=random))
