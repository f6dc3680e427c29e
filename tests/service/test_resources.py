"""What the system must give before the server serves: how much that is, and what strangers can take of it."""

import contextlib
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ormo_server.service import resources
from ormo_server.service.resources import TooFewResources, most_connections, pool_of_threads
from ormo_server.service.server import Server
from security.authority import Authority, guarded
from service.wire import SMALL, WireWorker, connected, payload, served, settings

# HTTP/2's first bytes and an empty SETTINGS: a connection that is complete, and says no more.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"


@pytest.mark.parametrize(
    ("left", "allowed"),
    [  # beyond those that are open and those that are held back; 12 workers and readers, two addresses
        (resource.RLIM_INFINITY, 280),
        (100_000, 280),
        (400, 200),
        (24, 12),
    ],
)
def test_connections_are_twice_those_of_workers_and_readers_and_some_or_what_descriptors_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, allowed: int
) -> None:
    monkeypatch.setattr(os, "listdir", lambda path: ["0"] * 10)
    limit = left if left == resource.RLIM_INFINITY else 10 + 64 + left
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert most_connections(settings(tmp_path, max_workers=8, max_readers=4)) == allowed


def test_fewer_descriptors_than_workers_and_readers_need_are_refused_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "listdir", lambda path: ["0"] * 10)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (97, 97))
    with pytest.raises(TooFewResources, match="needs 98 file descriptors, and may have 97: raise the limit"):
        most_connections(settings(tmp_path, max_workers=8, max_readers=4))


def test_fewer_threads_than_are_needed_are_refused_with_their_number_and_none_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 x 8 x 2 for streams, 4 for readers and 32 for short calls; and 64 for all else."""
    start = threading.Thread.start
    started: list[threading.Thread] = []  # and not all that live: others may end meanwhile

    def limited(thread: threading.Thread) -> None:
        if sum(each.is_alive() for each in started) >= 131:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(TooFewResources, match=r"needs 132 threads.*lower --max-workers, --slots-per-worker"):
        pool_of_threads(settings(tmp_path, max_workers=8, max_readers=4))
    assert len(started) == 131
    assert not any(thread.is_alive() for thread in started)
    started.clear()
    with pool_of_threads(settings(tmp_path, max_workers=8, max_readers=3)):
        assert sum(thread.is_alive() for thread in started) == 67


@pytest.fixture
def four_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_OTHER_CONNECTIONS", 0)


FEW = {"max_workers": 1, "max_readers": 1}


@contextlib.contextmanager
def strangers(server: Server, count: int, says: bytes) -> Iterator[list[socket.socket]]:
    host, _, port = server.address.rpartition(":")
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            made.append(stack.enter_context(socket.create_connection((host, int(port)), timeout=20)))
            with contextlib.suppress(OSError):
                made[-1].sendall(says)
        yield made


def ended(connection: socket.socket) -> bool:
    """Waits for the end, past what comes before it."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(1 << 16):
            pass
    return True


@pytest.mark.usefixtures("four_connections")
def test_a_worker_trains_on_beside_as_many_connections_as_there_may_be_and_silent_ones_end(tmp_path: Path) -> None:
    with served(tmp_path, **FEW, failure_timeout_seconds=1.0) as server, connected(server) as stub:
        worker = WireWorker(stub, "w", SMALL)
        worker.join()
        worker.pull()
        with strangers(server, 6, PREFACE) as silent:
            assert all(ended(connection) for connection in silent[3:])
            assert worker.push(payload(SMALL, 1.0)).iteration.number == 1
            assert all(ended(connection) for connection in silent[:3])
        with connected(server) as other:
            assert WireWorker(other, "w", SMALL).pull(ticket=False).payload_bytes


@pytest.mark.usefixtures("four_connections")
def test_who_does_not_show_a_certificate_is_bounded_and_ends_as_well(tmp_path: Path) -> None:
    with guarded(tmp_path, Authority(tmp_path), **FEW, failure_timeout_seconds=1.0) as server:
        for says in (b"", b"\x16\x03\x01\x02\x00\x01"):
            with strangers(server, 20, says) as silent:
                assert all(ended(connection) for connection in silent)
