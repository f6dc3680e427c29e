"""A task for tests: y = 3 x, to be learnt by a line."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ormo_worker.tasks import Score, Task, TaskError
from worker.models import line


class Lines(Task):
    """Eight points to train and three to test; a data folder that does not exist is refused."""

    def __init__(self, *, data_dir: Path | None = None) -> None:
        if data_dir is not None and not data_dir.is_dir():
            raise TaskError(f"The data folder {data_dir} does not exist: correct --data-dir.")
        super().__init__(data_dir=data_dir)

    def build_model(self) -> nn.Module:
        return nn.Sequential(line(), nn.Identity())

    def train_set(self) -> Dataset[Any]:
        inputs = torch.linspace(-1.0, 1.0, 8).unsqueeze(1)
        return TensorDataset(inputs, 3.0 * inputs)

    def test_set(self) -> Dataset[Any]:
        inputs = torch.tensor([[1.0], [2.0], [3.0]])
        return TensorDataset(inputs, 3.0 * inputs)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return (model(inputs) - targets).square().mean()

    def score(self, model: nn.Module, batch: Any) -> Score:
        inputs, targets = batch
        errors = (model(inputs) - targets).square()
        return Score(loss_sum=errors.sum().item(), correct=int((errors < 0.01).sum()), samples=len(inputs))

    def weight_decay_scale(self, name: str, parameter: nn.Parameter) -> float:
        return 0.25


class NoData(Lines):
    def train_set(self) -> Dataset[Any]:
        return TensorDataset(torch.empty(0, 1))
