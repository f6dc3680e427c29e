"""Counts gRPC calls as they begin and end."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from ormo_server.metrics.calls import Calls, Method
from ormo_server.service.rewrapping import behaviour_of, holds_no_thread, rewrapped

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

    def intercept_service(self, continuation: Callable[..., Any], details: grpc.HandlerCallDetails) -> Any:
        """See `grpc.ServerInterceptor`."""
        handler = continuation(details)
        return None if handler is None else self._counted(handler, self._methods[details.method])

    def _counted(self, handler: Any, method: Method) -> Any:
        behaviour = behaviour_of(handler)
        if holds_no_thread(behaviour):
            counted = self._watched(behaviour, method)
        elif handler.response_streaming:
            counted = self._streamed(behaviour, method)
        else:
            counted = self._answered(behaviour, method)
        return rewrapped(handler, counted)

    def _watched(self, behaviour: Callable[..., Any], method: Method) -> Callable[..., Any]:
        def call(request: Any, context: Any, *more: Any) -> Any:
            started = self._begin(method)
            context.add_callback(lambda: self._end(method, started, context, failed=False))
            return behaviour(request, context, *more)

        return call

    def _answered(self, behaviour: Callable[..., Any], method: Method) -> Callable[..., Any]:
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

    def _streamed(self, behaviour: Callable[..., Any], method: Method) -> Callable[..., Iterator[Any]]:
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
