"""What simulated workers compute: the contract, and how an implementation is found.

Gradients are real, only time is virtual. The server's package knows no task, so whatever computes gradients is named by
an import path, as ASGI servers name applications. The worker's package has the one that runs any of its tasks.
"""

import importlib
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, cast

import torch

from ormo_runtime.settings import UsageError
from ormo_runtime.workload import Computed, Model, Scores

__all__ = [
    "TASKS_OF_THE_WORKER",
    "Computed",
    "Model",
    "Scores",
    "SimulatedWorker",
    "Workload",
    "WorkloadSettings",
    "load_workload",
]

TASKS_OF_THE_WORKER = "ormo_worker.simulated:TaskWorkload"


class SimulatedWorker(Protocol):
    """One worker: its order of the data and its own buffers."""

    def gradient(self, ticket: int, params: torch.Tensor, out: torch.Tensor) -> Computed:
        """Compute the gradient of the worker's next mini-batch.

        Args:
            ticket: number of the ticket that it is for.
            params: where to compute it, shape (d,), float32; read only.
            out: for the gradient, mean over the mini-batch, weight decay added; shape (d,), float32; overwritten.
        """

    def take_buffers(self, model: Model) -> None:
        """Go on with this model's buffers; asked of workers of models that have some, when they have joined, or again.

        Args:
            model: as it came with the ticket whose gradient is computed next.
        """

    def mend(self, model: Model) -> None:
        """Take from this model the buffers that the server did not take from the worker, for their NaN or infinity."""


class Workload(Protocol):
    """A model with its data. One object serves many simulations in turn.

    Attributes:
        epoch_samples: samples in one pass over the training data.
        batch_samples: samples in a mini-batch.
    """

    epoch_samples: int
    batch_samples: int

    def initial(self, seed: int) -> Model:
        """The model at the start, the same for the same seed."""

    def start_worker(self, data_seed: int, model: Model) -> SimulatedWorker:
        """A worker that joins now and gets this model's buffers."""

    def evaluate(self, model: Model) -> Scores:
        """Score a model."""


@dataclass(frozen=True, slots=True)
class WorkloadSettings:
    """What a workload is made from, as keyword arguments.

    Attributes:
        task: by name or import path.
        data_dir: folder with the task's data.
        batch_size: samples in each mini-batch.
        weight_decay: λ, added as λ·w to the gradients.
        device: where to compute, such as "cpu" or "cuda".
        train_samples, test_samples: how many of each set evaluations look at, spread evenly over it; 0 for all.
    """

    task: str
    data_dir: Path | None
    batch_size: int
    weight_decay: float
    device: str
    train_samples: int
    test_samples: int


def load_workload(path: str, settings: WorkloadSettings) -> Workload:
    """Make the workload that an import path names.

    Raises:
        UsageError: there is none, or it can't be made so.
    """
    module, _, attribute = path.partition(":")
    try:
        factory = cast(Callable[..., Workload], operator.attrgetter(attribute)(importlib.import_module(module)))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UsageError(
            f"the workload {path!r} can't be imported ({error}): expected 'package.module:attribute'; for the tasks of "
            "the worker install ormo-parameter-server[worker]"
        ) from error
    return factory(**asdict(settings))
