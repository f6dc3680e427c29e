"""What is counted: a worker's gradients, for its program and its log, and what worker and evaluator export.

Each of them serves Prometheus on a port of its own, if it is given one.
"""

import collections
import functools
import logging
import os
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    make_wsgi_app,
    values,
)
from typing_extensions import override

from ormo_protos.refusals import UNSOUND_GRADIENT, Reason
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.http_port import HttpPort
from ormo_runtime.logs import Fields
from ormo_runtime.process import SHARED_VALUES
from ormo_worker.client.arguments import Observer, Stage, address
from ormo_worker.client.protocol import Fate
from ormo_worker.errors import OptionRefused

if TYPE_CHECKING:  # an evaluator has no slots
    from ormo_worker.client import ExchangeOutcome

_LOG = logging.getLogger(__name__)

# In a user's own program the variable may be meant, but where there is no such folder nobody could make a metric.
if any(not Path(os.environ[name]).is_dir() for name in SHARED_VALUES if name in os.environ):
    values.ValueClass = values.MutexValue
# Else each counter and histogram has one series more, for when it was made; `process_start_time_seconds` says that.
disable_created_metrics()  # type: ignore[no-untyped-call]

# From 1 ms, a small model's step on loopback, to 5 minutes, a large one's on a slow device.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_STAGES: tuple[Stage, ...] = ("compute", "push", "wait", "pull")
_FATES: tuple[Fate, ...] = ("applied", "discarded", "refused", "lost")
_SECONDS_BETWEEN_WARNINGS = 10.0  # in a loop that has diverged the server refuses every gradient
_LOST = (
    "%d local steps were lost, training continues: %s: %s (they are never sent under another ticket; with --journal of "
    "ormo-server its crash loses none)"
)
_UNKNOWN = "whether %d local steps were applied is not known; they are not sent again, and training continues"
_NOT_FINITE = (
    "the sum of %d local steps has NaN or infinity and was not sent: training continues with the server's parameters "
    "and an inner optimizer that begins anew; if this happens again, lower its learning rate or clip gradients"
)
_GPU_MEMORY = {
    "allocated": torch.cuda.memory_allocated,
    "reserved": torch.cuda.memory_reserved,
    "peak": torch.cuda.max_memory_allocated,
}


class Tally:
    """What became of the gradients of one optimizer, for the program that trains, and what its log says of it.

    For the training thread alone: it counts what that thread has got to know, as the figures beside a model have to;
    `WorkerMetrics` counts in whichever thread an exchange ends.

    Args:
        worker: the worker's id, for lines of the log.

    Attributes:
        last_result: what the server said to the last gradient whose outcome is known; None for a refused one.
        counted: gradients that the server is known to have applied, or discarded as too late.
        refusals: how many gradients were refused, by reason.
    """

    def __init__(self, worker: str) -> None:
        self.last_result: pb.PushResult | None = None
        self.counted = 0
        self.refusals: collections.Counter[str] = collections.Counter()
        self._worker = worker
        self._warned_at = float("-inf")

    def note(self, outcome: "ExchangeOutcome", iteration: int, local_steps: int = 0) -> None:
        """Count the gradient of this exchange, if it had one.

        Args:
            outcome: what came of the exchange.
            iteration: the one whose parameters the model has, for the log.
            local_steps: how many the gradient was the sum of.
        """
        if outcome.fate is None:
            return
        self.last_result = outcome.result
        self.counted += outcome.result is not None
        if outcome.refusal is not None and not outcome.finished:
            self._note_refusal(outcome.refusal, iteration, local_steps)
        elif outcome.fate == "lost" and local_steps:
            _LOG.warning(_UNKNOWN, local_steps, extra=Fields(worker=self._worker, iteration=iteration))

    def note_not_finite(self, local_steps: int) -> None:
        """Count a sum of local steps that is not finite, and so was never sent."""
        self.last_result = None
        self.refusals[Reason.NON_FINITE] += 1
        if self._may_warn():
            _LOG.warning(_NOT_FINITE, local_steps, extra=Fields(worker=self._worker, reason=Reason.NON_FINITE))

    def note_mended(self, buffers: str, iteration: int) -> None:
        """Say that these buffers have the server's values again."""
        if self._may_warn():
            said = (
                "gradient counted, but these buffers contained NaN or infinity and were reset to the server's values: "
                "%s"
            )
            _LOG.warning(said, buffers, extra=Fields(worker=self._worker, iteration=iteration))

    def _note_refusal(self, refusal: pb.PushResult, iteration: int, local_steps: int) -> None:
        self.refusals[refusal.refusal] += 1
        about = Fields(worker=self._worker, request=refusal.request, iteration=iteration, reason=refusal.refusal)
        if refusal.refusal not in UNSOUND_GRADIENT and local_steps:
            _LOG.warning(_LOST, local_steps, refusal.refusal, refusal.refusal_message, extra=about)
            return
        if refusal.refusal not in UNSOUND_GRADIENT:
            said = "a gradient was lost, training continues: %s: %s"
            _LOG.info(said, refusal.refusal, refusal.refusal_message, extra=about)
            return
        if self._may_warn():
            count = self.refusals[refusal.refusal]
            said = "the server refused a gradient, %d so far: %s"
            _LOG.warning(said, count, refusal.refusal_message, extra=about)

    def _may_warn(self) -> bool:
        now = time.monotonic()
        if now - self._warned_at < _SECONDS_BETWEEN_WARNINGS:
            return False
        self._warned_at = now
        return True


class WorkerMetrics(Observer):
    """A worker's figures.

    Args:
        worker: the worker's id.
        device: where it computes; of a GPU, its memory is exported, too.

    Attributes:
        registry: what is scraped.
    """

    def __init__(self, worker: str, device: torch.device) -> None:
        self.registry = _registry()
        step = Histogram(
            "ormo_worker_step_seconds",
            "Time of a step by stage: computing the gradient, pushing it, waiting for parameters, pulling them.",
            ["stage"],
            registry=self.registry,
            buckets=_SECONDS,
        )
        steps = Counter(
            "ormo_worker_steps",
            "Gradients given to the server, by what became of them.",
            ["outcome"],
            registry=self.registry,
        )
        self._blocked = Histogram(
            "ormo_worker_blocked_seconds",
            "Time for which a step waited for parameters; with several gradients in flight less than an exchange.",
            registry=self.registry,
            buckets=_SECONDS,
        )
        local_steps = Counter(
            "ormo_worker_local_steps",
            "Local steps by what became of their sum; those lost are never sent again.",
            ["outcome"],
            registry=self.registry,
        )
        self._local_steps = {fate: local_steps.labels(fate) for fate in _FATES}
        self._stages = {stage: step.labels(stage) for stage in _STAGES}
        self._steps = {fate: steps.labels(fate) for fate in _FATES}
        self._retries = Counter(
            "ormo_worker_retries", "Calls that failed and were made again.", ["cause"], registry=self.registry
        )
        self._rejoins = Counter("ormo_worker_rejoins", "Times that the worker joined again.", registry=self.registry)
        Info("ormo_worker_process", "Which worker this process is.", registry=self.registry).info(
            {"worker": worker, "device": str(device), "version": version("ormo-parameter-server")}
        )
        if device.type == "cuda":
            self._export_gpu(device)

    def _export_gpu(self, device: torch.device) -> None:
        memory = Gauge(
            "ormo_worker_gpu_memory_bytes", "Memory that PyTorch has on the GPU.", ["kind"], registry=self.registry
        )
        for kind, read in _GPU_MEMORY.items():
            memory.labels(kind).set_function(functools.partial(read, device))

    @override
    def note_exchange(self, stages: Iterable[tuple[Stage, float]], fate: Fate | None, local_steps: int = 0) -> None:
        for stage, seconds in stages:
            self._stages[stage].observe(seconds)
        if fate is not None:
            self._steps[fate].inc()
            if local_steps:
                self._local_steps[fate].inc(local_steps)

    def note_not_finite(self, local_steps: int) -> None:
        """The sum of so many was not finite, and so was refused here already."""
        self._local_steps["refused"].inc(local_steps)

    @override
    def note_wait(self, seconds: float) -> None:
        self._blocked.observe(seconds)

    @override
    def note_retry(self, cause: str) -> None:
        self._retries.labels(cause).inc()

    @override
    def note_rejoin(self) -> None:
        self._rejoins.inc()


def note_not_finite(tally: Tally, metrics: WorkerMetrics, local_steps: int) -> None:
    """Tell both, of a sum of local steps that is not finite."""
    tally.note_not_finite(local_steps)
    metrics.note_not_finite(local_steps)


class EvaluatorMetrics(Observer):
    """An evaluator's figures. What it finds is reported to the server, which exports it.

    Attributes:
        registry: what is scraped.
    """

    def __init__(self) -> None:
        self.registry = _registry()
        self._seconds = Histogram(
            "ormo_evaluator_duration_seconds", "Time of an evaluation.", registry=self.registry, buckets=_SECONDS
        )
        self._iteration = Gauge(
            "ormo_evaluator_iteration", "Iteration of the parameters evaluated last.", registry=self.registry
        )
        self._retries = Counter(
            "ormo_evaluator_retries", "Calls that failed and were made again.", ["cause"], registry=self.registry
        )

    def note_evaluation(self, iteration: int, seconds: float) -> None:
        """An evaluation of this iteration's parameters is complete, and took so long."""
        self._iteration.set(iteration)
        self._seconds.observe(seconds)

    @override
    def note_retry(self, cause: str) -> None:
        self._retries.labels(cause).inc()


class Exporter:
    """Serves a registry over HTTP.

    Args:
        listen: HOST:PORT; port 0 picks a free one. Empty for nowhere.
        registry: what is scraped.

    Raises:
        OptionRefused: `listen` is no address, or the port is not free.
    """

    def __init__(self, listen: str, registry: CollectorRegistry) -> None:
        self._port: HttpPort | None = None
        if not listen:
            return
        host, _, port = address("metrics_listen", listen, lowest_port=0).rpartition(":")
        try:
            self._port = HttpPort(host, int(port), make_wsgi_app(registry))
        except OSError as error:
            raise OptionRefused(
                f"--metrics-listen is {listen}, but nothing can listen there ({error.strerror or error}): name "
                "another port, or end the program that has this one"
            ) from None
        _LOG.info("metrics on %s:%d", host, self._port.server_port)

    def close(self) -> None:
        """Stop serving; may be called again."""
        port, self._port = self._port, None
        if port is not None:
            port.close()


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry
