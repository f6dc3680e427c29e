"""From our exceptions to gRPC's statuses, as `ormo_protos.refusals` has them, and the two wrappers that apply it."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import NoReturn, Protocol, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from ormo_protos.manifest import ManifestError
from ormo_protos.parsing import Malformed
from ormo_protos.refusals import ERROR_DOMAIN, UNSOUND_GRADIENT, Reason
from ormo_protos.tensors import PayloadError
from ormo_runtime.logs import Fields, printable
from ormo_server.core.errors import BadManifest, BadPayload, BadRequest, OrmoError
from ormo_server.service.delivery import PeerGone

# Apart from each other, because lines of each are limited: whoever may do little must not drown the rest.
_refused, _denied = logging.getLogger("ormo_server.refused"), logging.getLogger("ormo_server.denied")
_bad_gradients, _failed = logging.getLogger("ormo_server.bad_gradients"), logging.getLogger("ormo_server.failed")
_SENTENCE_CHARACTERS = 1000
_DENIALS = frozenset({Reason.PERMISSION_DENIED, Reason.UNAUTHENTICATED})


class Refuser(Protocol):
    """A servicer that wants to know of its refusals."""

    def count_refusal(self, reason: Reason) -> None:
        """Count what was refused, by reason."""

    def name_of(self, context: grpc.ServicerContext) -> str:
        """Who calls, for the log; empty for nobody that is known."""


_Service = TypeVar("_Service", bound=Refuser)
_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")
_Unary = Callable[[_Service, _Request, grpc.ServicerContext], _Answer]
_Streaming = Callable[[_Service, _Request, grpc.ServicerContext], Iterator[_Answer]]


def maps_errors(method: _Unary[_Service, _Request, _Answer]) -> _Unary[_Service, _Request, _Answer]:
    """A method with one answer: what it raises ends the call with the status that the table gives."""

    @functools.wraps(method)
    def call(service: _Service, request: _Request, context: grpc.ServicerContext) -> _Answer:
        try:
            return method(service, require_well_formed(request), context)
        except Exception as error:  # noqa: BLE001 - every end of a call goes through the table
            _end(service, context, error)

    return call


def maps_stream_errors(method: _Streaming[_Service, _Request, _Answer]) -> _Streaming[_Service, _Request, _Answer]:
    """A method with a stream of answers: what it raises ends the call with the status that the table gives."""

    @functools.wraps(method)
    def call(service: _Service, request: _Request, context: grpc.ServicerContext) -> Iterator[_Answer]:
        try:
            yield from method(service, require_well_formed(request), context)
        except PeerGone:
            return  # there is nobody to answer
        except Exception as error:  # noqa: BLE001 - every end of a call goes through the table
            _end(service, context, error)

    return call


def require_well_formed(request: _Request) -> _Request:
    """The request, whose bytes were a message.

    Raises:
        BadRequest, BadManifest: its bytes were no message.
    """
    if isinstance(request, Malformed):
        raise not_understood(request)
    return request


def not_understood(malformed: Malformed) -> OrmoError:
    """The error for bytes that were no message."""
    return BadManifest(malformed.why) if malformed.reason is Reason.BAD_MANIFEST else BadRequest(malformed.why)


def as_ormo_error(error: Exception) -> Exception:
    """The error with a reason, where the contract's own errors have none."""
    if isinstance(error, PayloadError):
        return BadPayload(str(error))
    if isinstance(error, ManifestError):
        return BadManifest(str(error))
    return error


def _end(service: Refuser, context: grpc.ServicerContext, error: Exception) -> NoReturn:
    error = as_ormo_error(error)
    if isinstance(error, OrmoError):
        refuse(service, context, error)
    if isinstance(error, grpc.RpcError) or not context.is_active():
        raise error  # the peer went away in mid-message: gRPC knows its own error, and nothing was changed
    _failed.error("a call failed for a reason that is the server's own fault", exc_info=error)
    service.count_refusal(Reason.INTERNAL)
    _abort(context, Reason.INTERNAL, f"the server failed ({type(error).__name__}); its log says more", None)


def refuse(service: Refuser, context: grpc.ServicerContext, error: OrmoError) -> NoReturn:
    """End a call with a refusal."""
    service.count_refusal(error.reason)
    log_refusal(error, context.peer(), service.name_of(context))
    _abort(context, error.reason, str(error), error.retry_seconds)


def log_refusal(error: OrmoError, peer: str, caller: str) -> None:
    """A line for the operator. There are few of them however much is refused: the log limits them.

    Args:
        error: the refusal.
        peer: as gRPC names it.
        caller: name of whoever called; empty for nobody that is known.
    """
    about = Fields(reason=error.reason, peer=unquote(peer), caller=caller)
    if error.worker:
        about["worker"] = error.worker
    who = f"{caller!r} at {about['peer']}" if caller else about["peer"]
    if error.reason in _DENIALS:
        _denied.warning("denied %s: %s", who, error, extra=about)
    elif error.reason in UNSOUND_GRADIENT:
        _bad_gradients.warning("refused %s (%s): %s", who, error.reason, error, extra=about)
    else:
        _refused.info("refused %s (%s): %s", who, error.reason, error, extra=about)


def _abort(context: grpc.ServicerContext, reason: Reason, message: str, retry_seconds: float | None) -> NoReturn:
    details = [_packed(error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN))]
    if retry_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_seconds * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    # It may quote what came, and travels twice, escaped; clients take 8 KiB of trailers for certain.
    shown = message if len(message) <= _SENTENCE_CHARACTERS else f"{message[:_SENTENCE_CHARACTERS]}…"
    # A folder's name may be bytes that are no text, which no message can have.
    status = status_pb2.Status(code=code_pb2.Code.Value(reason.status), message=printable(shown), details=details)
    context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort_with_status raises")


def _packed(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
