"""What the proxy does to connections is what it says."""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from chaos.proxy import Proxy, Way


@contextlib.contextmanager
def carried() -> Iterator[tuple[Proxy, socket.socket, socket.socket]]:
    """A proxy, and both ends of a connection through it."""
    proxy = Proxy()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy.lead_to(f"127.0.0.1:{listener.getsockname()[1]}")
        host, _, port = proxy.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as near, listener.accept()[0] as far:
            far.settimeout(5)
            near.sendall(b"there")
            assert far.recv(5) == b"there"
            far.sendall(b"back")
            assert near.recv(4) == b"back"
            yield proxy, near, far
    proxy.close()


@pytest.mark.parametrize("attempt", range(8))
def test_both_ends_of_a_connection_that_breaks_see_a_reset_and_no_goodbye(attempt: int) -> None:
    with carried() as (proxy, near, far):
        assert proxy.reset() == 1
        for end in (near, far):
            with pytest.raises(ConnectionResetError):
                end.recv(1)


def test_what_comes_while_it_is_silent_is_late_and_counted() -> None:
    with carried() as (proxy, near, far):
        far.settimeout(0.2)
        with proxy.silent(Way.TO_SERVER):
            near.sendall(b"late")
            with pytest.raises(TimeoutError):
                far.recv(4)
            assert proxy.held == 1
        far.settimeout(5)
        assert far.recv(4) == b"late"
        assert proxy.carried == {Way.TO_SERVER: 9, Way.TO_WORKER: 4}
