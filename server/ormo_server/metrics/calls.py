"""gRPC's calls, under the names that dashboards for gRPC know."""

from collections.abc import Iterable
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram

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
