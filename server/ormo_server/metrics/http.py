"""What the server says over HTTP: metrics for Prometheus, and two words for probes that can't speak gRPC or TLS."""

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

ALIVE, READY = "/alive", "/ready"


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Silent(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Scrapes and probes are no news."""


def serve(host: str, port: int, registry: CollectorRegistry, ready: Callable[[], bool]) -> WSGIServer:
    """Answer in threads of its own, until `shutdown` and `server_close` are called.

    Args:
        host: to listen on.
        port: to listen on; 0 picks a free one.
        registry: of the metrics.
        ready: whether new calls are welcome; `/ready` says 503 where not, `/alive` always says 200.

    Raises:
        OSError, OverflowError: the port can't be had.
    """
    metrics: Any = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path not in (ALIVE, READY):
            answered: Iterable[bytes] = metrics(environ, start_response)
            return answered
        good = path == ALIVE or ready()
        start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"yes\n" if good else b"no\n"]

    bare = host.strip("[]")
    server = make_server(bare, port, answer, _Server6 if ":" in bare else _Server, _Silent)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
