"""What the server exports to Prometheus. The names and their meanings are all here."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from ormo_protos.reasons import Reason
from ormo_server.core.method import Method

_DELAYS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
# Most scales are at most 1; `rescaled` has a mean of 1 and gives slow workers more.
_SCALES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """The server's metrics, in a registry of their own. Children of known labels exist from the start, so that rates
    work from the first event."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._outcomes()
        self._distributions()
        self._gauges()
        self._method = Info("ormo_method", "What the server trains by.", registry=self.registry)

    def name_method(self, method: Method) -> None:
        """Say what the server trains by."""
        self._method.info(
            {
                "method": method.name,
                "update_rule": method.rule,
                "step_scale": method.scale,
                "scheduler": method.scheduler,
            }
        )
        # Limits that the method does not have are not exported: a 0 would be one.
        if method.staleness_bound is not None:
            text = "Iterations that no applied gradient's delay exceeds."
            self._gauge("staleness_bound", text).set(method.staleness_bound)

    def show_discard_limit(self, limit: Callable[[], float]) -> None:
        """Export R, where gradients can be late enough not to be applied."""
        self._gauge("discard_limit", "Iterations of delay from which on a gradient is not applied.").set_function(limit)

    def _outcomes(self) -> None:
        self.pushes = self._counter("pushes", "Gradients that came in, by outcome.", "outcome")
        for outcome in ("applied", "discarded", "repeated", "refused"):
            self.pushes.labels(outcome)
        self.pulls = self._counter("pulls", "Parameters that went out, by kind.", "kind")
        for kind in ("ticket", "reader", "not_modified"):
            self.pulls.labels(kind)
        self.refusals = self._counter("refusals", "Calls and gradients refused, by reason.", "reason")
        for reason in Reason:
            self.refusals.labels(reason.value)
        self.received_bytes = self._counter("received_bytes", "Tensor bytes received.")
        self.sent_bytes = self._counter("sent_bytes", "Tensor bytes sent.")
        self.samples = self._counter("samples", "Training samples in applied gradients.")
        self.expired_workers = self._counter("expired_workers", "Workers whose lease ran out.")
        self.expired_tickets = self._counter("expired_tickets", "Tickets of live workers that were out too long.")
        self.upkeep_failures = self._counter("upkeep_failures", "Background work that failed, by what it was.", "work")
        for work in ("expiry", "checkpoints", "trace"):
            self.upkeep_failures.labels(work)
        self.checkpoint_failures = self._counter("checkpoint_failures", "Checkpoints that could not be written.")

    def _distributions(self) -> None:
        self.delay = self._histogram("gradient_delay_iterations", "Delay of counted gradients.", _DELAYS)
        self.lag = self._histogram("gradient_lag_buckets", "Bucket lag of counted gradients.", _DELAYS)
        text = "Step size of applied gradients, as a share of the learning rate in force."
        self.step_scale = self._histogram("step_scale", text, _SCALES)
        self.update_seconds = self._histogram("update_duration_seconds", "Time to apply one gradient.", _SECONDS)
        self.lock_wait_seconds = self._histogram("lock_wait_seconds", "Time that inputs waited for the lock.", _SECONDS)

    def _gauges(self) -> None:
        self.iteration = self._gauge("iteration", "Gradients applied in the run.")
        # Not `newest_bucket`: names that end so are histograms'.
        self.newest_bucket = self._gauge("newest_bucket_number", "Newest bucket of any applied gradient.")
        self.bucket_size = self._gauge("bucket_size", "K, gradients in a bucket.")
        self.learning_rate = self._gauge("learning_rate", "Learning rate in force.")
        self.live_workers = self._gauge("live_workers", "Workers with a lease.")
        self.tickets_in_flight = self._gauge("tickets_in_flight", "Tickets handed out and not redeemed.")
        self.model_parameters = self._gauge("model_parameters", "Elements of all trainable tensors.")
        self.training_loss = self._gauge("training_loss", "Mean of the last losses that live workers reported.")
        self.checkpoint_timestamp = self._gauge(
            "checkpoint_last_success_timestamp_seconds", "When the last checkpoint was written, Unix time."
        )
        self.checkpoint_iteration = self._gauge("checkpoint_iteration", "Iteration that the last checkpoint holds.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"ormo_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"ormo_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"ormo_{name}", text, buckets=buckets, registry=self.registry)
