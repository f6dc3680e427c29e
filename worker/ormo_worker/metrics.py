"""What a worker and an evaluator export to Prometheus, each on a port of its own, if it is given one."""

import functools
import logging
import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

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

from ormo_runtime.http_port import HttpPort
from ormo_runtime.process import SHARED_VALUES
from ormo_worker.client.arguments import Observer, Stage, address
from ormo_worker.client.protocol import Fate
from ormo_worker.errors import OptionRefused

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
_GPU_MEMORY = {
    "allocated": torch.cuda.memory_allocated,
    "reserved": torch.cuda.memory_reserved,
    "peak": torch.cuda.max_memory_allocated,
}


class WorkerMetrics(Observer):
    """A worker's figures.

    Args:
        worker: its id.
        device: that it computes on.

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
    def note_exchange(self, stages: Iterable[tuple[Stage, float]], fate: Fate | None) -> None:
        for stage, seconds in stages:
            self._stages[stage].observe(seconds)
        if fate is not None:
            self._steps[fate].inc()

    @override
    def note_wait(self, seconds: float) -> None:
        self._blocked.observe(seconds)

    @override
    def note_retry(self, cause: str) -> None:
        self._retries.labels(cause).inc()

    @override
    def note_rejoin(self) -> None:
        self._rejoins.inc()


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
        OptionRefused: it is no address, or can't be had.
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
                f"--metrics-listen is {listen}, but that can't be listened on ({error.strerror or error}): name "
                "another port, or end the program that has it"
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
