"""Whether calls are welcome, as gRPC's health protocol tells it.

The servicer that comes with gRPC holds its one lock while it sends to a watcher, and takes it in the thread that serves
all calls when a watcher ends: one that does not read and one that goes were enough to end serving for ever.
"""

import queue
import threading
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ormo_server.core.errors import OrmoError

_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class _Watcher:
    """One call of `Watch`.

    Args:
        service: that it asks about.
        send: returns when the watcher has taken it, or was ended because it did not.
        status: what is to be told of the service.
    """

    def __init__(
        self, service: str, send: Callable[[health_pb2.HealthCheckResponse], object], status: Callable[[str], int]
    ) -> None:
        self.service = service
        self._send = send
        self._status = status
        self._told: int | None = None
        # gRPC takes one message at a time. Only who tells this watcher waits here, never who serves calls.
        self._telling = threading.Lock()

    def tell(self) -> None:
        with self._telling:
            while (status := self._status(self.service)) != self._told:
                self._told = status
                self._send(health_pb2.HealthCheckResponse(status=status))


class Health(health_pb2_grpc.HealthServicer):
    """`grpc.health.v1.Health`; watchers hear of changes in a thread of its own, which ends with `close`."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._lock = threading.Lock()  # of the watchers; nothing is sent under it
        self._watchers: dict[grpc.ServicerContext, _Watcher] = {}
        self._changed: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._tell_watchers, name="health", daemon=True).start()

    def set(self, service: str, status: int) -> None:
        """What is told of a service from now on, a `HealthCheckResponse.ServingStatus`."""
        self._statuses[service] = status
        self._changed.put(service)

    def close(self) -> None:
        """Tell watchers no more."""
        self._changed.put(None)

    def _tell_watchers(self) -> None:
        for service in iter(self._changed.get, None):
            with self._lock:
                watchers = [each for each in self._watchers.items() if each[1].service == service]
            for context, watcher in watchers:
                try:
                    watcher.tell()
                except OrmoError:  # its caller reads nothing in too many calls
                    context.cancel()

    # What gRPC calls

    def Check(  # noqa: N802, D102
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        status = self._statuses.get(request.service)
        if status is None:
            context.set_code(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=status or 0)

    def Watch(  # type: ignore[override]  # noqa: N802, D102
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.ServicerContext,
        send: Callable[[health_pb2.HealthCheckResponse], object],
    ) -> None:
        watcher = _Watcher(request.service, send, lambda service: self._statuses.get(service, _UNKNOWN))
        with self._lock:
            self._watchers[context] = watcher
        if not context.add_callback(lambda: self._forget(context)):
            self._forget(context)
        watcher.tell()

    # By which gRPC knows that the call goes on when the method has returned, and gives it `send`.
    Watch.experimental_non_blocking = True  # type: ignore[attr-defined]

    def _forget(self, context: grpc.ServicerContext) -> None:
        with self._lock:
            self._watchers.pop(context, None)
