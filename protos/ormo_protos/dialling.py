"""Channels to a server, with or without TLS."""

from collections.abc import Sequence
from typing import Any

import grpc

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
from ormo_protos.watched_files import WatchedFiles

ChannelOptions = Sequence[tuple[str, Any]]


class Dialer:
    """Makes channels to one server.

    Args:
        server: HOST:PORT.
        credentials: None for a connection in the clear.
        options: of gRPC.

    Raises:
        CredentialsError: a file can't be used.
    """

    def __init__(self, server: str, credentials: Credentials | None, options: ChannelOptions = ()) -> None:
        self._server = server
        self._options = list(options)
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
