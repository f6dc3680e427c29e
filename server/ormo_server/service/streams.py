"""The open streams: how many there may be, whose they are, and how they end.

Each open stream holds a thread of the synchronous server, so their number is bounded and the pool is sized by it.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from ormo_server.core.effects import superseded
from ormo_server.core.errors import BadRequest, Draining, TooManyStreams
from ormo_server.core.inputs import Requester
from ormo_server.security import Access, Caller
from ormo_server.service.delivery import Delivery, PeerGone, Waiter

F = TypeVar("F")

_RETRY_SECONDS = 1.0
_FAREWELL_SECONDS = 1.0


def draining() -> Draining:
    """The refusal of a server that is about to stop."""
    return Draining("the server is about to stop: retry until it, or its successor, is back", retry_seconds=1.0)


def _nothing_to_renew(_: str) -> None:
    """Readers and offers of a model have no lease."""


class OpenStream:
    """One call that holds a thread.

    Attributes:
        caller: who opened it.
        peer: from which address, as gRPC names it.
        requester: the slot that it serves, from its first message on; None for readers and offers of a model.
        current: it may still act for its slot; no newer stream of the slot has taken over.
        is_busy: a drain waits for it.
        busy: makes it so, as long as one is inside: `with stream.busy:`.
        reader: it is counted with the readers.
    """

    def __init__(
        self, context: grpc.ServicerContext, caller: Caller, registry: "StreamRegistry", *, reader: bool
    ) -> None:
        self.caller = caller
        self.peer = context.peer()
        self.requester: Requester | None = None
        self.current = True
        self.is_busy = False
        self.reader = reader
        self._moved = time.monotonic()
        self._peer_is_done = False
        self._context = context
        self._registry = registry
        self.busy = _Busy(self, registry)
        self._waiter: Waiter | None = None
        self._renew_lease: Callable[[str], object] = _nothing_to_renew
        context.add_callback(self._gone)

    def introduce(self, requester: Requester, renew_lease: Callable[[str], object]) -> None:
        """Say whose stream it is, at each exchange; an older stream of the same slot ends.

        Args:
            requester: whose.
            renew_lease: is called with the worker's id whenever bytes come or go.

        Raises:
            BadRequest: it was another worker's or slot's before.
        """
        mine = self.requester
        self._renew_lease = renew_lease
        if mine is None:
            self._registry.take_over(self, requester)
        elif not self.serves(requester):
            raise BadRequest(
                f"this stream began as slot {mine.slot} of worker {mine.worker!r} and continues as slot "
                f"{requester.slot} of worker {requester.worker!r}: open a stream for each slot"
            )

    def serves(self, requester: Requester) -> bool:
        """Whether it was introduced as the stream of this incarnation's slot."""
        return self.requester is not None and self.requester[:3] == requester[:3]

    def wait(self, waiter: Waiter) -> Delivery:
        """Block until the ticket is here, the stream ends, or the server drains.

        Raises:
            OrmoError: why the ticket will not come.
            PeerGone: the stream has ended.
        """
        self._waiter = waiter
        try:
            if not self._context.is_active():
                self._gone()
            self._registry.wake_if_draining(self)
            return waiter.wait()
        finally:
            self._waiter = None

    def incoming(self, frames: Iterator[F]) -> Iterator[F]:
        """What the peer sends. Each message shows that it lives; none is held here while the next one is waited for."""

        def seen(frame: F) -> F:
            self.touch()
            return frame

        return map(seen, frames)

    def touch(self) -> None:
        """Bytes came or went: the peer lives."""
        self._moved = time.monotonic()
        if self.requester is not None:
            self._renew_lease(self.requester.worker)

    def mark_received(self) -> None:
        """The peer has sent everything: from now on it waits for us, however long that takes."""
        self._peer_is_done = True

    @property
    def is_silent(self) -> bool:
        """Whether it is a worker's and has not said which one's."""
        return self.requester is None and not self.reader

    def is_stuck(self, patience_seconds: float) -> bool:
        """Whether no lease watches over it and nothing has come from the peer, or gone to it, for so long."""
        watched = self.requester is not None or self._peer_is_done
        return not watched and time.monotonic() - self._moved > patience_seconds

    def wake(self, error: Draining) -> None:
        """End a wait."""
        if self._waiter is not None:
            self._waiter.fail(error)

    def end(self) -> None:
        """End the stream from outside; the peer sees CANCELLED if it was reading."""
        self.current = False
        if self._waiter is not None and self.requester is not None:
            self._waiter.fail(superseded(self.requester.slot_key))
        else:
            self._context.cancel()

    def _gone(self) -> None:
        self.current = False
        if self._waiter is not None:
            self._waiter.fail(PeerGone())


class _Busy:
    """While inside, a drain waits for the stream.

    Raises:
        Draining: the server is about to stop.
    """

    __slots__ = ("_registry", "_stream")

    def __init__(self, stream: OpenStream, registry: "StreamRegistry") -> None:
        self._stream = stream
        self._registry = registry

    def __enter__(self) -> None:
        # In this order, and without the registry's lock: a drain that is not seen here sees that the stream is busy.
        self._stream.is_busy = True
        if self._registry.draining:
            self.__exit__()
            raise draining()

    def __exit__(self, *_: object) -> None:
        self._stream.is_busy = False
        if self._registry.draining:
            self._registry.wake_drain()


class StreamRegistry:
    """Knows every open stream.

    Args:
        workers: how many may be open at once for workers.
        readers: how many besides for readers, who must not take the workers' places.

    Attributes:
        draining: the server is about to stop. Read without the lock: see `_Busy`.
    """

    def __init__(self, workers: int, readers: int) -> None:
        self._places = {False: workers, True: readers}
        # Of what follows. Streams are ended outside it: that wakes their threads, which come here to be forgotten.
        self._lock = threading.Lock()
        self._open: set[OpenStream] = set()
        self._by_slot: dict[tuple[str, int], OpenStream] = {}
        self.draining = False
        self._idle = threading.Condition(self._lock)

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.contextmanager
    def open(self, context: grpc.ServicerContext, caller: Caller, *, reader: bool = False) -> Iterator[OpenStream]:
        """Admit a stream for as long as its handler is inside.

        Raises:
            TooManyStreams: as many are open as there are threads for.
            Draining: the server is about to stop.
        """
        stream = OpenStream(context, caller, self, reader=reader)
        with self._lock:
            self.refuse_if_draining()
            self._refuse_if_full(reader=reader)
            if not reader:
                self._refuse_if_silent(caller)
            self._open.add(stream)
        try:
            yield stream
        finally:
            self._forget(stream)

    def count(self, *, reader: bool) -> int:
        """How many are open, of readers or of all others."""
        return sum(stream.reader == reader for stream in self._snapshot())

    def _refuse_if_full(self, *, reader: bool) -> None:
        count = sum(stream.reader == reader for stream in self._open)
        if count >= self._places[reader]:
            whose, settings = ("readers", "max_readers") if reader else ("workers", "max_workers or slots_per_worker")
            raise TooManyStreams(
                f"{count} streams of {whose} are open, which is as many as this server has threads for: try again "
                f"later, or raise {settings}",
                retry_seconds=_RETRY_SECONDS,
            )

    def _refuse_if_silent(self, caller: Caller) -> None:
        # A place counts for each slot and another one for its next stream, so half of them are enough for everybody.
        silent = sum(each.caller == caller and each.is_silent for each in self._open)
        if silent >= max(1, self._places[False] // 2):
            raise TooManyStreams(
                f"{silent} streams of {caller.name!r} are open that have not said which worker they serve: send "
                "their first messages before opening more",
                retry_seconds=_RETRY_SECONDS,
            )

    def _forget(self, stream: OpenStream) -> None:
        with self._lock:
            stream.is_busy = False
            self._open.discard(stream)
            key = stream.requester.slot_key if stream.requester else None
            if key is not None and self._by_slot.get(key) is stream:
                del self._by_slot[key]
            self._idle.notify_all()

    def take_over(self, stream: OpenStream, requester: Requester) -> None:
        """The stream is its slot's from now on; an older one ends."""
        with self._lock:
            stream.requester = requester
            old = self._by_slot.get(requester.slot_key)
            self._by_slot[requester.slot_key] = stream
        if old is not None:
            old.end()

    def wake_drain(self) -> None:
        """A stream is no longer busy: let a drain look again."""
        with self._lock:
            self._idle.notify_all()

    def refuse_if_draining(self) -> None:
        """End a stream between two exchanges.

        Raises:
            Draining: the server is about to stop.
        """
        if self.draining:
            raise draining()

    def wake_if_draining(self, stream: OpenStream) -> None:
        """A wait that begins in a drain ends at once."""
        if self.draining:
            stream.wake(draining())

    def end_worker(self, worker: str, incarnation: int) -> None:
        """End all streams of a worker that is no member any more."""
        for stream in self._snapshot():
            mine = stream.requester
            if mine is not None and (mine.worker, mine.incarnation) == (worker, incarnation):
                stream.end()

    def end_unknown(self, access: Access) -> None:
        """End streams of callers who are not on the list any more, or not as they were."""
        for stream in self._snapshot():
            if not access.still_knows(stream.caller):
                stream.end()

    def end_silent(self, patience_seconds: float) -> None:
        """End streams that were opened and then said nothing, and readers and offers that have stopped."""
        for stream in self._snapshot():
            if stream.is_stuck(patience_seconds):
                stream.end()

    def drain(self, seconds: float) -> bool:
        """Let exchanges under way end and end everything else at once.

        Returns:
            Whether all ended by themselves within `seconds`; those that did not have been cancelled.
        """
        with self._lock:
            self.draining = True
            streams = list(self._open)
        for stream in streams:
            if stream.is_busy:
                stream.wake(draining())
            else:
                stream.end()
        with self._lock:
            done = self._idle.wait_for(lambda: not any(stream.is_busy for stream in self._open), seconds)
            # What was sent last must reach its peer before the stream is cut.
            self._idle.wait_for(lambda: not self._open, _FAREWELL_SECONDS)
        for stream in self._snapshot():
            stream.end()
        return done

    def _snapshot(self) -> list[OpenStream]:
        with self._lock:
            return list(self._open)


# Calls that nothing else watches: gRPC itself waits without limit for the request of a call, and for a watcher to take
# what it is sent, in a thread of the server's pool.


# A request comes with its call, in one packet as a rule, so nobody honest has many without one.
SILENT_CALLS = 16


class OpenCalls:
    """Ends what is silent, and what belongs to somebody who is not known any more."""

    def __init__(self) -> None:
        # Of what follows. Calls are cancelled outside it: gRPC then calls back, which takes it again.
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
                    f"{SILENT_CALLS} calls of {caller.name!r} are waiting for it to send or to read: finish "
                    "those first",
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
