"""Asking a server how it is."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.console.words import printable

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

    def ask(self) -> pb.GetStatusResponse:
        """How things are.

        Raises:
            NoAnswerError: it did not say.
        """
        try:
            return self._stub.GetStatus(pb.GetStatusRequest(), timeout=self._timeout)
        except grpc.RpcError as error:
            raise NoAnswerError(printable(error.details() or error.code().name)) from None


@contextmanager
def asker(server: str, timeout: float) -> Iterator[Asker]:
    """Ask the server at this address for as long as the caller is inside."""
    with grpc.insecure_channel(server, options=_OPTIONS) as channel:
        yield Asker(ParameterServerStub(channel), timeout)
