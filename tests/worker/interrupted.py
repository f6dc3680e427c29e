"""Tasks whose workers, each a thread of this process, lose something on the way."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from worker.lines import Lines
from worker.peculiar import Peculiar


class Interrupted(Peculiar):
    """Batch norm and buffers of every kind, which a worker keeps for itself until it joins again."""

    on_gradient: Callable[[], None] = staticmethod(lambda: None)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.on_gradient()
        return super().loss(model, batch)


class Holed(Lines):
    """One of eight points is none, so that one of two batches of four gives no number."""

    def train_set(self) -> Dataset[Any]:
        inputs = torch.linspace(-1.0, 1.0, 8).unsqueeze(1)
        inputs[2] = float("nan")
        return TensorDataset(inputs, 3.0 * inputs)
