"""Who gets a connection at all, and how certificates are replaced without a restart."""

import contextlib
import logging
import socket
import ssl
from pathlib import Path

import grpc
import pytest

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.tls import Credentials, CredentialsError
from ormo_server.security import server_credentials
from ormo_server.service.server import Server
from security.authority import Authority, dialled, guarded
from service.wire import SMALL as MODEL
from service.wire import WireWorker, eventually, payload, received_bytes, served, state_of


def answers(server: Server, credentials: Credentials | None) -> bool:
    """Whether a new connection gets an answer, and not the failure to connect."""
    with dialled(server, credentials) as stub:
        try:
            stub.GetStatus(pb.GetStatusRequest(), timeout=5)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
            return False
    return True


def test_a_worker_with_a_certificate_trains(tmp_path: Path, authority: Authority) -> None:
    with guarded(tmp_path, authority) as server, dialled(server, authority.credentials("gpu-1")) as stub:
        worker = WireWorker(stub, "gpu-1")
        worker.join()
        worker.pull()
        assert worker.push(payload(MODEL, 1.0)).iteration.number == 1


def test_who_has_no_sound_certificate_gets_no_connection(tmp_path: Path, authority: Authority) -> None:
    other = Authority(tmp_path)
    with guarded(tmp_path, authority) as server:
        with dialled(server, authority.credentials("gpu-1")) as stub:
            WireWorker(stub, "gpu-1").join()
        before = state_of(server), received_bytes(server)
        assert answers(server, authority.credentials("gpu-2"))
        assert not answers(server, None)
        assert not answers(server, Credentials(authority.ca))
        assert not answers(server, other.credentials("gpu-2", trusting=authority))
        assert not answers(server, authority.credentials("gpu-2", expired=True))
        assert (state_of(server), received_bytes(server)) == before


def test_a_client_trusts_no_server_but_the_right_one(tmp_path: Path, authority: Authority) -> None:
    with guarded(tmp_path, authority) as server:
        assert not answers(server, authority.credentials("gpu-1", trusting=Authority(tmp_path)))
        named = Credentials(authority.ca, *authority.pair("gpu-1"), server_name="localhost")
        assert answers(server, named)
        assert not answers(server, Credentials(authority.ca, *authority.pair("gpu-1"), server_name="elsewhere"))


def test_certificate_and_authorities_are_replaced_without_a_restart(tmp_path: Path, authority: Authority) -> None:
    with guarded(tmp_path, authority) as server, dialled(server, authority.credentials("gpu-1")) as old_stub:
        worker = WireWorker(old_stub, "gpu-1")
        worker.join()
        new = Authority(tmp_path)
        assert not answers(server, new.credentials("gpu-2"))
        new.pair("localhost", into="server")
        authority.ca.write_bytes(new.ca.read_bytes())
        assert answers(server, new.credentials("gpu-2"))
        assert not answers(server, Credentials(new.ca, *authority.pair("gpu-3")))
        # Who was connected before stays so.
        worker.pull()
        assert worker.push(payload(MODEL, 1.0)).iteration.number == 1


def test_files_that_can_not_be_used_leave_those_before_in_force(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with guarded(tmp_path, authority) as server, caplog.at_level(logging.INFO):
        key = tmp_path / "server.key"
        before = key.read_bytes()
        key.write_text("no key")
        assert answers(server, authority.credentials("gpu-1"))
        assert any("can't be used, so the previous contents stay in force" in said for said in caplog.messages)
        key.write_bytes(before)
        assert answers(server, authority.credentials("gpu-2"))


def test_without_client_certificates_a_token_says_who_calls(tmp_path: Path, authority: Authority) -> None:
    settings = authority.server(client_certificates=False)
    with served(tmp_path / "run", **settings) as server, dialled(server, Credentials(authority.ca)) as stub:
        with pytest.raises(grpc.RpcError) as refused:
            stub.GetStatus(pb.GetStatusRequest(), timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_files_that_can_not_be_used_at_the_start_are_named(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.pair("localhost")
    _, another = authority.pair("another")
    none = tmp_path / "none.pem"
    for given, sentence in {
        (certificate, none, None): r"none\.pem can't be read \(No such file",
        (none, key, None): r"none\.pem can't be read",
        (certificate, another, None): r"can't be used together \(KEY_VALUES_MISMATCH\).*the key that it was made for",
        (key, key, None): "can't be used together",
        (certificate, key, key): "does not hold certificates: expected one or more in PEM",
    }.items():
        with pytest.raises(CredentialsError, match=sentence):
            server_credentials(*given)


def test_who_connects_and_says_nothing_is_disconnected(tmp_path: Path, authority: Authority) -> None:
    with guarded(tmp_path, authority, failure_timeout_seconds=1.0) as server:
        host, _, port = server.address.rpartition(":")
        with socket.create_connection((host, int(port))) as silent:
            silent.settimeout(20)
            assert silent.recv(1) == b""


def test_a_connection_that_says_nothing_holds_nobody_up(tmp_path: Path, authority: Authority) -> None:
    with guarded(tmp_path, authority) as server:
        host, _, port = server.address.rpartition(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(50)]
        try:
            eventually(lambda: answers(server, authority.credentials("gpu-1")))
        finally:
            for each in silent:
                each.close()


HEARTBEAT = b"/ormo.v1.ParameterServer/Heartbeat"


def spoken(connection: ssl.SSLSocket) -> bytes:
    """What comes to a call with an empty message, spoken by hand: gRPC's own clients take up no sessions."""
    names = {b":method": b"POST", b":scheme": b"https", b":path": HEARTBEAT, b":authority": b"127.0.0.1"}
    names |= {b"te": b"trailers", b"content-type": b"application/grpc"}
    block = b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in names.items())
    frames = ((4, 0, 0, b""), (1, 4, 1, block), (0, 1, 1, b"\0\0\0\0\0"))
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    for kind, flags, stream, body in frames:
        connection.sendall(len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body)
    connection.settimeout(5.0)
    said = b""
    with contextlib.suppress(TimeoutError):
        while b"grpc-status" not in said and (more := connection.recv(4096)):
            said += more
    return said


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_that_is_taken_up_again_shows_no_certificate_and_is_refused(
    version: ssl.TLSVersion, tmp_path: Path, authority: Authority
) -> None:
    """Else an expired certificate would open connections for as long as its owner likes."""
    with guarded(tmp_path, authority) as server:
        with dialled(server, authority.credentials("gpu-1")) as stub:
            WireWorker(stub, "gpu-1").join()
        before, host = state_of(server), server.address.rpartition(":")[0]
        context = ssl.create_default_context(cafile=authority.ca)
        context.load_cert_chain(*authority.pair("gpu-2"))
        context.set_alpn_protocols(["h2"])
        context.minimum_version = context.maximum_version = version
        session: ssl.SSLSession | None = None
        for reason in ("BAD_REQUEST", "UNAUTHENTICATED"):
            with (
                socket.create_connection((host, int(server.address.rpartition(":")[2]))) as plain,
                context.wrap_socket(plain, server_hostname=host, session=session) as connection,
            ):
                assert spoken(connection)
                assert connection.session_reused == (session is not None)
                session = connection.session
            assert server.metrics.traffic.refused().get(reason) == 1
        assert state_of(server) == before
