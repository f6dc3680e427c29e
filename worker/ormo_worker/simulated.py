"""A worker's task without a network: what the workers of a simulation compute.

`ormo-sim` names `TaskWorkload` by its import path; what it has to do is said in `ormo_runtime.workload`.
"""

import copy
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ormo_protos.manifest import FLOAT32
from ormo_runtime.workload import Computed, InnerSettings, Model, Scores
from ormo_worker.pytorch.devices import resolve_device
from ormo_worker.pytorch.inner import Inner
from ormo_worker.pytorch.options import ParameterGroup, decay_groups, decays
from ormo_worker.pytorch.recipes import InnerName, RateSchedule, ScheduleName, named_optimizers
from ormo_worker.pytorch.reference import Reference
from ormo_worker.pytorch.transfer import Staging
from ormo_worker.tasks import Batch, Score, Task, load_task
from ormo_worker.tasks.batches import batches, evaluation_batches, tensors_in, to_device

_SEED = 0  # of a model that nobody asked for yet, as `ormo-worker run` has it
# As `ormo-worker evaluate` has it: in other batches the sums round otherwise.
_EVALUATION_BATCH = 256
# What one process may keep of each set, ready to be scored: CIFAR-10's test set takes 123 MB. To read it anew each time
# would make an evaluation of a small network longer by a tenth, and with images in files many times as long.
_KEPT_BYTES = 256 * 2**20


class TaskWorkload:
    """Any of the worker's tasks, computed as `ormo-worker run` and `ormo-worker evaluate` compute it.

    All workers share one module. For each gradient it gets the parameters, and what is the worker's own: its buffers
    and the state of PyTorch's random generators, so that a worker's gradients do not depend on when the others compute.
    Inner optimizers of local steps are the worker's own, too.
    What else a model carries from one mini-batch to the next (attributes, buffers that are not in its `state_dict`) is
    shared. On one thread of a CPU the same calls give the same bits.

    Args:
        task: a built-in task, or the import path of one.
        data_dir: folder with the task's data, for tasks that need one.
        batch_size: samples in each mini-batch.
        weight_decay: λ, which the task may scale for single parameters.
        device: where to compute: auto, cpu, cuda or cuda:N.
        train_samples, test_samples: how many of each set `evaluate` looks at, spread evenly over it; 0 for all.
        inner: what workers make local steps with; None: they compute gradients.

    Attributes:
        epoch_samples: samples in the training set.
        batch_samples: samples in a mini-batch; fewer than asked for if the set has no more.

    Raises:
        TaskError: the task or its data can't be used.
        ModelUnusable: the task's model can't be trained through a parameter server.
        OptionRefused: the device is not there, or a parameter's weight decay can't be scaled so.
    """

    def __init__(
        self,
        *,
        task: str,
        data_dir: Path | None,
        batch_size: int,
        weight_decay: float,
        device: str,
        train_samples: int,
        test_samples: int,
        inner: InnerSettings | None = None,
    ) -> None:
        self._device = resolve_device(device)
        self._task = load_task(task, data_dir)
        self._weight_decay = weight_decay
        self._inner = inner
        self._bench = self._set_up(_SEED)  # before the data are read, as a worker does, and to find out if it can be
        train_set: Any = self._task.train_set()
        self._train_set = train_set
        self._train = _Scored(self._task, train_set, train_samples, self._device)
        self._test = _Scored(self._task, self._task.test_set(), test_samples, self._device)
        self.epoch_samples = len(train_set)
        self.batch_samples = min(batch_size, self.epoch_samples)

    def initial(self, seed: int) -> Model:
        """The model that `ormo-worker run --seed` begins with; seeds PyTorch's global generators."""
        self._bench = self._set_up(seed)
        start = self._bench.staging.snapshot()
        return Model(start.parameters, start.float_buffers, start.int_buffers, self._bench.staging.tensors.manifest)

    def start_worker(self, data_seed: int, model: Model) -> "TaskWorker":
        """A worker that joins with this data seed, and gets this model's buffers.

        Raises:
            ValueError: the seed is none of -2**63 to 2**64 - 1.
        """
        stream = batches(self._train_set, self.batch_samples, data_seed)
        inner = None if self._inner is None else _InnerSteps(self._task, self._bench, self._inner)
        return TaskWorker(self._bench, stream, self.batch_samples, model, inner)

    def evaluate(self, model: Model) -> Scores:
        """Score a model on samples of both sets, in evaluation mode and not augmented."""
        self._bench.load(model, training=False)
        train, test = self._train.score(self._bench.module), self._test.score(self._bench.module)
        return Scores(train.mean_loss, test.mean_loss, test.accuracy)

    def _set_up(self, seed: int) -> "_Bench":
        return _Bench(self._task, self._device, self._weight_decay, seed)


class TaskWorker:
    """One simulated worker, whose turn comes now and then.

    Args:
        bench: where it computes.
        stream: its mini-batches, without end.
        samples: how many each mini-batch has.
        model: gives the buffers that it begins with; they are copied.
        inner: makes its local steps; None for a worker that computes gradients.
    """

    def __init__(
        self,
        bench: "_Bench",
        stream: Iterator[Batch],
        samples: int,
        model: Model,
        inner: "_InnerSteps | None" = None,
    ) -> None:
        self._bench = bench
        self._inner = inner
        self._stream = stream
        self._samples = samples
        self._float_buffers = model.float_buffers.clone()
        self._int_buffers = model.int_buffers.clone()
        self._random = bench.random.copy()

    def gradient(self, ticket: int, params: Tensor, out: Tensor) -> Computed:  # noqa: ARG002 - the simulator gives it
        """Compute the gradient of the worker's next mini-batch.

        Args:
            ticket: not needed: the mini-batch follows from the data seed and the number of those before it.
            params: where to compute it, shape (d,), float32; read only.
            out: for the gradient, mean over the mini-batch, weight decay added; shape (d,), float32; overwritten.
        """
        bench = self._bench
        self._begin(params)
        loss = bench.compute(to_device(next(self._stream), bench.device))
        return self._end(out, self._samples, loss)

    def local_steps(
        self,
        ticket: int,  # noqa: ARG002 - as for `gradient`
        params: Tensor,
        out: Tensor,
        *,
        steps: int,
        progress: float,
    ) -> Computed:
        """Make local steps with the worker's next mini-batches; see `ormo_runtime.workload`."""
        bench, inner, losses = self._bench, self._inner, 0.0
        assert inner is not None, "the workload was made without inner optimizers"
        self._begin(params)
        inner.begin()
        for _ in range(steps):
            losses += bench.backward(to_device(next(self._stream), bench.device))
            inner.step(progress)
        bench.gather_moves(inner.end())
        return self._end(out, steps * self._samples, losses / steps)

    def _begin(self, params: Tensor) -> None:
        self._random.restore()
        self._bench.load(Model(params, self._float_buffers, self._int_buffers), training=True)

    def _end(self, out: Tensor, samples: int, loss: float) -> Computed:
        out.copy_(self._bench.payload.parameters)
        self._keep_buffers()
        self._random.save()
        return Computed(samples, loss, self._float_buffers, self._int_buffers)

    def take_buffers(self, model: Model) -> None:
        """Go on with this model's buffers, as a real worker does when it has joined, or joined again."""
        self._float_buffers.copy_(model.float_buffers)
        self._int_buffers.copy_(model.int_buffers)

    def mend(self, model: Model) -> None:
        """Take from this model the buffers that the server did not take from the worker, as a real one does."""
        self._bench.load(Model(model.params, self._float_buffers, self._int_buffers), training=True)
        self._bench.mend(model)
        self._keep_buffers()

    def _keep_buffers(self) -> None:
        self._float_buffers.copy_(self._bench.payload.float_buffers)
        self._int_buffers.copy_(self._bench.payload.int_buffers)


class _InnerSteps:
    """One worker's inner optimizers, with their state, for parameters that all share.

    Args:
        task: says how far single parameters decay.
        bench: has the parameters.
        settings: which optimizers, at which rates.
    """

    def __init__(self, task: Task, bench: "_Bench", settings: InnerSettings) -> None:
        module, parameters = bench.module, bench.staging.tensors.parameters
        groups = decay_groups(module, task.weight_decay_scale)
        made = named_optimizers(cast(InnerName, settings.name), module, groups, settings.learning_rate)
        self._inner = Inner(made, module, parameters)
        self._schedule = RateSchedule(cast(ScheduleName, settings.schedule), settings.warmup)
        self._peaks = [group["lr"] for group in self._inner.param_groups]
        self._reference = bench.reference
        self._joined_at: float | None = None
        self._steps = 0

    def begin(self) -> None:
        """The module has just got the parameters of a ticket."""
        self._reference.note()

    def step(self, progress: float) -> None:
        """Make one by the gradients that the parameters have, at the rates that this progress of the run says."""
        if self._joined_at is None:
            self._joined_at = progress
        factor = self._schedule.factor(progress, self._joined_at, self._steps)
        for group, peak in zip(self._inner.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self._inner.step()
        self._steps += 1

    def end(self) -> list[Tensor]:
        """How far the parameters have moved; if that is not finite, the optimizers begin anew, as a worker's do."""
        moves = self._reference.take_moves(self._inner.parameters)
        if not self._reference.is_finite():
            self._inner.reset()
        return moves


class _Bench:
    """The module that all compute with, and the way of their numbers into it and out of it.

    Args:
        task: makes the model, and computes its loss.
        device: where it computes.
        weight_decay: λ.
        seed: decides the model's first parameters, and whatever else the task draws to make it.

    Attributes:
        module: the model, on the device.
        staging: the module's tensors, and the ways to and from payloads.
        payload: what was loaded last, or a gradient with the buffers after it.
        reference: parameters that local steps begin at.
        device: where batches go.
        random: PyTorch's generators, once the model is made.
    """

    def __init__(self, task: Task, device: torch.device, weight_decay: float, seed: int) -> None:
        torch.manual_seed(seed)
        module = task.build_model()
        self.random = _Randomness(device)
        self.device = device
        self.module = module.to(device)
        self.staging = Staging(self.module)
        self.payload = self.staging.payload(FLOAT32, with_buffers=True)
        self._task = task
        self._transfer = self.staging.transfer(self.payload)
        self._parameters = self.staging.tensors.parameters
        self._decays = decays(_groups(task, self.module), self._parameters, weight_decay)

    @cached_property
    def reference(self) -> Reference:  # memory that gradients alone don't need
        return Reference(self._parameters)

    def load(self, model: Model, *, training: bool) -> None:
        """Give the module these numbers, and set its mode."""
        self._fill(model)
        self._transfer.load()
        if self.module.training != training:
            self.module.train(training)

    def mend(self, model: Model) -> None:
        """Leave in the payload the module's buffers, but where the server did not take them those of this model."""
        self._fill(model)
        self._transfer.load(mends=True)
        self._transfer.gather_parameters()

    def _fill(self, model: Model) -> None:
        self.payload.parameters.copy_(model.params)
        self.payload.float_buffers.copy_(model.float_buffers)
        self.payload.int_buffers.copy_(model.int_buffers)

    def compute(self, batch: Batch) -> float:
        """Leave the batch's gradient in the payload, with the buffers as they are now; returns the loss."""
        loss = self.backward(batch)
        self._transfer.gather_gradients(self._decays)
        return loss

    def backward(self, batch: Batch) -> float:
        """Leave the batch's gradient with the parameters; returns the loss."""
        for parameter in self._parameters:
            parameter.grad = None
        loss = self._task.loss(self.module, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def gather_moves(self, moves: Sequence[Tensor]) -> None:
        """Leave these in the payload, with the buffers as they are now."""
        self._transfer.begin_moves(moves).wait()


def _groups(task: Task, module: nn.Module) -> list[ParameterGroup]:
    """The groups of a `RemoteOptimizer`, without the names that it takes off."""
    groups = [ParameterGroup(group) for group in decay_groups(module, task.weight_decay_scale)]
    for group in groups:
        group["params"] = [parameter for _, parameter in group["params"]]
    return groups


class _Randomness:
    """Where PyTorch's global generators are at some time: the CPU's, and that of a GPU to compute on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host_state = torch.get_rng_state()
        self._device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def copy(self) -> "_Randomness":
        """The same state, to go on from."""
        return copy.deepcopy(self)

    def save(self) -> None:
        """Note where they are now; 5 µs on the CPU."""
        # Into the old memory: new ones would come to lie among the room for activations, which then does not fit there
        # any more (with a thousand workers and a small network the process grew by 0.3 GB).
        self._host_state.copy_(torch.get_rng_state())
        if self._device_state is not None:
            self._device_state.copy_(torch.cuda.get_rng_state(self._device))

    def restore(self) -> None:
        """Set them back to where they were."""
        torch.set_rng_state(self._host_state)
        if self._device_state is not None:
            torch.cuda.set_rng_state(self._device_state, self._device)


class _Scored:
    """Samples of a data set, scored again and again; kept ready for that, if they are not too large.

    Args:
        task: says how good a model is.
        dataset: one of the task's two sets.
        samples: how many of it to score, spread evenly; 0 for all.
        device: where they are scored.

    Raises:
        TaskError: the data set is empty or has no length.
    """

    def __init__(self, task: Task, dataset: Dataset[Any], samples: int, device: torch.device) -> None:
        self._task = task
        self._dataset = dataset
        self._samples = samples
        self._device = device
        self._kept: list[Batch] = []
        self._keeps = True
        self._read()

    @torch.no_grad()
    def score(self, module: nn.Module) -> Score:
        """Score a model that is in evaluation mode."""
        score, kept, kept_bytes = Score(), [], 0
        for batch in self._kept or self._read():
            tensors = tensors_in(batch)
            versions = _versions(tensors)
            score += self._task.score(module, batch)
            kept.append(batch)
            kept_bytes += sum(tensor.nbytes for tensor in tensors)
            # A task may well change a batch in place, if only the next one that it is given is as read.
            self._keeps = self._keeps and versions == _versions(tensors) and kept_bytes <= _KEPT_BYTES
            if not self._keeps:
                kept.clear()
        self._kept = kept
        return score

    def _read(self) -> Iterator[Batch]:
        stream = evaluation_batches(self._dataset, _EVALUATION_BATCH, self._samples)
        return (to_device(batch, self._device) for batch in stream)


def _versions(tensors: list[Tensor]) -> list[int]:
    """How often each was changed in place."""
    return [tensor._version for tensor in tensors]  # noqa: SLF001 (it has no public name)
