"""What the server says over HTTP: metrics for Prometheus, and two words for probes that can't speak gRPC or TLS."""

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, make_wsgi_app

from ormo_runtime.http_port import HttpPort

ALIVE, READY = "/alive", "/ready"


def serve(
    host: str, port: int, registry: CollectorRegistry, alive: Callable[[], bool], ready: Callable[[], bool]
) -> HttpPort:
    """Answer until the port is closed.

    Args:
        host: to listen on.
        port: to listen on; 0 picks a free one.
        registry: of the metrics.
        alive: whether calls can be answered at all; `/alive` says 503 where not, and so does `/ready`.
        ready: whether new calls are welcome.

    Raises:
        OSError, OverflowError, RuntimeError: see `HttpPort`.
    """
    metrics: Any = make_wsgi_app(registry)
    probes: dict[str, Callable[[], bool]] = {ALIVE: alive, READY: lambda: alive() and ready()}

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        probe = probes.get(environ["PATH_INFO"])
        if probe is None:
            answered: Iterable[bytes] = metrics(environ, start_response)
            return answered
        good = probe()
        start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"yes\n" if good else b"no\n"]

    return HttpPort(host, port, answer)
