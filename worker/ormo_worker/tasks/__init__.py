"""What a worker trains: a task is a model, its data and its loss, named by an import path."""

import inspect
import math
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ormo_runtime.imports import ImportPathError, imported
from ormo_runtime.settings import UsageError

# Nested tuples, lists and dicts of tensors; only the task that made the data set knows which.
Batch: TypeAlias = Any


class TaskError(UsageError):
    """A task can't be used as asked; the message says what came, what was expected and what to do."""


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
        """The training samples: a map-style data set, of which `batches` makes a stream."""

    @abstractmethod
    def test_set(self) -> Dataset[Any]:
        """The samples to evaluate on: a map-style data set, read by `evaluation_batches`."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar to differentiate, the mean over the batch; model and batch share a device."""

    @abstractmethod
    def score(self, model: nn.Module, batch: Batch) -> Score:
        """Score one batch without gradients; the caller has set the model to evaluation mode."""

    def weight_decay_scale(self, name: str, parameter: nn.Parameter) -> float:  # noqa: ARG002 - for those who override it
        """The factor on the server's weight decay for one parameter, 1 for all by default.

        Override it to spare norms and biases: `return 0.0 if parameter.ndim == 1 else 1.0`.

        Args:
            name: as `named_parameters` gives it.
            parameter: for its shape; values may be those before the first pull.
        """
        return 1.0  # the ResNet paper, and the OrMo paper after it, decays every parameter


class ClassificationTask(Task):
    """Classes by cross entropy: batches are (inputs, int64 labels of shape (N,)), the model gives (N, classes)."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean cross entropy of the batch."""
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


# Import paths and not classes: naming a task must not import what the other tasks need.
BUILT_IN = {
    "digits": "ormo_worker.tasks.digits:Digits",
    "code-lm": "ormo_worker.tasks.code_lm:CodeLm",
    "cifar10": "ormo_worker.tasks.cifar10:Cifar10",
    "image-folder": "ormo_worker.tasks.image_folder:ImageFolder",
    "image-folder-cnn": "ormo_worker.tasks.image_folder:SmallCnnFolder",
}
TASK_METHODS = ("build_model", "train_set", "test_set", "loss", "score", "weight_decay_scale")


def load_task(name: str, data_dir: Path | None = None) -> Task:
    """Make the task that a user named.

    The current directory is importable, as it is for ASGI servers; of a file, its folder is.

    Args:
        name: a key of `BUILT_IN`, "package.module:attribute" or "path/to/file.py:attribute"; the
            attribute is a class or function that takes the keyword `data_dir`.
        data_dir: handed to the task, which knows whether it needs one.

    Returns:
        What the attribute made: a `Task`, or an object with all of its methods.

    Raises:
        TaskError: the name leads to no task, or the task refused its data folder. What a user's own
            module raises otherwise comes through as it is, with its traceback.
    """
    factory = _find_factory(name)
    _check_factory(name, factory)
    task = factory(data_dir=data_dir)
    missing = [method for method in TASK_METHODS if not callable(getattr(task, method, None))]
    if missing:
        raise _incomplete(name, missing)
    return cast(Task, task)


def _find_factory(name: str) -> Any:
    module_name, _, attribute = BUILT_IN.get(name, name).rpartition(":")
    if not module_name or not attribute:
        raise TaskError(
            f"there is no task named {name!r}: use one of {', '.join(BUILT_IN)}, or the import path of "
            "your own, as in 'package.module:MyTask' or 'path/to/file.py:MyTask'"
        )
    try:
        module = imported(f"the task {name!r}", module_name, program="the worker")
    except ImportPathError as error:
        raise TaskError(str(error)) from error
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise TaskError(
            f"the task {name!r} was not found: its module ({module.__file__}) has no {attribute!r}: put "
            "the name of a Task class, or of a function that returns a task, after the colon"
        ) from error


def _check_factory(name: str, factory: Any) -> None:
    if inspect.isabstract(factory):
        raise _incomplete(name, sorted(factory.__abstractmethods__))
    try:
        inspect.signature(factory).bind(data_dir=None)
    except (TypeError, ValueError) as error:  # not callable, or nothing is known of its arguments
        raise TaskError(
            f"the task {name!r} can't be created ({error}): it must be a class or function whose only required "
            "argument is the keyword data_dir, a Path or None"
        ) from error


def _incomplete(name: str, missing: list[str]) -> TaskError:
    return TaskError(
        f"the task {name!r} lacks {', '.join(missing)}: a task is a subclass of ormo_worker.tasks.Task, "
        f"or has the methods {', '.join(TASK_METHODS)}"
    )
