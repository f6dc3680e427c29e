"""What the server does besides exchanges: its lock, its members, its checkpoints."""

from collections.abc import Callable

from ormo_server.metrics.families import SECONDS, Families

# A checkpoint of a large model to a slow disk takes minutes.
_CHECKPOINT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
WORKS = ("expiry", "checkpoints", "trace", "journal")


class Upkeep:
    """Locks and members."""

    def __init__(self, families: Families) -> None:
        self.lock_wait_seconds = families.histogram(
            "lock_wait_seconds", "Time that inputs of any kind waited for the one lock.", SECONDS
        )
        self.lock_held_seconds = families.counter(
            "lock_held_seconds", "Time for which the one lock was held; its rate is the share of time."
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
        self._duration.observe(seconds)
        self._timestamp.set_to_current_time()
        self._iteration.set(iteration)
        self._bytes.set(size_bytes)


class Streams:
    """How many calls hold a thread."""

    def __init__(self, families: Families) -> None:
        self._open = families.gauge("open_streams", "Open streams of workers and of readers.", "kind")

    def count(self, kind: str, count: Callable[[], float]) -> None:
        """Ask for the number at each scrape."""
        self._open.labels(kind).set_function(count)
