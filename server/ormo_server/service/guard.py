"""The one place that every call passes before anything else sees it: may this caller call this?

Who may not is sent away at once, before a byte of the request is waited for. gRPC waits for the request of a method
with one before it asks anybody, so to gRPC every method has a stream of requests here; on the wire that is the same.
"""

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from ormo_protos.limits import SMALL_MESSAGE_BYTES
from ormo_server.core.errors import BadRequest, OrmoError
from ormo_server.security.access import Access
from ormo_server.security.callers import Caller
from ormo_server.security.roles import ALLOWED
from ormo_server.service.errors import Refuser, refuse
from ormo_server.service.open_calls import OpenCalls
from ormo_server.service.rewrapping import behaviour_of, holds_no_thread, rewrapped


class Guard(grpc.ServerInterceptor):
    """Lets callers call what one of their roles allows.

    Args:
        access: knows callers.
        refuser: is told of each refusal.
        calls: waits for requests.
    """

    def __init__(self, access: Access, refuser: Refuser, calls: OpenCalls) -> None:
        self._access = access
        self._refuser = refuser
        self._calls = calls

    def intercept_service(self, continuation: Callable[..., Any], details: grpc.HandlerCallDetails) -> Any:
        """See `grpc.ServerInterceptor`."""
        handler = continuation(details)
        if handler is None:
            return None
        method, behaviour = details.method, behaviour_of(handler)
        allowed = ALLOWED.get(method, frozenset())

        def guarded(requests: Any, context: grpc.ServicerContext, *more: Any) -> Any:
            try:
                caller = self._access.caller(context)
                caller.check_may_call(method, allowed)
                if not handler.request_streaming:
                    requests = self._small_request(requests, context, caller)
                if holds_no_thread(behaviour):
                    self._calls.watch(context, caller)
                    (send,) = more
                    return behaviour(requests, context, self._calls.sender(context, caller, send))
            except OrmoError as error:
                refuse(self._refuser, context, error)
            return behaviour(requests, context)

        return rewrapped(handler, guarded, request_streaming=True)

    def _small_request(self, requests: Any, context: grpc.ServicerContext, caller: Caller) -> Any:
        request = self._calls.request(requests, context, caller)
        # Of our own service it still is bytes here; of others gRPC has made a message.
        size = request.ByteSize() if isinstance(request, Message) else len(request)
        if size > SMALL_MESSAGE_BYTES:
            raise BadRequest(f"a request of {size:,} bytes came: at most {SMALL_MESSAGE_BYTES:,} were expected")
        return request
