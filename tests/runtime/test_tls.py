"""What a client is told of certificates and tokens, and files that change under its hands."""

import logging
import os
from pathlib import Path

import grpc
import pytest

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_runtime import tls
from ormo_runtime.settings_loader import SettingsProblemsError, read_settings
from ormo_runtime.tls import ClientSettings, Credentials, CredentialsError, Dialer, WatchedFiles, read_token
from ormo_worker.client.arguments import Observer, Patience
from ormo_worker.client.connection import Connection
from security.authority import TOKEN, Authority, guarded


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tls-ca", "a", "--tls-cert", "b"], "--tls-cert and --tls-key go together"),
        (["--tls-ca", "a", "--tls-key", "b"], "--tls-cert and --tls-key go together"),
        (["--token-file", "a"], "need TLS, which is on once --tls-ca is given"),
        (["--tls-server-name", "a"], "need TLS, which is on once --tls-ca is given"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: list[str], sentence: str) -> None:
    with pytest.raises(SettingsProblemsError, match=sentence):
        read_settings(ClientSettings, flags, {}, program="p")


def test_settings_become_credentials() -> None:
    assert ClientSettings().credentials() is None
    told = ClientSettings(tls_ca="a", tls_cert="b", tls_key="c", token_file="d", tls_server_name="e")
    assert told.credentials() == Credentials(Path("a"), Path("b"), Path("c"), Path("d"), "e")


def test_files_that_can_not_be_used_are_named_before_anything_is_dialled(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.pair("a")
    _, another = authority.pair("b")
    empty = tmp_path / "empty"
    empty.touch()
    for credentials, sentence in {
        Credentials(tmp_path / "none"): r"none can't be read \(No such file",
        Credentials(empty): "empty does not hold certificates: expected one or more in PEM",
        Credentials(authority.ca, certificate, another): "can't be used together",
        Credentials(
            authority.ca, token_file=empty
        ): "empty does not hold a token: expected one line of printable ASCII",
        Credentials(authority.ca, certificate, key, tmp_path / "gone"): "gone can't be read",
    }.items():
        with pytest.raises(CredentialsError, match=sentence):
            Dialer("localhost:1", credentials)


@pytest.mark.parametrize("text", ["", "\n", "two words", "two\nlines", "\x00", "é" * 40])
def test_what_is_no_token_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(CredentialsError, match="does not hold a token"):
        read_token(path)


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(tmp_path: Path, authority: Authority) -> None:
    from cryptography.hazmat.primitives import serialization

    certificate, key = authority.pair("a")
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    key.write_bytes(
        loaded.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, encryption)
    )
    with pytest.raises(CredentialsError, match="in PEM and not encrypted"):
        Dialer("localhost:1", Credentials(authority.ca, certificate, key))


def test_a_token_is_not_sent_in_the_clear(tmp_path: Path, authority: Authority) -> None:
    """gRPC itself refuses it; the settings refuse it before."""
    path = tmp_path / "token"
    path.write_text(TOKEN)
    with pytest.raises(SettingsProblemsError):
        read_settings(ClientSettings, ["--token-file", str(path)], {}, program="p")


class Number:
    """A file that holds a number."""

    def __init__(self, path: Path) -> None:
        self.path, self.reads = path, 0
        self.write("1")
        self.watched = WatchedFiles([path], self.read, ValueError)

    def read(self) -> int:
        self.reads += 1
        return int(self.path.read_text())

    def write(self, text: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.rename(self.path)


def test_files_are_read_when_they_change_and_not_otherwise(tmp_path: Path) -> None:
    number = Number(tmp_path / "n")
    assert [number.watched.value for _ in range(3)] == [1, 1, 1]
    assert (number.reads, number.watched.version) == (1, 0)
    number.write("2")
    assert [number.watched.value for _ in range(3)] == [2, 2, 2]
    assert (number.reads, number.watched.version) == (2, 1)


def test_a_change_of_the_same_length_within_the_clocks_grain_is_seen(tmp_path: Path) -> None:
    number = Number(tmp_path / "n")
    before = number.path.stat()
    number.write("3")
    os.utime(number.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert number.watched.value == 3


def test_a_change_that_can_not_be_used_is_said_once_and_mended_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    number = Number(tmp_path / "n")
    number.write("what?")
    with caplog.at_level(logging.INFO):
        assert [number.watched.value for _ in range(3)] == [1, 1, 1]
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        number.write("4")
        assert (number.watched.value, number.watched.version) == (4, 1)


def test_a_file_that_could_not_be_read_for_a_while_is_read_later_though_it_has_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may have been no descriptor for it."""
    number = Number(tmp_path / "n")
    monkeypatch.setattr(tls, "RETRY_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(number.watched, "_read", lambda: int("too many open files"))
        number.write("2")
        assert number.watched.value == 1
    assert number.watched.value == 2


def test_a_broken_connection_is_dialled_anew_with_the_newest_certificates(tmp_path: Path, authority: Authority) -> None:
    """And as long as it holds, it stays: a rotation interrupts nobody."""
    other = Authority(tmp_path)
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(other.ca.read_bytes())
    pair = other.pair("evaluator", into="mine")
    with guarded(tmp_path, authority) as server:
        connection = Connection(server.address, Patience(connect_timeout=20), Observer(), Credentials(trusted, *pair))
        try:
            with pytest.raises(Exception, match="UNAVAILABLE"):
                connection.unary(connection.stub.get_status, pb.GetStatusRequest(), 2.0)
            authority.pair("evaluator", into="mine")
            trusted.write_bytes(authority.ca.read_bytes())
            first = connection.stub
            answer = connection.retry(
                lambda: connection.unary(connection.stub.get_status, pb.GetStatusRequest(), 2.0), "asking"
            )
            assert answer.version
            assert connection.stub is not first
            second = connection.stub
            other.pair("evaluator", into="mine")
            assert connection.unary(connection.stub.get_status, pb.GetStatusRequest(), 2.0).version
            assert connection.stub is second
        finally:
            connection.close()


def test_in_the_clear_there_is_nothing_to_renew() -> None:
    dialer = Dialer("localhost:1", None)
    with dialer.dial() as channel:
        assert not dialer.outdated
        with pytest.raises(grpc.RpcError):
            ParameterServerStub(channel).GetStatus(pb.GetStatusRequest(), timeout=0.2)
