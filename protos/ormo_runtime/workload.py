"""What passes between the simulator and what computes its gradients, and how that is found.

Gradients are real, only time is virtual. Server and worker don't import each other, and the server's package knows no
task: whatever computes gradients is named by an import path, as ASGI servers name applications. The worker's package
has the one that runs any of its tasks.
"""

import importlib
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol, cast

import torch

from ormo_protos.manifest import Manifest
from ormo_runtime.settings import UsageError


@dataclass(frozen=True, slots=True)
class Model:
    """A model's numbers.

    Attributes:
        params: w, shape (d,), float32.
        float_buffers: shape (f,), float32.
        int_buffers: shape (i,), int64, or the bits of float64.
        manifest: which tensors they are, so that buffers are merged as the worker's; None: floats are averaged, and
            integers grow.
    """

    params: torch.Tensor
    float_buffers: torch.Tensor
    int_buffers: torch.Tensor
    manifest: Manifest | None = None


@dataclass(frozen=True, slots=True)
class Computed:
    """What a worker would push besides its gradient. Buffers are good until the worker computes again.

    Attributes:
        samples: in the mini-batch, or in those of all local steps.
        loss: mean over the mini-batch, or over the local steps.
        float_buffers, int_buffers: the worker's, as in `Model`.
    """

    samples: int
    loss: float
    float_buffers: torch.Tensor
    int_buffers: torch.Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """How good a model is.

    Attributes:
        train_loss, test_loss: means over samples, in evaluation mode.
        test_accuracy: share of samples predicted right, from 0 to 1.
    """

    train_loss: float
    test_loss: float
    test_accuracy: float


__all__ = [
    "TASKS_OF_THE_WORKER",
    "Computed",
    "Ends",
    "InnerSettings",
    "Model",
    "Scores",
    "SimulatedWorker",
    "Workload",
    "WorkloadSettings",
    "load_workload",
    "share_of_run",
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

    def local_steps(
        self, ticket: int, params: torch.Tensor, out: torch.Tensor, *, steps: int, progress: float
    ) -> Computed:
        """Make local steps with the worker's next mini-batches; asked only where the settings have an inner optimizer.

        Args:
            ticket: number of the ticket that they are for.
            params: where to begin, shape (d,), float32; read only.
            out: for the pseudo-gradient, where it began less where it came to, shape (d,), float32; overwritten.
            steps: how many.
            progress: of the run when these parameters were sent, 0 to 1.
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


class Ends(Protocol):
    """When a run is over; 0 where it never is."""

    @property
    def stop_after_gradients(self) -> int:
        """How many gradients it applies."""

    @property
    def stop_after_samples(self) -> int:
        """How many samples it counts."""


def share_of_run(ends: Ends, gradients: int, samples: int) -> float:
    """How much of a run is over after so many, 0 to 1, by whichever ends it first; 0 where neither does."""
    by_gradients = gradients / ends.stop_after_gradients if ends.stop_after_gradients else 0.0
    by_samples = samples / ends.stop_after_samples if ends.stop_after_samples else 0.0
    return min(1.0, max(by_gradients, by_samples))


@dataclass(frozen=True, slots=True)
class InnerSettings:
    """What workers make their local steps with.

    Attributes:
        name: of the optimizer: adamw, muon or sgd.
        learning_rate: its, at the peak.
        schedule: how that changes over the run: constant or cosine.
        warmup: the share of the run over which it rises once a worker has joined.
    """

    name: str
    learning_rate: float
    schedule: str
    warmup: float


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
        inner: of local steps; None for gradients, and then no argument.
    """

    task: str
    data_dir: Path | None
    batch_size: int
    weight_decay: float
    device: str
    train_samples: int
    test_samples: int
    inner: InnerSettings | None = None


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
    given = {column.name: getattr(settings, column.name) for column in fields(settings)}
    if settings.inner is None:  # a workload of gradients alone need not know of it
        del given["inner"]
    return factory(**given)
