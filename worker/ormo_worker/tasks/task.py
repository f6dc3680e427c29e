"""The contract between a worker and what it trains."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ormo_runtime.settings import UsageError

# Nested tuples, lists and dicts of tensors; only the task that made the data set knows which.
Batch: TypeAlias = Any


class TaskError(UsageError):
    """A task cannot be used as asked; the message says what came, what was expected and what to do."""


@dataclass(frozen=True, slots=True)
class Score:
    """How a model did on some samples; `Score()` is that of none, and scores of batches add up.

    Attributes:
        loss_sum: the sum, not the mean, of the samples' losses.
        correct: samples predicted right; 0 throughout where right and wrong mean nothing.
        samples: how many samples were scored.
    """

    loss_sum: float = 0.0
    correct: int = 0
    samples: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(
            loss_sum=self.loss_sum + other.loss_sum,
            correct=self.correct + other.correct,
            samples=self.samples + other.samples,
        )

    @property
    def mean_loss(self) -> float:
        """Loss per sample; not a number for no samples."""
        return self.loss_sum / self.samples if self.samples else math.nan

    @property
    def accuracy(self) -> float:
        """Share of samples predicted right, from 0 to 1; not a number for no samples."""
        return self.correct / self.samples if self.samples else math.nan


class Task(ABC):
    """A model, its data and its loss: subclass it, or write any class with the same methods.

    A worker makes it as `TheTask(data_dir=...)`, so the constructor has to raise `TaskError` at once
    where data is missing; reading the data can wait for `train_set` and `test_set`.
    """

    def __init__(self, *, data_dir: Path | None = None) -> None:
        self.data_dir = data_dir

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Make the model, on the CPU, with its initial parameters drawn from PyTorch's global generator."""

    @abstractmethod
    def train_set(self) -> Dataset[Any]:
        """Return the training samples: a map-style data set, of which `batches` makes a stream."""

    @abstractmethod
    def test_set(self) -> Dataset[Any]:
        """Return the samples to evaluate on: a map-style data set, read by `evaluation_batches`."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scalar to differentiate, the mean over the batch; model and batch share a device."""

    @abstractmethod
    def score(self, model: nn.Module, batch: Batch) -> Score:
        """Score one batch without gradients; the caller has set the model to evaluation mode."""

    def weight_decay_scale(self, name: str, parameter: nn.Parameter) -> float:  # noqa: ARG002
        """Return the factor on the server's weight decay for one parameter, 1 for all by default.

        Override it to spare norms and biases: `return 0.0 if parameter.ndim == 1 else 1.0`.

        Args:
            name: as `named_parameters` gives it.
            parameter: for its shape; values may be those before the first pull.
        """
        return 1.0  # the ResNet paper, and the OrMo paper after it, decays every parameter


class ClassificationTask(Task):
    """Classes by cross entropy: batches are (inputs, int64 labels of shape (N,)), the model gives (N, classes)."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross entropy of the batch."""
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels)

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch) -> Score:
        """Sum the cross entropy and count the samples whose largest output is their label's."""
        inputs, labels = batch
        logits = model(inputs)
        return Score(
            loss_sum=F.cross_entropy(logits, labels, reduction="sum").item(),
            correct=int((logits.argmax(dim=1) == labels).sum().item()),
            samples=len(labels),
        )
