"""How a client reaches a server: channels, proxies and TLS, with files of certificates that may change at any time."""

import ipaddress
import logging
import math
import os
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf.message import Message
from pydantic import Field, model_validator

from ormo_protos.parsing import Malformed, Parser
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.logs import printable
from ormo_runtime.settings import Settings, UsageError

_LOG = logging.getLogger(__name__)

AUTHORIZATION = "authorization"
BEARER = "Bearer "


class CredentialsError(UsageError):
    """Files with certificates, keys or tokens that can't be used; the sentence says which, and what was expected."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Files to connect with. They may be replaced at any time: new connections and calls use what they say then.

    Attributes:
        ca: PEM, certificates of the authorities that may have signed the server's.
        certificate, key: PEM, the client's own; None for none.
        token_file: whose content, a bearer token, goes with every call; None for none.
        server_name: that the server's certificate must be for; empty: the host that is connected to.
    """

    ca: Path
    certificate: Path | None = None
    key: Path | None = None
    token_file: Path | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        for name in ("ca", "certificate", "key", "token_file"):
            path = getattr(self, name)
            object.__setattr__(self, name, None if path is None else Path(path))  # in Python many write a str


class ClientSettings(Settings):
    """How to reach a server that asks its callers for certificates or tokens."""

    tls_ca: Path | None = Field(
        None,
        description="PEM file with the certificates that the server's must be signed by, such as "
        "/etc/ssl/certs/ca-certificates.crt for public ones; none: no TLS",
    )
    tls_cert: Path | None = Field(None, description="PEM file with this client's own certificate; none: no certificate")
    tls_key: Path | None = Field(None, description="PEM file with the key of --tls-cert")
    tls_server_name: str = Field("", description="name in the server's certificate; none: the host in --server")
    token_file: Path | None = Field(
        None, description="file with the bearer token that identifies this client to the server; none: no token"
    )

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together: give both, or neither")
        if self.tls_ca is None and (self.tls_cert or self.token_file or self.tls_server_name):
            raise ValueError(
                "--tls-cert, --tls-server-name and --token-file need TLS, which is on once --tls-ca is given"
            )
        return self

    def credentials(self) -> Credentials | None:
        """What the settings name; None for no TLS."""
        if self.tls_ca is None:
            return None
        return Credentials(self.tls_ca, self.tls_cert, self.tls_key, self.token_file, self.tls_server_name)


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        CredentialsError: it can't be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CredentialsError(f"{path} can't be read ({error.strerror or error})") from None


def read_token(path: Path) -> str:
    """The token in a file, without the white space round it.

    Raises:
        CredentialsError: the file can't be read, or is not one line of printable ASCII.
    """
    token = read_bytes(path).strip().decode("ascii", errors="replace")
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise CredentialsError(f"{path} does not hold a token: expected one line of printable ASCII without spaces")
    return token


def check_certificates(path: Path) -> None:
    """Check that gRPC can use the file as authorities.

    Raises:
        CredentialsError: it holds no certificate in PEM.
    """
    text = read_bytes(path)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=text.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise CredentialsError(f"{path} does not hold certificates: expected one or more in PEM") from None


def check_pair(certificate: Path, key: Path) -> None:
    """Check that the certificate and the key belong together.

    Raises:
        CredentialsError: they do not, or are not PEM, or the key is encrypted.
    """
    for path in (certificate, key):
        read_bytes(path)
    try:
        # An empty password: without one OpenSSL would ask for it at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise CredentialsError(
            f"{certificate} and {key} can't be used together ({reason}): expected a certificate, and the key that it "
            "was made for, in PEM and not encrypted"
        ) from None


RETRY_SECONDS = 60.0

T = TypeVar("T")
_Stamp = tuple[tuple[int, int, int] | None, ...]


class WatchedFiles(Generic[T]):
    """The contents of some files, read again when one of them changes. A look takes microseconds, so look often.

    If files can't be used, as when only one of a pair has been replaced so far, the previous contents stay in force,
    and the log says so. They are tried again now and then: they may be good, and this process out of descriptors.

    Args:
        paths: of the files.
        read: makes the value from them.
        unusable: what `read` raises for files that can't be used.

    Raises:
        what `read` raises: they can't be used at the start.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T], unusable: type[Exception]) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._unusable = unusable
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._value = read()
        self._version = 0
        self._again = math.inf

    @property
    def value(self) -> T:
        """The contents."""
        self._look()
        return self._value

    @property
    def version(self) -> int:
        """Rises with each change that could be used."""
        self._look()
        return self._version

    def _look(self) -> None:
        # Without the lock first: each call of a server looks, and nearly always nothing has changed.
        if self._stamp() == self._seen and time.monotonic() < self._again:
            return
        with self._lock:  # one thread reads the files anew; those that come meanwhile find them read
            stamp = self._stamp()
            if stamp == self._seen and time.monotonic() < self._again:
                return
            names = ", ".join(map(str, self._paths))
            self._seen, self._again = stamp, math.inf  # before reading: a change meanwhile is seen by the next look
            try:
                self._value = self._read()
            except self._unusable as error:
                self._again = time.monotonic() + RETRY_SECONDS
                _LOG.error("%s changed but can't be used, so the previous contents stay in force: %s", names, error)
            else:
                self._version += 1
                _LOG.info("%s changed, and the new contents are in force", names)

    def _stamp(self) -> _Stamp:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - half the time of Path.stat, for each call of the server
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino)


# Channels, with or without TLS or a proxy between, and the calls with one answer. Which proxy gRPC takes goes by
# variables that are meant for browsers and package managers, too.


A = TypeVar("A", bound=Message)

ChannelOptions = Sequence[tuple[str, Any]]


class Dialer:
    """Makes channels to one server.

    Args:
        server: HOST:PORT.
        credentials: None for a connection in the clear.
        options: of gRPC.

    Attributes:
        place: the address as a sentence on a connection has it, with the proxy that leads there, if there is one.

    Raises:
        CredentialsError: a file can't be used.
    """

    def __init__(self, server: str, credentials: Credentials | None, options: ChannelOptions = ()) -> None:
        self._server = server
        self._options = list(options)
        self.place = server + through_proxy(server, os.environ)
        if is_local(server):
            self._options.append(("grpc.enable_http_proxy", 0))
        self._tls: WatchedFiles[grpc.ChannelCredentials] | None = None
        self._dialled = 0  # the version of the files that the last channel was made with
        if credentials is not None:
            if credentials.server_name:
                self._options.append(("grpc.ssl_target_name_override", credentials.server_name))
            self._tls = _channel_credentials(credentials)

    def dial(self) -> grpc.Channel:
        """Make a channel; it connects when first used."""
        if self._tls is None:
            return grpc.insecure_channel(self._server, options=self._options)
        self._dialled = self._tls.version
        return grpc.secure_channel(self._server, self._tls.value, options=self._options)

    @property
    def outdated(self) -> bool:
        """Whether certificates have changed since the last channel was made: when it breaks, dial again."""
        return self._tls is not None and self._tls.version != self._dialled


class UnaryStub:
    """The server's methods that have one request and one answer.

    Generated code would make whatever a server sends into objects, and raise what only gRPC's log tells. Here an answer
    that is too large, or none, is `Malformed`.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        service = pb.DESCRIPTOR.services_by_name["ParameterServer"].full_name

        def call(method: str, answer: type[A]) -> "grpc.UnaryUnaryMultiCallable[Any, A | Malformed]":
            return channel.unary_unary(f"/{service}/{method}", _encode, Parser(answer).parse)

        self.join = call("Join", pb.JoinResponse)
        self.heartbeat = call("Heartbeat", pb.HeartbeatResponse)
        self.leave = call("Leave", pb.LeaveResponse)
        self.report_evaluation = call("ReportEvaluation", pb.ReportEvaluationResponse)
        self.get_status = call("GetStatus", pb.GetStatusResponse)
        self.control = call("Control", pb.ControlResponse)


def _encode(request: Message) -> bytes:
    return request.SerializeToString()


def _channel_credentials(files: Credentials) -> WatchedFiles[grpc.ChannelCredentials]:
    pair = [path for path in (files.certificate, files.key) if path is not None]
    token = None
    if files.token_file is not None:
        path = files.token_file
        watched = WatchedFiles([path], lambda: read_token(path), CredentialsError)
        token = grpc.metadata_call_credentials(_Bearer(watched))

    def read() -> grpc.ChannelCredentials:
        # Checked here, for gRPC says only that it can't connect, and not which file is the reason.
        check_certificates(files.ca)
        if files.certificate is None or files.key is None:
            made = grpc.ssl_channel_credentials(read_bytes(files.ca))
        else:
            check_pair(files.certificate, files.key)
            made = grpc.ssl_channel_credentials(
                read_bytes(files.ca), read_bytes(files.key), read_bytes(files.certificate)
            )
        return made if token is None else grpc.composite_channel_credentials(made, token)

    return WatchedFiles([files.ca, *pair], read, CredentialsError)


class _Bearer(grpc.AuthMetadataPlugin):
    def __init__(self, token: WatchedFiles[str]) -> None:
        self._token = token

    def __call__(self, _: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        callback(((AUTHORIZATION, BEARER + self._token.value),), None)


# As gRPC reads them: the first that is set, in lower case only.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


def is_local(server: str) -> bool:
    """Whether HOST:PORT is on this machine, where no proxy has anything to do."""
    return is_loopback(_host(server).lower())


def through_proxy(server: str, environment: Mapping[str, str]) -> str:
    """What a sentence on a connection to HOST:PORT says of the proxy, after the address; empty if there is none."""
    variable = next((name for name in _PROXIES if name in environment), None)
    if variable is None or is_local(server) or _is_excepted(_host(server), environment):
        return ""
    address = _proxy(environment[variable])
    if not address:
        return ""
    return f" through the proxy {printable(address)} ({variable}; to do without it, name the host in no_proxy)"


def _proxy(value: str) -> str:
    """HOST:PORT of a proxy's URL, without the password that may be in it; empty if gRPC takes none from there."""
    parts = urllib.parse.urlsplit(value)
    return parts.netloc.rpartition("@")[2] if parts.scheme == "http" else ""


def _is_excepted(host: str, environment: Mapping[str, str]) -> bool:
    listed = next((environment[name] for name in _EXCEPTIONS if name in environment), "")
    return any(_matches(host, entry.strip()) for entry in listed.split(",") if entry)


def _matches(host: str, entry: str) -> bool:
    """Whether an exception is for this host: its name, or address, or a domain that it is in, or a net of addresses."""
    if f".{host}".lower().endswith(f".{entry.removeprefix('.')}".lower()):
        return True
    try:
        return "/" in entry and ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False


def _host(server: str) -> str:
    return server.rpartition(":")[0].removeprefix("[").removesuffix("]")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on this host, as in HOST:PORT."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def host_of(peer: str) -> str:
    """The host of a gRPC peer, such as `ipv4:10.0.0.7:51234` or `ipv6:%5B::1%5D:51234`."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0] if kind in ("ipv4", "ipv6") else kind
