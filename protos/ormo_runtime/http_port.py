"""A port for metrics and probes. It asks callers for no proof of who they are, so it limits slow and numerous ones."""

import contextlib
import io
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import WSGIApplication

from typing_extensions import override

from ormo_runtime.process import StartedPool

_LOG = logging.getLogger(__name__)

# Each has a thread. Prometheus and two probes need one each, for milliseconds.
CONNECTIONS = 8
# Prometheus waits no longer by default.
ANSWER_SECONDS = 10.0
# When descriptors run out, accepting fails at once, and a loop without a pause would spin.
_PAUSE_SECONDS = 0.1


class HttpPort(WSGIServer):
    """Answers in threads of its own until `close`.

    A connection that is not done after `ANSWER_SECONDS` is cut off. When there is no room for a new one, the oldest
    connection of the address that has the most is cut off, so that a flood loses connections before a probe does.

    Args:
        host: to listen on; an IPv6 address may be in brackets.
        port: to listen on; 0 picks a free one.
        answer: a WSGI application.

    Raises:
        OSError, OverflowError: the port can't be opened.
        RuntimeError: the system has too few threads left.
    """

    request_queue_size = 64

    def __init__(self, host: str, port: int, answer: WSGIApplication) -> None:
        bare = host.strip("[]")
        self.address_family = socket.AF_INET6 if ":" in bare else socket.AF_INET
        # Oldest first, by insertion. The accepting thread adds, the thread that answers removes: each is one operation
        # on the dict, which the interpreter does at once, and whoever looks through it copies it first.
        self._open: dict[socket.socket, tuple[str, float]] = {}
        self._places = threading.Semaphore(CONNECTIONS)
        super().__init__((bare, port), _Silent)
        self.set_app(_always_answer(answer))
        try:
            self._pool = StartedPool(CONNECTIONS, "http")
            self._accepting = threading.Thread(target=self.serve_forever, name="http", daemon=True)
            self._accepting.start()
        except RuntimeError:
            self.server_close()
            raise

    def close(self) -> None:
        """Stop, and cut off all connections."""
        self.shutdown()
        self._accepting.join()
        self.server_close()
        for connection in list(self._open):
            _cut(connection)
        self._pool.shutdown()

    # What `socketserver` calls, in the one thread that accepts

    @override
    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(_PAUSE_SECONDS)
            raise

    @override
    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._open) >= CONNECTIONS:
            self._make_room()
        self._places.acquire()  # waits for the thread of a connection that was cut, which is milliseconds
        self._open[request] = (client_address[0], time.monotonic())
        self._pool.submit(self._answer, request, client_address)

    def _make_room(self) -> None:
        connections = list(self._open.items())  # oldest first
        count = Counter(host for _, (host, _) in connections)
        if connections:
            _cut(max(connections, key=lambda each: count[each[1][0]])[0])

    @override
    def service_actions(self) -> None:
        # Called twice a second, and at each connection.
        now = time.monotonic()
        for connection, (_, began) in list(self._open.items()):
            if now - began > ANSWER_SECONDS:
                _cut(connection)

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was cut off, or went away, is no news

    # In the pool's threads

    def _answer(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        finally:
            del self._open[request]
            self.shutdown_request(request)
            self._places.release()


def _always_answer(answer: WSGIApplication) -> WSGIApplication:
    """Wrap an application so that it always answers: it may fail on headers that make no sense."""

    def always(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        try:
            return answer(environ, start_response)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is one answer less, and one line
            _LOG.warning("a request from %s could not be answered (%r)", environ["REMOTE_ADDR"], error)
            start_response("400 Bad Request", [("Content-Type", "text/plain")])
            return [b"this request could not be answered\n"]

    return always


class _Silent(WSGIRequestHandler):
    timeout = ANSWER_SECONDS

    @override
    def get_stderr(self) -> io.StringIO:
        # What fails while an answer is sent is its caller's concern, who could fill a disk with lines about it.
        return io.StringIO()

    @override
    def log_message(self, *_: object) -> None:
        pass  # scrapes and probes are no news


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended already
        connection.shutdown(socket.SHUT_RDWR)  # wakes its thread, which closes it
