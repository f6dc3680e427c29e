"""Slow and many callers of the port for metrics: what they get, and that they keep nobody out."""

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from ormo_runtime import http_port
from ormo_runtime.http_port import CONNECTIONS, HttpPort

BEGUN = b"GET /metrics HTTP/1.1\r\nX: "


def hello(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello\n"]


@pytest.fixture
def port() -> Iterator[HttpPort]:
    made = HttpPort("127.0.0.1", 0, hello)
    yield made
    made.close()


def asked(port: HttpPort) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port.server_port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", "/alive")
        return connection.getresponse().read()


@contextlib.contextmanager
def slow_callers(port: HttpPort, count: int) -> Iterator[list[socket.socket]]:
    """Connections that have begun a request, and say no more."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            made.append(stack.enter_context(socket.create_connection(("127.0.0.1", port.server_port), timeout=20)))
            made[-1].sendall(BEGUN)
        yield made


def was_cut(connection: socket.socket) -> bool:
    """Waits for it."""
    with contextlib.suppress(ConnectionError):
        return connection.recv(1) == b""
    return True


def test_a_probe_is_answered_while_slow_callers_hold_all_places(port: HttpPort) -> None:
    with slow_callers(port, 10 * CONNECTIONS) as slow:
        for _ in range(3):
            assert asked(port) == b"hello\n"
        assert all(was_cut(connection) for connection in slow[: 9 * CONNECTIONS])


def test_the_address_with_the_most_connections_makes_room(port: HttpPort) -> None:
    with socket.create_connection(("127.0.0.1", port.server_port), 20, ("127.0.0.2", 0)) as modest:
        modest.sendall(BEGUN)  # the oldest
        with slow_callers(port, 5 * CONNECTIONS) as slow:
            assert all(was_cut(connection) for connection in slow[: 4 * CONNECTIONS])
            modest.sendall(b"\r\n\r\n")
            assert modest.recv(1 << 16).startswith(b"HTTP/1.0 200 OK")


def test_many_callers_take_neither_threads_nor_descriptors(port: HttpPort) -> None:
    before = threading.active_count()
    with slow_callers(port, 20 * CONNECTIONS) as slow:
        assert asked(port) == b"hello\n"
        assert threading.active_count() == before
        assert was_cut(slow[0])
        assert len(port._open) <= CONNECTIONS + 1


def test_who_takes_too_long_is_cut_off_also_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_port, "ANSWER_SECONDS", 0.2)
    with contextlib.closing(HttpPort("127.0.0.1", 0, hello)) as port, slow_callers(port, 1) as (slow,):
        stop = threading.Event()

        def dribble() -> None:  # each byte is in time, and the whole is not
            with contextlib.suppress(OSError):
                while not stop.wait(0.05):
                    slow.sendall(b"x")

        thread = threading.Thread(target=dribble)
        thread.start()
        assert was_cut(slow)
        stop.set()
        thread.join()
        assert asked(port) == b"hello\n"


def test_who_does_not_read_the_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [])
        while True:
            yield bytes(1 << 20)

    monkeypatch.setattr(http_port, "ANSWER_SECONDS", 0.2)
    with contextlib.closing(HttpPort("127.0.0.1", 0, endless)) as port, slow_callers(port, 1) as (slow,):
        slow.sendall(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while slow.recv(1 << 20):
                pass


def test_who_is_cut_off_is_no_news(port: HttpPort, capfd: pytest.CaptureFixture[str]) -> None:
    with slow_callers(port, 4 * CONNECTIONS) as slow:
        assert was_cut(slow[0])
    port.close()
    assert capfd.readouterr().err == ""


def test_closing_ends_the_threads_and_whoever_is_connected() -> None:
    before = set(threading.enumerate())
    port = HttpPort("127.0.0.1", 0, hello)
    with slow_callers(port, 3) as slow:
        assert asked(port) == b"hello\n"  # all are in
        port.close()
        assert all(was_cut(connection) for connection in slow)
    assert not set(threading.enumerate()) - before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port.server_port))


def test_a_port_without_threads_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            HttpPort("127.0.0.1", number, hello)
    HttpPort("127.0.0.1", number, hello).close()


def test_a_request_that_the_application_fails_on_is_answered_and_is_one_line_in_the_log(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Newer releases of the library for metrics fail on a version that is no number: tracebacks could fill a disk."""

    def failing(environ: dict[str, Any], _: Any) -> list[bytes]:
        raise ValueError(environ["HTTP_ACCEPT"])

    port = HttpPort("127.0.0.1", 0, failing)
    connection = http.client.HTTPConnection("127.0.0.1", port.server_port, timeout=20)
    with contextlib.closing(port), contextlib.closing(connection):
        connection.request("GET", "/metrics", headers={"Accept": "text/plain; version=a"})
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (400, b"this request could not be answered\n")
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "a request from 127.0.0.1 could not be answered"
    ]
    assert capfd.readouterr().err == ""


def test_an_answer_that_can_not_be_written_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    def wrong(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [])
        yield b"begun"
        raise TimeoutError

    port = HttpPort("127.0.0.1", 0, wrong)
    with contextlib.closing(port):
        asked(port)
    assert capfd.readouterr().err == ""
