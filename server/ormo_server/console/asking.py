"""Asking a server how it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from ormo_protos.credentials import Credentials, CredentialsError
from ormo_protos.dialling import Dialer
from ormo_protos.interruption import end_on_signals, leave_if_asked
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
        self._call: grpc.Future[Any] | None = None
        end_on_signals(self)

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

    def cancel_open(self) -> None:
        """End the call that is under way, if there is one; from any thread."""
        call = self._call
        if call is not None:
            call.cancel()

    def _answered(self, method: "grpc.UnaryUnaryMultiCallable[Any, T]", request: object) -> T:
        self._call = method.future(request, timeout=self._timeout)
        try:
            return self._call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            leave_if_asked()
            raise NoAnswerError(_why(error)) from None
        finally:
            self._call = None


def _why(error: grpc.RpcError | grpc.FutureCancelledError) -> str:
    if isinstance(error, grpc.RpcError):
        return printable(error.details() or error.code().name)
    return "the call was cancelled"


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
