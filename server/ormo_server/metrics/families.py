"""How the server's metrics are made: one prefix, one registry, children of known labels from the start."""

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics

from ormo_server.metrics.distributions import Distribution, Distributions

# Else each counter and histogram has one series more, for when it was made; `process_start_time_seconds` says that.
disable_created_metrics()  # type: ignore[no-untyped-call]

PREFIX = "ormo_"
# From 100 µs, a small model's update, to 30 s, a large one's way over a slow network.
SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Families:
    """Makes metrics in one registry. Those with known labels get all children at once, so that rates work from the
    first event."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, text: str, *labels: str, known: Iterable[Sequence[str]] = ()) -> Counter:
        """A counter; `_total` is added to its name."""
        made = Counter(PREFIX + name, text, labels, registry=self._registry)
        for values in known:
            made.labels(*values)
        return made

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        """A gauge."""
        return Gauge(PREFIX + name, text, labels, registry=self._registry)

    def histogram(self, name: str, text: str, bounds: Sequence[float]) -> Distribution:
        """A histogram with these upper bounds."""
        return Distributions(PREFIX + name, text, bounds, self._registry).of[""]

    def histograms(
        self, name: str, text: str, bounds: Sequence[float], label: str, known: Iterable[str]
    ) -> dict[str, Distribution]:
        """A histogram for each value of a label."""
        return Distributions(PREFIX + name, text, bounds, self._registry, label, known).of
