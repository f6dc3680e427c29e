"""Asking a server how it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from ormo_protos.parsing import Malformed
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.channels import Dialer, UnaryStub
from ormo_runtime.logs import printable
from ormo_runtime.process import end_on_signals, interrupted_safely, leave_if_asked
from ormo_runtime.tls import Credentials, CredentialsError

A = TypeVar("A", bound=Message)

# A server that comes back is to be seen soon; gRPC would wait for up to two minutes.
_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 250), ("grpc.max_reconnect_backoff_ms", 1000)]
# Where gRPC has what a server says beside a status.
_ERROR_INFO = "grpc-status-details-bin"


class NoAnswerError(Exception):
    """The server did not answer; the text says why, as far as gRPC knows."""


class RefusedError(NoAnswerError):
    """The server answered that it will not; the text is its sentence."""


class Asker:
    """A connection to one server, which mends itself.

    Whatever listens there may say anything: all texts in its answers have escapes for what is not printable.

    Args:
        stub: of the connection.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, stub: UnaryStub, timeout: float) -> None:
        self._stub = stub
        self._timeout = timeout
        self._call: grpc.Future[Any] | None = None
        end_on_signals(self)

    def control(self, request: pb.ControlRequest) -> pb.ControlResponse:
        """Have the server do something.

        Raises:
            NoAnswerError: it did not say that it has.
        """
        return self._await_answer(self._stub.control, request)

    def ask(self) -> pb.GetStatusResponse:
        """How things are.

        Raises:
            NoAnswerError: it did not say.
        """
        return self._await_answer(self._stub.get_status, pb.GetStatusRequest())

    def end_waits(self) -> None:
        """End the call that is under way, if there is one; from any thread."""
        call = self._call
        if call is not None:
            call.cancel()

    @interrupted_safely
    def _await_answer(self, method: "grpc.UnaryUnaryMultiCallable[Any, A | Malformed]", request: object) -> A:
        self._call = method.future(request, timeout=self._timeout)
        try:
            answer = self._call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            leave_if_asked()  # the call may have been cancelled for a signal, which is no answer but a reason to leave
            raise (RefusedError if _is_refusal(error) else NoAnswerError)(_why(error)) from None
        finally:
            self._call = None
        if isinstance(answer, Malformed):
            raise NoAnswerError(f"its answer can't be understood: {answer.why}")
        _make_printable(answer)
        return answer


def _make_printable(message: Message) -> None:
    """Escape what is not printable in all texts of a message; the only map has a text for each number."""
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            numbers = {printable(text): number for text, number in value.items()}
            value.clear()
            value.update(numbers)
        elif field.message_type is not None:
            for one in value if field.is_repeated else [value]:
                _make_printable(one)
        elif field.type == field.TYPE_STRING:
            setattr(message, field.name, printable(value))


def _is_refusal(error: grpc.RpcError | grpc.FutureCancelledError) -> bool:
    """Whether a server of ours ended the call: it says why in `ErrorInfo`, which gRPC itself and a proxy don't."""
    return any(key == _ERROR_INFO for key, _ in getattr(error, "trailing_metadata", tuple)() or ())


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
        yield Asker(UnaryStub(channel), timeout)
