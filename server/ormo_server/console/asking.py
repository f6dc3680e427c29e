"""Asking a server how it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc

from ormo_protos.credentials import Credentials, CredentialsError
from ormo_protos.dialling import Dialer
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.console.words import printable

T = TypeVar("T")

# A server that comes back is to be seen soon; gRPC would wait for up to two minutes.
_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 250), ("grpc.max_reconnect_backoff_ms", 1000)]


class NoAnswerError(Exception):
    """The server did not answer; the text says why, as far as gRPC knows."""


class Asker:
    """A connection to one server, which mends itself.

    Args:
        stub: of the connection.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, stub: ParameterServerStub, timeout: float) -> None:
        self._stub = stub
        self._timeout = timeout

    def control(self, request: pb.ControlRequest) -> pb.ControlResponse:
        """Have the server do something.

        Raises:
            NoAnswerError: it did not say that it has.
        """
        return self._answered(self._stub.Control, request)

    def ask(self) -> pb.GetStatusResponse:
        """How things are.

        Raises:
            NoAnswerError: it did not say.
        """
        return self._answered(self._stub.GetStatus, pb.GetStatusRequest())

    def _answered(self, method: Callable[..., T], request: object) -> T:
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise NoAnswerError(printable(error.details() or error.code().name)) from None


@contextmanager
def asker(server: str, timeout: float, credentials: Credentials | None = None) -> Iterator[Asker]:
    """Ask the server at this address for as long as the caller is inside.

    Raises:
        NoAnswerError: certificates can't be used.
    """
    try:
        channel = Dialer(server, credentials, _OPTIONS).dial()
    except CredentialsError as error:
        raise NoAnswerError(str(error)) from None
    with channel:
        yield Asker(ParameterServerStub(channel), timeout)
