"""How gradients land: how late, with how much of the learning rate, how long they are."""

from ormo_server.metrics.families import Families

# A run has from one to some thousand slots, and the usual delay is about their number.
_DELAYS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
_LAGS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)
# Around 1, where K equal workers have most of their gradients, the buckets are finest.
_RELATIVE_DELAYS = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)
_STALENESS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)
# Most scales are at most 1; `rescaled` has a mean of 1 and gives slow workers more.
_SCALES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
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
        self._samples = families.counter("samples", "Training samples in applied gradients.")

    def counted(self, delay: int, lag_buckets: int, bucket_size: int, ticket_seconds: float) -> None:
        """A gradient was applied or discarded.

        Args:
            delay: in iterations.
            lag_buckets: behind the newest bucket.
            bucket_size: K.
            ticket_seconds: from handing its ticket out to counting it.
        """
        self._delay.observe(delay)
        self._relative_delay.observe(delay / bucket_size)
        self._lag.observe(lag_buckets)
        self._staleness.observe(ticket_seconds)

    def applied(self, samples: int, norm: float, *, buffers_kept: bool) -> None:
        """It was applied, if need be without some of its buffers."""
        self._samples.inc(samples)
        self._kept_buffers.inc(buffers_kept)
        self._norm.observe(norm)

    def clipped(self) -> None:
        """It was scaled down to the largest norm allowed."""
        self._clipped.inc()

    def scaled(self, scale: float) -> None:
        """It was applied with so much of the learning rate."""
        self._scale.observe(scale)
