"""Channels to a server, with or without TLS, and the calls with one answer."""

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from ormo_protos.credentials import (
    AUTHORIZATION,
    BEARER,
    Credentials,
    CredentialsError,
    check_certificates,
    check_pair,
    read_bytes,
    read_token,
)
from ormo_protos.limits import Malformed, Parser
from ormo_protos.proxies import is_local, through_proxy
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.watched_files import WatchedFiles

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
        self._dialled = 0
        if credentials is not None:
            if credentials.server_name:
                self._options.append(("grpc.ssl_target_name_override", credentials.server_name))
            self._tls = _channel_credentials(credentials)

    def dial(self) -> grpc.Channel:
        """A channel; it connects when first used."""
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
            return channel.unary_unary(f"/{service}/{method}", _encoded, Parser(answer).parse)

        self.join = call("Join", pb.JoinResponse)
        self.heartbeat = call("Heartbeat", pb.HeartbeatResponse)
        self.leave = call("Leave", pb.LeaveResponse)
        self.report_evaluation = call("ReportEvaluation", pb.ReportEvaluationResponse)
        self.get_status = call("GetStatus", pb.GetStatusResponse)
        self.control = call("Control", pb.ControlResponse)


def _encoded(request: Message) -> bytes:
    return request.SerializeToString()


def _channel_credentials(files: Credentials) -> WatchedFiles[grpc.ChannelCredentials]:
    pair = [path for path in (files.certificate, files.key) if path is not None]
    token = None
    if files.token_file is not None:
        path = files.token_file
        watched = WatchedFiles([path], lambda: read_token(path), CredentialsError)
        token = grpc.metadata_call_credentials(_Bearer(watched))

    def read() -> grpc.ChannelCredentials:
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
