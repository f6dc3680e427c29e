"""The one table from our exceptions to gRPC's status codes."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from ormo_protos.manifest import ManifestError
from ormo_protos.reasons import ERROR_DOMAIN, Reason
from ormo_protos.tensors import PayloadError
from ormo_server.core.errors import BadManifest, BadPayload, OrmoError

log = logging.getLogger(__name__)

STATUS_CODES: dict[Reason, int] = {
    Reason.BAD_MANIFEST: code_pb2.INVALID_ARGUMENT,
    Reason.BAD_PAYLOAD: code_pb2.INVALID_ARGUMENT,
    Reason.BAD_REQUEST: code_pb2.INVALID_ARGUMENT,
    Reason.DRAINING: code_pb2.UNAVAILABLE,
    Reason.FINISHED: code_pb2.FAILED_PRECONDITION,
    Reason.INTERNAL: code_pb2.INTERNAL,
    Reason.MANIFEST_DIGEST: code_pb2.INVALID_ARGUMENT,
    Reason.MEMORY_LIMIT: code_pb2.RESOURCE_EXHAUSTED,
    Reason.MODEL_EXISTS: code_pb2.ALREADY_EXISTS,
    Reason.NON_FINITE: code_pb2.INVALID_ARGUMENT,
    Reason.NOT_A_MEMBER: code_pb2.FAILED_PRECONDITION,
    Reason.NOT_READY: code_pb2.UNAVAILABLE,
    Reason.NOT_WANTED: code_pb2.FAILED_PRECONDITION,
    Reason.PROTOCOL_VERSION: code_pb2.FAILED_PRECONDITION,
    Reason.REPLACED: code_pb2.FAILED_PRECONDITION,
    Reason.STALE_REQUEST: code_pb2.FAILED_PRECONDITION,
    Reason.SUPERSEDED: code_pb2.ABORTED,
    Reason.TICKET_UNKNOWN: code_pb2.FAILED_PRECONDITION,
    Reason.TOO_MANY_STREAMS: code_pb2.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_WORKERS: code_pb2.RESOURCE_EXHAUSTED,
}


@contextlib.contextmanager
def errors_as_status(context: grpc.ServicerContext, refused: Callable[[OrmoError], None]) -> Iterator[None]:
    """End the call with the status that the table gives for what is raised inside.

    Args:
        context: of the call.
        refused: told of every refusal, to count it.
    """
    try:
        yield
    except OrmoError as error:
        _refuse(context, error, refused)
    except PayloadError as error:
        _refuse(context, BadPayload(str(error)), refused)
    except ManifestError as error:
        _refuse(context, BadManifest(str(error)), refused)
    except grpc.RpcError:
        # The peer went away in mid-message: there is nobody to answer, and nothing was changed.
        context.cancel()
    except Exception as error:
        if not context.is_active():
            raise
        log.exception("a call failed for a reason that is the server's own fault")
        _end(context, Reason.INTERNAL, f"the server failed ({type(error).__name__}); its log says more", None)


def _refuse(context: grpc.ServicerContext, error: OrmoError, refused: Callable[[OrmoError], None]) -> NoReturn:
    refused(error)
    _end(context, error.reason, str(error), error.retry_seconds)


def _end(context: grpc.ServicerContext, reason: Reason, message: str, retry_seconds: float | None) -> NoReturn:
    details = [_packed(error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN))]
    if retry_seconds is not None:
        delay = duration_pb2.Duration(nanos=0)
        delay.FromNanoseconds(int(retry_seconds * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    status = status_pb2.Status(code=STATUS_CODES[reason], message=message, details=details)
    context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort_with_status raises")


def _packed(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
