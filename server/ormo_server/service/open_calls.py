"""Calls that nothing else watches: those whose one request has not come yet, and those that hold no thread.

gRPC itself waits without limit for the request of a call, and for a watcher to take what it is sent, in a thread of the
server's pool.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from ormo_server.core.errors import BadRequest, TooManyStreams
from ormo_server.security.access import Access
from ormo_server.security.callers import Caller

# A request comes with its call, in one packet as a rule, so nobody honest has many without one.
SILENT_CALLS = 16
_RETRY_SECONDS = 1.0


class OpenCalls:
    """Ends what is silent, and what belongs to somebody who is not known any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._silent: dict[grpc.ServicerContext, float] = {}
        self._callers: dict[grpc.ServicerContext, Caller] = {}
        self._silent_of: Counter[str] = Counter()

    def request(self, requests: Iterator[Any], context: grpc.ServicerContext, caller: Caller) -> Any:
        """The one request of a call.

        Raises:
            TooManyStreams: the caller has too many calls that have not brought theirs.
            BadRequest: it has none.
            grpc.RpcError: the call has ended.
        """
        with self._awaited(context, caller):
            for request in requests:
                return request
        raise BadRequest("the call has ended without its request: expected one message")

    def watch(self, context: grpc.ServicerContext, caller: Caller) -> None:
        """The call goes on without a thread for as long as its caller is known."""
        with self._lock:
            self._callers[context] = caller
        if not context.add_callback(lambda: self._forget(context)):
            self._forget(context)

    def sender(
        self, context: grpc.ServicerContext, caller: Caller, send: Callable[[Any], object]
    ) -> Callable[[Any], object]:
        """What sends to a call that goes on without a thread, and holds one until the caller has taken it.

        Raises:
            TooManyStreams: the caller does not take what it is sent in too many calls.
        """

        def send_awaited(response: Any) -> object:
            with self._awaited(context, caller):
                return send(response)

        return send_awaited

    def end_silent(self, seconds: float) -> None:
        """End calls whose caller has been waited for for so long."""
        now = time.monotonic()
        with self._lock:
            silent = [context for context, began in self._silent.items() if now - began > seconds]
        for context in silent:
            context.cancel()

    def end_unknown(self, access: Access) -> None:
        """End calls of callers who are not on the list any more, or not as they were."""
        with self._lock:
            callers = list(self._callers.items())
        for context, caller in callers:
            if not access.still_knows(caller):
                context.cancel()

    @contextlib.contextmanager
    def _awaited(self, context: grpc.ServicerContext, caller: Caller) -> Iterator[None]:
        self._begin(context, caller)
        try:
            yield
        finally:
            self._end(context, caller)

    def _begin(self, context: grpc.ServicerContext, caller: Caller) -> None:
        with self._lock:
            if self._silent_of[caller.name] >= SILENT_CALLS:
                raise TooManyStreams(
                    f"{SILENT_CALLS} calls of {caller.name!r} wait for it to send or to read: do that first",
                    retry_seconds=_RETRY_SECONDS,
                )
            self._silent_of[caller.name] += 1
            self._silent[context] = time.monotonic()

    def _end(self, context: grpc.ServicerContext, caller: Caller) -> None:
        with self._lock:
            del self._silent[context]
            self._silent_of[caller.name] -= 1
            if not self._silent_of[caller.name]:
                del self._silent_of[caller.name]

    def _forget(self, context: grpc.ServicerContext) -> None:
        with self._lock:
            self._callers.pop(context, None)
