"""Interceptors stand round a handler by making another one like it."""

from collections.abc import Callable
from typing import Any

import grpc

_NON_BLOCKING = "experimental_non_blocking"
_WORDS = {True: "stream", False: "unary"}


def behaviour_of(handler: Any) -> Callable[..., Any]:
    """What a handler does with (request or requests, context)."""
    behaviour: Callable[..., Any] = getattr(handler, _kind(handler, request_streaming=handler.request_streaming))
    return behaviour


def holds_no_thread(behaviour: Callable[..., Any]) -> bool:
    """Whether it returns at once and answers later, through a callback: gRPC's health service watches so."""
    return bool(getattr(behaviour, _NON_BLOCKING, False))


def rewrapped(handler: Any, behaviour: Callable[..., Any], *, request_streaming: bool | None = None) -> Any:
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
