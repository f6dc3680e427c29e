"""Channels to a server, with or without TLS or a proxy between, and the calls with one answer.

Which proxy gRPC takes goes by variables that are meant for browsers and package managers, too.
"""

import ipaddress
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf.message import Message

from ormo_protos.parsing import Malformed, Parser
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.logs import printable
from ormo_runtime.tls import (
    AUTHORIZATION,
    BEARER,
    Credentials,
    CredentialsError,
    WatchedFiles,
    check_certificates,
    check_pair,
    read_bytes,
    read_token,
)

A = TypeVar("A", bound=Message)

ChannelOptions = Sequence[tuple[str, Any]]

# A server that comes back under another address is found by asking DNS again, which gRPC does every 30 s at most.
_MS_BETWEEN_QUESTIONS_TO_DNS = 1000


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
        self._options = [*options, ("grpc.dns_min_time_between_resolutions_ms", _MS_BETWEEN_QUESTIONS_TO_DNS)]
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
