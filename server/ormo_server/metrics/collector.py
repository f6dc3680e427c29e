"""What is read from the run at each scrape, so that exchanges pay nothing for it."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from ormo_protos.limits import PHASES
from ormo_server.metrics.families import PREFIX
from ormo_server.metrics.view import RunView, WorkerView


class _Figure(NamedTuple):
    """A gauge of the run; where `value` gives None there is no series: a 0 would be a figure."""

    name: str
    text: str
    value: Callable[[RunView], float | None]


class _WorkerFigure(NamedTuple):
    """A figure of each worker."""

    name: str
    text: str
    value: Callable[[WorkerView], float | None]
    counts: bool = False


_RUN = (
    _Figure("iteration", "Gradients applied in the run.", lambda run: run.iteration),
    # Not `newest_bucket`: names that end so are histograms'.
    _Figure("newest_bucket_number", "Newest bucket of any applied gradient.", lambda run: run.newest_bucket),
    _Figure("bucket_size", "K, gradients in a bucket.", lambda run: run.bucket_size),
    _Figure("learning_rate", "Learning rate in force.", lambda run: run.learning_rate),
    _Figure("live_workers", "Workers with a lease.", lambda run: len(run.workers)),
    _Figure("live_slots", "In-flight places of the live workers.", lambda run: run.live_slots),
    _Figure("tickets_in_flight", "Tickets handed out and not redeemed.", lambda run: run.tickets_in_flight),
    _Figure("slots_waiting", "Slots that wait for a ticket.", lambda run: run.slots_waiting),
    _Figure("model_parameters", "Elements of all trainable tensors.", lambda run: run.model_parameters),
    _Figure("model_bytes", "Size of all trainable tensors on the server.", lambda run: 4 * run.model_parameters),
    _Figure(
        "training_loss",
        "Mean of the last losses that live workers reported.",
        lambda run: run.training_loss,
    ),
    _Figure(
        "test_loss",
        "Mean loss over the test set, as the last evaluation reported it.",
        lambda run: run.evaluation.loss if run.evaluation else None,
    ),
    _Figure(
        "test_accuracy",
        "Share of the test set predicted right, as the last evaluation reported it.",
        lambda run: run.evaluation.accuracy if run.evaluation else None,
    ),
    _Figure(
        "test_iteration",
        "Iteration of the parameters that the last evaluation judged.",
        lambda run: run.evaluation.iteration if run.evaluation else None,
    ),
    _Figure(
        "staleness_bound_iterations",
        "Iterations that no applied gradient's delay exceeds; only with bounded staleness.",
        lambda run: run.staleness_bound,
    ),
    _Figure(
        "discard_limit_iterations",
        "Delay from which on a gradient is not applied; only if the method discards.",
        lambda run: run.discard_limit,
    ),
)

_WORKER = (
    _WorkerFigure(
        "last_delay_iterations", "Delay of its last gradient, applied or discarded.", lambda w: w.seen.last_delay
    ),
    _WorkerFigure(
        "smoothed_delay_iterations",
        "Delay of its gradients, applied or discarded, smoothed exponentially: each new one counts a tenth.",
        lambda w: w.seen.smoothed_delay,
    ),
    _WorkerFigure(
        "max_delay_iterations",
        "Largest delay of its gradients since it joined, applied or discarded.",
        lambda w: w.seen.max_delay,
    ),
    _WorkerFigure(
        "ticket_seconds",
        "Time from handing its last redeemed ticket out to counting the gradient.",
        lambda w: w.seen.ticket_seconds,
    ),
    _WorkerFigure("gradients", "Its gradients applied since it joined.", lambda w: w.seen.applied, counts=True),
    _WorkerFigure(
        "samples", "Samples in its gradients applied since it joined.", lambda w: w.seen.samples, counts=True
    ),
    _WorkerFigure(
        "compute_seconds",
        "Time that it reports to have computed gradients since it joined.",
        lambda w: w.seen.compute_seconds_sum,
        counts=True,
    ),
    _WorkerFigure(
        "training_seconds",
        "Time from its first ticket since it joined to its last gradient, what its compute seconds are a share of.",
        lambda w: w.seen.training_seconds,
        counts=True,
    ),
    _WorkerFigure("training_loss", "Loss that it reported last.", lambda w: w.seen.last_loss),
    _WorkerFigure("gradient_norm", "Euclidean norm of its last applied gradient.", lambda w: w.seen.gradient_norm),
    _WorkerFigure(
        "local_steps",
        "Local steps in its last applied pseudo-gradient; not there in a run without.",
        lambda w: w.seen.local_steps or None,
    ),
    _WorkerFigure(
        "refused_gradients",
        "Its gradients since it joined that were refused: not finite, or of too large a norm.",
        lambda w: w.seen.refused,
        counts=True,
    ),
    _WorkerFigure(
        "refused_gradients_ratio",
        "Share of its gradients that were refused for that, smoothed exponentially: each new one counts 1/32.",
        lambda w: w.seen.refused_share,
    ),
    _WorkerFigure(
        "last_heard_timestamp_seconds",
        "When it last sent bytes or a heartbeat, Unix time.",
        lambda w: time.time() - w.silent_seconds,
    ),
    _WorkerFigure(
        "last_push_timestamp_seconds",
        "When its last gradient was counted, Unix time; not there before its first.",
        lambda w: None if w.push_age_seconds is None else time.time() - w.push_age_seconds,
    ),
)


_Plain = GaugeMetricFamily | CounterMetricFamily


class RunCollector(Collector):
    """Exports what a view of the run shows.

    Args:
        most_workers: how many workers have series of their own, those of the lowest ranks.
    """

    def __init__(self, registry: CollectorRegistry, most_workers: int) -> None:
        self._most_workers = most_workers
        self._phase: Callable[[], str] = lambda: PHASES[1]
        self._view: Callable[[], RunView | None] = lambda: None
        registry.register(self)

    def watch(self, view: Callable[[], RunView | None], phase: Callable[[], str]) -> None:
        """Ask these at each scrape; there is no view before there is a model."""
        self._view, self._phase = view, phase

    def describe(self) -> Iterable[Metric]:
        """All families, without their figures."""
        yield _family("run_phase", "1 for what the server is doing, 0 for all else.", labels=["phase"])
        for figure in _RUN:
            yield _family(figure.name, figure.text)
        hidden, info, families = _worker_families()
        yield from (hidden, info, *families)

    def collect(self) -> Iterator[Metric]:
        """All families, with the figures of this moment."""
        phases = _family("run_phase", "1 for what the server is doing, 0 for all else.", labels=["phase"])
        now = self._phase()
        for phase in PHASES.values():
            phases.add_metric([phase], float(phase == now))
        yield phases
        view = self._view()
        if view is not None:
            yield from _run_figures(view)
            yield from self._worker_figures(view)

    def _worker_figures(self, view: RunView) -> Iterator[Metric]:
        shown = sorted(view.workers, key=lambda worker: worker.rank)[: self._most_workers]
        hidden, info, families = _worker_families()
        hidden.add_metric([], len(view.workers) - len(shown))
        for worker in shown:
            info.add_metric([worker.worker], {"rank": str(worker.rank), "slots": str(worker.slots)})
        for figure, family in zip(_WORKER, families, strict=True):
            for worker in shown:
                value = figure.value(worker)
                if value is not None:
                    family.add_metric([worker.worker], value)
        yield from (hidden, info, *families)


def _run_figures(view: RunView) -> Iterator[Metric]:
    for figure in _RUN:
        value = figure.value(view)
        if value is not None:
            family = _family(figure.name, figure.text)
            family.add_metric([], value)
            yield family


def _worker_families() -> tuple[_Plain, InfoMetricFamily, list[_Plain]]:
    hidden = _family("workers_without_series", "Live workers beyond those that have series of their own.")
    info = InfoMetricFamily(f"{PREFIX}worker", "A live worker: its rank and its slots.", labels=["worker"])
    return (
        hidden,
        info,
        [_family(f"worker_{figure.name}", figure.text, labels=["worker"], counts=figure.counts) for figure in _WORKER],
    )


def _family(name: str, text: str, labels: list[str] | None = None, *, counts: bool = False) -> _Plain:
    kind = CounterMetricFamily if counts else GaugeMetricFamily
    return kind(PREFIX + name, text, labels=labels or [])
