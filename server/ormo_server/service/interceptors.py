"""The one place that every call passes before anything else sees it: may this caller call this?

Who may not is sent away at once, before a byte of the request is waited for. gRPC waits for the request of a method
with one before it asks anybody, so to gRPC every method has a stream of requests here; on the wire that is the same.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from typing_extensions import override

from ormo_protos.limits import SMALL_MESSAGE_BYTES
from ormo_server.core.errors import BadRequest, OrmoError
from ormo_server.metrics.families import Calls, Method
from ormo_server.security import ALLOWED, Access, Caller
from ormo_server.service.refusals import Refuser, refuse
from ormo_server.service.streams import OpenCalls


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

    @override
    def intercept_service(self, continuation: Callable[..., Any], details: grpc.HandlerCallDetails) -> Any:
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

        return rewrap(handler, guarded, request_streaming=True)

    def _small_request(self, requests: Any, context: grpc.ServicerContext, caller: Caller) -> Any:
        request = self._calls.request(requests, context, caller)
        # Of our own service it still is bytes here; of others gRPC has made a message.
        size = request.ByteSize() if isinstance(request, Message) else len(request)
        if size > SMALL_MESSAGE_BYTES:
            raise BadRequest(f"received a request of {size:,} bytes: at most {SMALL_MESSAGE_BYTES:,} were expected")
        return request


_TYPES = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}


def methods(service: ServiceDescriptor) -> list[Method]:
    """The methods of a service."""
    return [
        Method(_TYPES[method.client_streaming, method.server_streaming], service.full_name, method.name)
        for method in service.methods
    ]


class CallCounter(grpc.ServerInterceptor):
    """Stands round every handler. Methods that nobody serves are not counted: their names are the caller's.

    Args:
        calls: what to count in.
        services: that are served. What kind of call a method takes is said here: interceptors may change handlers.
    """

    def __init__(self, calls: Calls, services: Sequence[ServiceDescriptor]) -> None:
        self._calls = calls
        self._methods = {f"/{each.service}/{each.method}": each for service in services for each in methods(service)}

    @override
    def intercept_service(self, continuation: Callable[..., Any], details: grpc.HandlerCallDetails) -> Any:
        handler = continuation(details)
        return None if handler is None else self._count_handler(handler, self._methods[details.method])

    def _count_handler(self, handler: Any, method: Method) -> Any:
        behaviour = behaviour_of(handler)
        if holds_no_thread(behaviour):
            counted = self._count_watch(behaviour, method)
        elif handler.response_streaming:
            counted = self._count_stream(behaviour, method)
        else:
            counted = self._count_answer(behaviour, method)
        return rewrap(handler, counted)

    def _count_watch(self, behaviour: Callable[..., Any], method: Method) -> Callable[..., Any]:
        def call(request: Any, context: Any, *more: Any) -> Any:
            started = self._begin(method)
            context.add_callback(lambda: self._end(method, started, context, failed=False))
            return behaviour(request, context, *more)

        return call

    def _count_answer(self, behaviour: Callable[..., Any], method: Method) -> Callable[..., Any]:
        def call(request: Any, context: Any) -> Any:
            started = self._begin(method)
            failed = True
            try:
                answer = behaviour(request, context)
                failed = False
                return answer
            finally:
                self._end(method, started, context, failed=failed)

        return call

    def _count_stream(self, behaviour: Callable[..., Any], method: Method) -> Callable[..., Iterator[Any]]:
        def call(request: Any, context: Any) -> Iterator[Any]:
            started = self._begin(method)
            failed = True
            try:
                yield from behaviour(request, context)
                failed = False
            finally:
                self._end(method, started, context, failed=failed)

        return call

    def _begin(self, method: Method) -> float:
        self._calls.started.labels(*method).inc()
        return time.perf_counter()

    def _end(self, method: Method, started: float, context: Any, *, failed: bool) -> None:
        self._calls.handled.labels(*method, _code(context, failed=failed)).inc()
        self._calls.seconds.labels(*method).observe(time.perf_counter() - started)


def _code(context: Any, *, failed: bool) -> str:
    """The status that the caller sees. A stream that was cancelled is closed, which no exception of ours tells.

    One that is cancelled between two exchanges may count as OK: gRPC ends the requests a moment before it says why.
    """
    code = context.code()
    if code is not None:
        return code.name if isinstance(code, grpc.StatusCode) else str(code)
    if not context.is_active():
        return "CANCELLED"
    return "UNKNOWN" if failed else "OK"


_NON_BLOCKING = "experimental_non_blocking"
_WORDS = {True: "stream", False: "unary"}


def behaviour_of(handler: Any) -> Callable[..., Any]:
    """What a handler does with (request or requests, context)."""
    behaviour: Callable[..., Any] = getattr(handler, _kind(handler, request_streaming=handler.request_streaming))
    return behaviour


def holds_no_thread(behaviour: Callable[..., Any]) -> bool:
    """Whether it returns at once and answers later, through a callback: gRPC's health service watches so."""
    return bool(getattr(behaviour, _NON_BLOCKING, False))


def rewrap(handler: Any, behaviour: Callable[..., Any], *, request_streaming: bool | None = None) -> Any:
    """A handler that does this instead, and reads and writes the same messages.

    Whoever holds no thread must not begin to: a thread for each watcher would leave none for workers.

    Args:
        handler: the one inside.
        behaviour: what to do.
        request_streaming: whether that takes an iterator of requests; None: if the handler does.
    """
    streaming = handler.request_streaming if request_streaming is None else request_streaming
    if holds_no_thread(behaviour_of(handler)):
        setattr(behaviour, _NON_BLOCKING, True)
    make = getattr(grpc, f"{_kind(handler, request_streaming=streaming)}_rpc_method_handler")
    return make(behaviour, handler.request_deserializer, handler.response_serializer)


def _kind(handler: Any, *, request_streaming: bool) -> str:
    return f"{_WORDS[request_streaming]}_{_WORDS[handler.response_streaming]}"
