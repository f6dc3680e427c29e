"""`ormo-worker run`: the training loop for a task."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ormo_runtime.logs import Fields
from ormo_runtime.process import leave_if_asked
from ormo_worker.parallel import Reduced, joined, own_device
from ormo_worker.processes import Place
from ormo_worker.pytorch.devices import resolve_device
from ormo_worker.pytorch.optimizer import RemoteOptimizer
from ormo_worker.pytorch.options import decay_groups
from ormo_worker.pytorch.recipes import RateSchedule, named_optimizers
from ormo_worker.settings import RunSettings
from ormo_worker.tasks import Task, load_task
from ormo_worker.tasks.batches import Part, batches, part_size, to_device

_LOG = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 5.0


def run(settings: RunSettings, place: Place | None = None) -> None:
    """Train until the server says that the run is over, or for `leave_after_gradients` gradients.

    Args:
        settings: of the worker.
        place: which of the worker's processes this one is; None for a worker that is one process.

    Raises:
        TaskError: the task or its data can't be used.
        OptionRefused: the device is not there.
        GroupBroken: another of the worker's processes has ended.
        OrmoError: the run can't be joined, or the server has been gone for too long.
    """
    torch.set_num_threads(settings.threads)
    device = resolve_device(own_device(settings.device, place))
    task = load_task(settings.task, settings.data_dir)
    torch.manual_seed(settings.seed)
    model = task.build_model().to(device)
    groups = decay_groups(model, task.weight_decay_scale)
    inner = named_optimizers(settings.inner, model, groups, settings.inner_lr) if settings.inner else None
    dataset: Any = task.train_set()
    ranks = 1 if place is None else place.ranks
    samples = part_size(dataset, settings.batch_size, ranks)  # complains before the run counts on this worker
    with (
        joined(place, device) as group,
        RemoteOptimizer(
            model,
            settings.server,
            params=groups,
            batch_size=samples,
            worker_id=settings.worker_id,
            wire_dtype=getattr(torch, settings.wire_dtype),
            in_flight=settings.in_flight,
            inner=inner,
            process_group=group,
            connect_timeout=settings.connect_timeout_seconds,
            failure_timeout=settings.failure_timeout_seconds,
            give_up_after=settings.give_up_after_seconds,
            metrics_listen=settings.metrics_listen,
            credentials=settings.credentials(),
        ) as optimizer,
    ):
        if optimizer.finished:
            _LOG.info("the run is already over, at iteration %d: there is nothing to train", optimizer.iteration)
            return
        cut: dict[str, Any] = {} if place is None else {"part": Part(place.rank, ranks)}
        stream = batches(dataset, samples, optimizer.data_seed, loader_processes=settings.loader_processes, **cut)
        rates = RateSchedule(settings.inner_schedule, settings.inner_warmup) if inner else None
        training = Training(task, model, optimizer, device, settings.amp, settings.slow_factor, rates)
        if place is not None:
            torch.manual_seed(settings.seed + place.rank)  # or dropout would be the same in all
            training.reduced = Reduced.over(group, task, model)
        training.run(stream, settings.leave_after_gradients)


@dataclass
class Training:
    """One worker's loop over its batches.

    Attributes:
        task: gives the loss of each batch.
        model: the one that is trained, on the device.
        optimizer: pushes the model's gradients; closed at the end of `run`.
        device: where batches go.
        amp: the dtype of mixed precision, or "off".
        slow_factor: how many times as long as it would a gradient shall take, to play a slower machine.
        rates: how the learning rates of the inner optimizers change; None without any.
        reduced: computes the loss of a batch in place of the task, and has gradients reduced among processes; None for
            a worker that is one process.
    """

    task: Task
    model: nn.Module
    optimizer: RemoteOptimizer
    device: torch.device
    amp: Literal["off", "bfloat16", "float16"] = "off"
    slow_factor: float = 1.0
    rates: RateSchedule | None = None
    reduced: nn.Module | None = None

    def __post_init__(self) -> None:
        # float16 alone has so narrow a range that gradients vanish without scaling.
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "float16")
        self._progress = _Progress(self.optimizer)
        self._rates = None if self.rates is None else _InnerRates(self.optimizer, self.rates)

    def run(self, stream: Iterator[Any], leave_after_gradients: int = 0) -> None:
        """Train until the run is over, the stream ends, or `leave_after_gradients` gradients (if not 0) were counted.

        Then the optimizer is closed, which waits for those in flight: they are taken for counted before.
        """
        self.model.train()
        for batch in stream:
            leave_if_asked()
            started = time.monotonic()
            loss = self._backward(to_device(batch, self.device))
            self._slow_down(started)
            if self._rates is not None:
                self._rates.set()
            self._scaler.step(self.optimizer, loss=loss)
            self._scaler.update()
            self._progress.step(loss)
            if (
                self.optimizer.finished
                or 0 < leave_after_gradients <= self.optimizer.counted + self.optimizer.under_way
            ):
                break
        self.optimizer.close()
        self._progress.end()

    def _backward(self, batch: Any) -> Tensor:
        self.optimizer.zero_grad()
        with self._autocast():
            loss = self.task.loss(self.model, batch) if self.reduced is None else self.reduced(batch)
        self._scaler.scale(loss).backward()
        return loss.detach()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.amp == "off":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.amp))

    def _slow_down(self, started: float) -> None:
        if self.slow_factor > 1:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # or there would be nothing to multiply yet
            time.sleep((self.slow_factor - 1) * (time.monotonic() - started))


class _InnerRates:
    """Sets the learning rates of inner optimizers before each of their steps."""

    def __init__(self, optimizer: RemoteOptimizer, schedule: RateSchedule) -> None:
        self._optimizer = optimizer
        self._schedule = schedule
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._joined_at = optimizer.progress
        self._steps = 0

    def set(self) -> None:
        factor = self._schedule.factor(self._optimizer.progress, self._joined_at, self._steps)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self._steps += 1


class _Progress:
    """Writes a line to the log every few seconds."""

    def __init__(self, optimizer: RemoteOptimizer) -> None:
        self._optimizer = optimizer
        self._result: object = None
        self._delays: list[int] = []
        self._started = self._line_at = time.monotonic()
        self._line_counted = 0

    def step(self, loss: Tensor) -> None:
        result = self._optimizer.last_result
        if result is not None and result is not self._result:  # a scaler may have skipped the step
            self._result = result
            self._delays.append(result.delay)
        now = time.monotonic()
        if now - self._line_at >= _SECONDS_BETWEEN_LINES and self._delays:
            self._line(now, loss)

    def end(self) -> None:
        seconds = time.monotonic() - self._started
        state = "the run is over" if self._optimizer.finished else "left the run"
        iteration, refused = self._optimizer.iteration, self._optimizer.refusals.total()
        line = "%s at iteration %d: %d gradients from this worker in %.1f s, %d refused"
        about = Fields(iteration=iteration, seconds=seconds)
        _LOG.info(line, state, iteration, self._optimizer.counted, seconds, refused, extra=about)

    def _line(self, now: float, loss: Tensor) -> None:
        counted = self._optimizer.counted
        iteration, value = self._optimizer.iteration, loss.item()
        _LOG.info(
            "iteration %d: %d gradients from this worker, %.1f a second, loss %.4f, delay mean %.1f, largest %d",
            iteration,
            counted,
            (counted - self._line_counted) / (now - self._line_at),
            value,
            _mean(self._delays),
            max(self._delays),
            extra=Fields(iteration=iteration, loss=value, delay=self._delays[-1]),
        )
        self._line_at, self._line_counted = now, counted
        self._delays.clear()


def _mean(values: Iterable[int]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
