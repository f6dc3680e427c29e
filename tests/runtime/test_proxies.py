"""Proxies of the environment: never to this machine, and named in what is said of a connection that fails."""

import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import grpc
import pytest

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.tls import Dialer, UnaryStub, through_proxy
from ormo_server.cli import main
from ormo_worker import RemoteOptimizer
from ormo_worker.errors import ServerUnreachable
from service.wire import served
from worker.models import line

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxies_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Proxy:
    """Refuses everybody, and counts them."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(4096))
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    yield made
    made.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LocalHost", "127.8.9.1", "[::1]"])
@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
def test_this_machine_is_never_asked_through_a_proxy(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, host: str, variable: str
) -> None:
    monkeypatch.setenv(variable, f"http://{proxy.address}")
    with Dialer(f"{host}:1", None).dial() as channel, pytest.raises(grpc.RpcError):
        UnaryStub(channel).get_status(pb.GetStatusRequest(), timeout=20)
    assert proxy.asked == []


def test_a_server_on_this_machine_answers_whatever_the_proxy(
    tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
    with served(tmp_path) as server:
        assert main(["status", "--server", server.address]) == 0
        with RemoteOptimizer(line(), server.address, connect_timeout=20.0) as optimizer:
            assert optimizer.iteration == 0
    assert proxy.asked == []
    assert f"server  {server.address}, version" in capsys.readouterr().out


def test_what_fails_elsewhere_names_the_proxy_and_its_variable(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:secret@{proxy.address}")
    way = f"server.invalid:50051 through the proxy {proxy.address} (http_proxy; to do without it, name the host in no_p"
    with pytest.raises(ServerUnreachable) as failed:
        RemoteOptimizer(line(), "server.invalid:50051", connect_timeout=0.2)
    assert way in str(failed.value)
    assert f"joining the run at {way}" in caplog.text
    assert main(["status", "--server", "server.invalid:50051", "--timeout-seconds", "20"]) == 1
    said = capsys.readouterr().err
    assert f"ormo-server status: no answer from {way}" in said
    assert "secret" not in f"{failed.value}{caplog.text}{said}"
    assert proxy.asked[0].startswith(b"CONNECT server.invalid:50051")


PROXY = "http://{}"
ELSEWHERE = "http://127.0.0.1:1"
# As gRPC judges them, with names of this machine in the place of others'.
CASES: list[tuple[Mapping[str, str], str, bool]] = [
    ({"http_proxy": PROXY}, "127.0.0.1", True),
    ({"https_proxy": PROXY}, "localhost", True),
    ({"grpc_proxy": PROXY, "http_proxy": ELSEWHERE}, "localhost", True),
    ({"https_proxy": PROXY, "http_proxy": ELSEWHERE}, "localhost", True),
    ({"HTTP_PROXY": PROXY, "HTTPS_PROXY": PROXY}, "localhost", False),
    ({"grpc_proxy": "", "http_proxy": PROXY}, "localhost", False),
    ({"http_proxy": "{}"}, "localhost", False),
    ({"http_proxy": "https://{}"}, "localhost", False),
    ({"http_proxy": "socks5://{}"}, "localhost", False),
    ({"http_proxy": PROXY, "no_proxy": "localhost"}, "localhost", False),
    ({"http_proxy": PROXY, "no_proxy": "a, LOCALhost ,b"}, "localhost", False),
    ({"http_proxy": PROXY, "no_proxy": "host"}, "localhost", True),
    ({"http_proxy": PROXY, "no_proxy": ".localhost"}, "localhost", False),
    ({"http_proxy": PROXY, "no_proxy": "0.0.1"}, "127.0.0.1", False),  # as if it were a domain
    ({"http_proxy": PROXY, "no_proxy": "*"}, "localhost", True),
    ({"http_proxy": PROXY, "no_proxy": ""}, "localhost", True),
    ({"http_proxy": PROXY, "NO_PROXY": "localhost"}, "localhost", True),
    ({"http_proxy": PROXY, "no_proxy": "127.0.0.0/8"}, "127.0.0.1", False),
    ({"http_proxy": PROXY, "no_proxy": "10.0.0.0/8"}, "127.0.0.1", True),
    ({"http_proxy": PROXY, "no_proxy": "::/64"}, "[::1]", False),
    ({"http_proxy": PROXY, "no_proxy": "::1"}, "[::1]", False),
    ({"http_proxy": PROXY, "no_proxy": "localhost", "no_grpc_proxy": "x"}, "localhost", True),
]


@pytest.mark.parametrize(("environment", "host", "taken"), CASES)
def test_a_proxy_is_named_where_grpc_takes_it(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], host: str, taken: bool
) -> None:
    set_ = {name: value.format(proxy.address) for name, value in environment.items()}
    for name, value in set_.items():
        monkeypatch.setenv(name, value)
    with grpc.insecure_channel(f"{host}:1") as channel, pytest.raises(grpc.RpcError):
        UnaryStub(channel).get_status(pb.GetStatusRequest(), timeout=20)
    assert bool(proxy.asked) == taken
    monkeypatch.setattr("ormo_runtime.tls.is_loopback", lambda _: False)
    assert (proxy.address in through_proxy(f"{host}:1", set_)) == taken
