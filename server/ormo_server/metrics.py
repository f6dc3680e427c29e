"""What the server exports to Prometheus. The names and their meanings are all here."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ormo_protos.reasons import Reason

_DELAYS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """The server's metrics, in a registry of their own. Children of known labels exist from the start, so that rates
    work from the first event."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._outcomes()
        self._distributions()
        self._gauges()

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
        for work in ("expiry", "checkpoints"):
            self.upkeep_failures.labels(work)
        self.checkpoint_failures = self._counter("checkpoint_failures", "Checkpoints that could not be written.")

    def _distributions(self) -> None:
        self.delay = self._histogram("gradient_delay_iterations", "Delay of counted gradients.", _DELAYS)
        self.lag = self._histogram("gradient_lag_buckets", "Bucket lag of counted gradients.", _DELAYS)
        self.update_seconds = self._histogram("update_duration_seconds", "Time to apply one gradient.", _SECONDS)
        self.lock_wait_seconds = self._histogram("lock_wait_seconds", "Time that inputs waited for the lock.", _SECONDS)

    def _gauges(self) -> None:
        self.iteration = self._gauge("iteration", "Gradients applied in the run.")
        self.newest_bucket = self._gauge("newest_bucket", "Newest bucket of any applied gradient.")
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
