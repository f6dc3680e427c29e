"""All metrics of the server but the run's own figures: their names, their labels, and where they are counted."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from ormo_protos.refusals import Reason
from ormo_server.metrics.noted import Distribution, Distributions, Noted, Tally

# Else each counter and histogram has one series more, for when it was made; `process_start_time_seconds` says that.
disable_created_metrics()  # type: ignore[no-untyped-call]

PREFIX = "ormo_"
# From 100 µs, a small model's update, to 30 s, a large one's way over a slow network.
SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Families(Collector):
    """Makes metrics in one registry. Those with known labels get all children at once, so that rates work from the
    first event."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._noted: list[Noted] = []
        registry.register(self)  # before all that it makes, which is settled when it is collected

    def settle(self) -> None:
        """Count all that was noted."""
        for each in self._noted:
            each.settle()

    @override
    def collect(self) -> Iterable[Metric]:
        self.settle()
        return ()

    def counter(self, name: str, text: str, *labels: str, known: Iterable[Sequence[str]] = ()) -> Counter:
        """A counter; `_total` is added to its name."""
        made = Counter(PREFIX + name, text, labels, registry=self._registry)
        for values in known:
            made.labels(*values)
        return made

    def tally(self, counter: Counter) -> Tally:
        """What counts in this series from the hot path."""
        made = Tally(counter)
        self._noted.append(made)
        return made

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        """A gauge."""
        return Gauge(PREFIX + name, text, labels, registry=self._registry)

    def histogram(self, name: str, text: str, bounds: Sequence[float]) -> Distribution:
        """A histogram with these upper bounds."""
        return self.histograms(name, text, bounds, "", ("",))[""]

    def histograms(
        self, name: str, text: str, bounds: Sequence[float], label: str, known: Iterable[str]
    ) -> dict[str, Distribution]:
        """A histogram for each value of a label."""
        made = Distributions(PREFIX + name, text, bounds, self._registry, label, known).of
        self._noted += made.values()
        return made


STAGES = ("receive", "check", "lock", "apply", "wait", "copy", "send")
# The methods that carry tensors, by direction.
RECEIVING = ("PushPull", "PushGradient", "OfferModel")
SENDING = ("PushPull", "PullParams")
# Why single gradients and single requests for parameters are refused; other reasons come as they occur.
_USUAL = (
    Reason.NON_FINITE,
    Reason.NORM_TOO_LARGE,
    Reason.TICKET_UNKNOWN,
    Reason.FINISHED,
    Reason.BAD_PAYLOAD,
    Reason.NOT_A_MEMBER,
)


class Traffic:
    """Counters of what the service does. `reason` is empty but for what was refused."""

    def __init__(self, families: Families) -> None:
        refused = [("refused", reason.value) for reason in _USUAL]
        self.pushes = families.counter(
            "pushes",
            "Gradients received.",
            "outcome",
            "reason",
            known=[("applied", ""), ("discarded", ""), ("repeated", ""), *refused],
        )
        self.pulls = families.counter(
            "pulls",
            "Requests for parameters.",
            "outcome",
            "reason",
            known=[("ticket", ""), ("reader", ""), ("not_modified", ""), *refused],
        )
        self.refusals = families.counter(
            "refusals", "Calls and gradients refused.", "reason", known=[(reason.value,) for reason in Reason]
        )
        self._bytes(families)
        self.stage = families.histograms(
            "exchange_stage_seconds",
            "Time of an exchange by stage: receiving the gradient, checking that it is finite, waiting for the lock, "
            "applying, waiting for the next ticket, copying the parameters, sending them.",
            SECONDS,
            "stage",
            STAGES,
        )
        # `labels` takes longer than what it leads to: the hot path has its children at hand.
        self.applied = families.tally(self.pushes.labels("applied", ""))
        self.discarded = families.tally(self.pushes.labels("discarded", ""))
        self.repeated = families.tally(self.pushes.labels("repeated", ""))
        self.ticketed = families.tally(self.pulls.labels("ticket", ""))
        self.read = families.tally(self.pulls.labels("reader", ""))
        self.not_modified = families.tally(self.pulls.labels("not_modified", ""))

    def _bytes(self, families: Families) -> None:
        received = families.counter("received_bytes", "Tensor bytes received.", "method")
        sent = families.counter("sent_bytes", "Tensor bytes sent.", "method")
        self.received_bytes = {method: families.tally(received.labels(method)) for method in RECEIVING}
        self.sent_bytes = {method: families.tally(sent.labels(method)) for method in SENDING}

    def push_refused(self, reason: Reason) -> None:
        """A gradient was not taken."""
        self.pushes.labels("refused", reason.value).inc()

    def pull_refused(self, reason: Reason) -> None:
        """Parameters were asked for and not sent."""
        self.pulls.labels("refused", reason.value).inc()

    def refused(self) -> dict[str, int]:
        """How many calls and gradients were refused, by reason; only reasons that occurred."""
        samples = next(iter(self.refusals.collect())).samples
        counts = {s.labels["reason"]: int(s.value) for s in samples if s.name.endswith("_total")}
        return {reason: count for reason, count in counts.items() if count}


# A run has from one to some thousand slots, and the usual delay is about their number.
_DELAYS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
_LAGS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)
# Around 1, where K equal workers have most of their gradients, the buckets are finest.
_RELATIVE_DELAYS = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)
_STALENESS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)
# Most scales are at most 1; `rescaled` has a mean of 1 and gives slow workers more.
_SCALES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_LOCAL_STEPS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
_NORMS = tuple(float(f"{digit}e{power}") for power in range(-6, 7) for digit in (1, 3))[:-1]


class Gradients:
    """Distributions over the gradients of all workers. Those of single workers are gauges, see `run`."""

    def __init__(self, families: Families) -> None:
        self._delay = families.histogram(
            "gradient_delay_iterations",
            "Delay of counted gradients: gradients applied since their parameters went out.",
            _DELAYS,
        )
        self._relative_delay = families.histogram(
            "gradient_relative_delay",
            "Delay of counted gradients as a multiple of K; about 1 if all workers are equally fast.",
            _RELATIVE_DELAYS,
        )
        self._lag = families.histogram(
            "gradient_lag_buckets",
            "Bucket lag of counted gradients: how many buckets behind the newest they count in.",
            _LAGS,
        )
        self._staleness = families.histogram(
            "gradient_staleness_seconds",
            "Time from handing a ticket and its parameters out to counting the gradient.",
            _STALENESS_SECONDS,
        )
        self._scale = families.histogram(
            "step_scale", "Step size of applied gradients, as a share of the learning rate in force.", _SCALES
        )
        self._norm = families.histogram("gradient_norm", "Euclidean norm of applied gradients.", _NORMS)
        self._clipped = families.counter("clipped_gradients", "Gradients scaled down to the largest norm allowed.")
        self._kept_buffers = families.counter(
            "kept_buffers", "Applied gradients with NaN or infinity in a buffer, of which the server kept its own."
        )
        self._samples = families.tally(families.counter("samples", "Training samples in applied gradients."))
        self._local_steps = families.histogram(
            "gradient_local_steps", "Local steps in applied pseudo-gradients; of a run without, none.", _LOCAL_STEPS
        )
        self._lost_local_steps = families.counter(
            "lost_local_steps",
            "Local steps that can never count: their ticket was void when they came, or its worker is gone or had it "
            "for too long. Then they are not known, and all that the ticket was for count.",
        )

    def counted(self, delay: int, lag_buckets: int, bucket_size: int, ticket_seconds: float) -> None:
        """A gradient was applied or discarded.

        Args:
            delay: in iterations.
            lag_buckets: behind the newest bucket.
            bucket_size: K.
            ticket_seconds: from handing its ticket out to counting it.
        """
        self._delay.note(delay)
        self._relative_delay.note(delay / bucket_size)
        self._lag.note(lag_buckets)
        self._staleness.note(ticket_seconds)

    def applied(self, samples: int, local_steps: int, norm: float, *, buffers_kept: bool) -> None:
        """It was applied, if need be without some of its buffers."""
        self._samples.note(samples)
        if local_steps:
            self._local_steps.note(local_steps)
        if buffers_kept:
            self._kept_buffers.inc()
        self._norm.note(norm)

    def lost(self, local_steps: int) -> None:
        """So many local steps can never count."""
        self._lost_local_steps.inc(local_steps)

    def clipped(self) -> None:
        """It was scaled down to the largest norm allowed."""
        self._clipped.inc()

    def scaled(self, scale: float) -> None:
        """It was applied with so much of the learning rate."""
        self._scale.note(scale)


# A checkpoint of a large model to a slow disk takes minutes.
_CHECKPOINT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
WORKS = ("expiry", "checkpoints", "trace", "journal")


class Upkeep:
    """Locks and members."""

    def __init__(self, families: Families) -> None:
        self.lock_wait_seconds = families.histogram(
            "lock_wait_seconds", "Time that inputs of any kind waited for the one lock.", SECONDS
        )
        self.lock_held_seconds = families.tally(
            families.counter(
                "lock_held_seconds", "Time for which the one lock was held; its rate is the share of time."
            )
        )
        self.joins = families.counter("joins", "Times that a worker joined.")
        self.expired_workers = families.counter("expired_workers", "Workers whose lease ran out.")
        self.expired_tickets = families.counter("expired_tickets", "Tickets of live workers that were out too long.")
        self.failures = families.counter(
            "upkeep_failures",
            "Background work that failed: ending leases, writing checkpoints, the trace or the journal.",
            "work",
            known=[(work,) for work in WORKS],
        )


class Checkpoints:
    """Where the run is safe."""

    def __init__(self, families: Families) -> None:
        self._families = families
        self.failures = families.counter("checkpoint_failures", "Checkpoints that could not be written.")
        self._duration = families.histogram(
            "checkpoint_duration_seconds", "Time to copy the state and write it to the disk.", _CHECKPOINT_SECONDS
        )
        self._interval = families.gauge("checkpoint_interval_seconds", "Time between checkpoints, as set.")
        self._timestamp = families.gauge(
            "checkpoint_last_success_timestamp_seconds", "When the last checkpoint was written, Unix time."
        )
        self._iteration = families.gauge(
            "checkpoint_iteration", "Iteration that the last checkpoint holds; none is written while it stands still."
        )
        self._bytes = families.gauge("checkpoint_last_size_bytes", "Size of the last checkpoint on the disk.")

    def every(self, seconds: float) -> None:
        """How often one is written."""
        self._interval.set(seconds)

    def written(self, iteration: int, size_bytes: int, seconds: float) -> None:
        """One is on the disk."""
        self._duration.note(seconds)
        self._timestamp.set_to_current_time()
        self._iteration.set(iteration)
        self._bytes.set(size_bytes)


class MirrorMetrics:
    """Copies of checkpoints elsewhere. All are 0 without `--mirror`."""

    def __init__(self, families: Families) -> None:
        self.failures = families.counter("mirror_failures", "Times that copying to the mirror, or its lease, failed.")
        self._timestamp = families.gauge(
            "mirror_last_success_timestamp_seconds", "When the last checkpoint was copied to the mirror, Unix time."
        )
        self._iteration = families.gauge("mirror_iteration", "Iteration of the last checkpoint in the mirror.")
        self._behind = families.gauge(
            "mirror_behind_seconds",
            "Time since the oldest checkpoint was written that the mirror should have and has not; 0 if it has all.",
        )

    def behind(self, seconds: Callable[[], float]) -> None:
        """Ask for the time at each scrape."""
        self._behind.set_function(seconds)

    def copied(self, iteration: int) -> None:
        """A checkpoint is in the mirror."""
        self._timestamp.set_to_current_time()
        self._iteration.set(iteration)


class Streams:
    """How many calls hold a thread."""

    def __init__(self, families: Families) -> None:
        self._open = families.gauge("open_streams", "Open streams of workers and of readers.", "kind")

    def count(self, kind: str, count: Callable[[], float]) -> None:
        """Ask for the number at each scrape."""
        self._open.labels(kind).set_function(count)


class JournalMetrics:
    """How large the journal is, and how long answers wait for it."""

    def __init__(self, families: Families) -> None:
        self.commit_seconds = families.histogram(
            "journal_commit_seconds",
            "Time of one write of the journal, with its fsync, for all calls that wait for it.",
            SECONDS,
        )
        self._size = families.gauge("journal_size_bytes", "Bytes in the journal since the last checkpoint; 0 without.")

    def size(self, size: Callable[[], float]) -> None:
        """Ask for the size at each scrape."""
        self._size.set_function(size)


_LABELS = ("grpc_type", "grpc_service", "grpc_method")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Method(NamedTuple):
    """One method of a service, as the labels say it.

    Attributes:
        type: `unary`, `client_stream`, `server_stream` or `bidi_stream`.
        service: full name.
        method: its name.
    """

    type: str
    service: str
    method: str


class Calls:
    """Counts calls and their time. A PushPull stream is one call, however many exchanges it carries."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.started = Counter("grpc_server_started", "Calls that began.", _LABELS, registry=registry)
        self.handled = Counter(
            "grpc_server_handled", "Calls that ended, by status code.", (*_LABELS, "grpc_code"), registry=registry
        )
        self.seconds = Histogram(
            "grpc_server_handling_seconds",
            "Time from a call's begin to its end.",
            _LABELS,
            registry=registry,
            buckets=_SECONDS,
        )

    def expect(self, methods: Iterable[Method]) -> None:
        """Let their series exist before the first call."""
        for method in methods:
            self.started.labels(*method)
            self.handled.labels(*method, "OK")
            self.seconds.labels(*method)
