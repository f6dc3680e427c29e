"""The channel to the server, and the calls that are under way on it."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import grpc

from ormo_protos.framing import Framing
from ormo_protos.limits import MAX_MESSAGE_BYTES
from ormo_protos.parsing import Malformed, Parser
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.channels import Dialer, UnaryStub
from ormo_runtime.process import end_on_signals, interrupted_safely, leave_if_asked
from ormo_runtime.timeouts import FailureDetection
from ormo_runtime.tls import Credentials
from ormo_worker.client.arguments import Observer, Patience
from ormo_worker.client.messages import require_well_formed
from ormo_worker.client.retries import CallEnded, RetryLoop, SignsOfLife, as_call_ended
from ormo_worker.errors import ClientClosed, OrmoError

T = TypeVar("T")


class Cancellable(Protocol):
    """A call that is under way."""

    def cancel(self) -> object:
        """End it at once."""


class Connection:
    """One channel to the server: made at once, connected when first used, made again when it breaks.

    Shared by all threads of a client: its slots', the heartbeat's, the caller's. The lock guards which channels and
    which calls there are, and is held for no call to gRPC: to cancel or close may call back into this object.

    Args:
        server: HOST:PORT.
        patience: how long to wait for the server.
        observer: is told of each call that is made again.
        credentials: to connect with; None for no TLS. New certificates are used from the next broken connection on.

    Attributes:
        server: the address as the user gave it.
        patience: as given.
        observer: as given.
        stub: the server's methods that carry no tensors.
        tensors: the server's methods that carry tensors.
        mark_alive: notes that something has come from the server just now.
        retry: calls an attempt until it succeeds; arguments and errors as for `RetryLoop.run`.

    Raises:
        CredentialsError: a certificate, key or token can't be used.
    """

    def __init__(
        self, server: str, patience: Patience, observer: Observer, credentials: Credentials | None = None
    ) -> None:
        self.server = server
        self._process = os.getpid()
        self.patience = patience
        self.observer = observer
        self._dialer = Dialer(server, credentials, _channel_options(patience))
        self._channels: list[grpc.Channel] = []
        self._open: dict[Cancellable, int] = {}  # with the thread that waits for it
        self._lock = threading.Lock()
        self._dial()
        self._closed = threading.Event()
        self._fatal: OrmoError | None = None
        self._signs = SignsOfLife()
        end_on_signals(self)
        self.mark_alive = self._signs.mark_alive
        self.retry = RetryLoop(self._dialer.place, patience, self._signs, self._closed, self.check, observer).run

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of the one whose connection it is."""
        return os.getpid() != self._process

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    @property
    def silent_seconds(self) -> float:
        """Seconds since anything came from the server."""
        return self._signs.silent_seconds

    def check(self) -> None:
        """Raise what stands against any further call.

        Raises:
            ClientClosed: `close` was called.
            OrmoError: what `stop_with` was given, or this process is a fork.
            KeyboardInterrupt: a signal has come, and could not be raised where it came.
        """
        leave_if_asked()
        if os.getpid() != self._process:
            raise OrmoError(
                f"process {os.getpid()} is a fork of the worker's process {self._process}, which alone is in the run: "
                "make a RemoteOptimizer or client in the process that uses it"
            )
        if self._fatal is not None:
            raise self._fatal
        if self._closed.is_set():
            raise ClientClosed("this client was closed: create a new one to continue")

    @interrupted_safely
    def unary(
        self, method: "grpc.UnaryUnaryMultiCallable[Any, T | Malformed]", request: Any, seconds: float | None = None
    ) -> T:
        """Make one call with one answer, without retries.

        Args:
            method: one of the stub's.
            request: the message that it takes.
            seconds: time limit; the failure timeout by default.

        Raises:
            CallEnded: it ended without its answer.
            ProtocolBroken: the answer is none.
        """
        limit = FailureDetection(self.patience.failure_timeout).call_seconds if seconds is None else seconds
        if not self._signs.any:  # or a wrong address would be found out only after a time limit meant for a live server
            limit = min(limit, self.patience.connect_timeout)
        with self.errors_as_call_ended():
            call = method.future(request, timeout=limit)
            self.add(call)
            try:
                answer = call.result()
            finally:
                self.remove(call)
        self.mark_alive()
        return require_well_formed(answer)

    @contextmanager
    def errors_as_call_ended(self) -> Iterator[None]:
        """Turn gRPC's errors into `CallEnded`, and those with the server's reason into signs of life.

        Raises:
            CallEnded: the call ended without its answer.
            ClientClosed: there is no channel any more.
        """
        try:
            yield
        except grpc.RpcError as error:
            raise self.end_of(error) from None
        except grpc.FutureCancelledError:
            raise CallEnded("CANCELLED", "", "this program has ended the call") from None
        except ValueError:
            self.check()  # gRPC's way to say that the channel is closed
            raise

    def end_of(self, error: grpc.RpcError) -> CallEnded:
        """What gRPC's error says of the call that raised it, which is also what is now known of the connection."""
        end = as_call_ended(error)
        if end.is_farewell:
            self._signs.mark_farewell()
        if end.reason:  # only the server gives one: a proxy's or gRPC's own error is no sign of life
            self.mark_alive()
        elif self._dialer.outdated:
            self._dial()
        return end

    def _dial(self) -> None:
        """From now on calls go through a new channel; those that are under way go on, through the one before.

        The one before that is closed: its calls have ended, or this is the second time that certificates changed under
        them.
        """
        channel = self._dialer.dial()
        with self._lock:
            older, self._channels = self._channels[:-1], [*self._channels[-1:], channel]
            self.stub, self.tensors = UnaryStub(channel), TensorStub(channel)
        for each in older:
            each.close()

    @contextmanager
    def guard(self, call: Cancellable) -> Iterator[None]:
        """End this call if the server falls silent while the block runs, or if `cancel_open` is called.

        For callers without a lease; where there is one, its heartbeat watches all calls. The watching needs a thread of
        its own: the caller's is inside gRPC, waiting for an answer that a dead network never brings.
        """
        started, done = time.monotonic(), threading.Event()
        limit = self.patience.failure_timeout

        def watch() -> None:
            while not done.wait(limit / 4):
                if min(self.silent_seconds, time.monotonic() - started) >= limit:
                    call.cancel()

        self.add(call)
        watcher = threading.Thread(target=watch, name="ormo-silence", daemon=True)
        try:
            watcher.start()  # where an interrupt may well come
            yield
        finally:
            done.set()
            if watcher.is_alive():
                watcher.join()
            self.remove(call)
            call.cancel()  # in case that it was left before its end

    def add(self, call: Cancellable) -> None:
        """Have `cancel_open` end this call."""
        with self._lock:
            self._open[call] = threading.get_ident()

    def remove(self, call: Cancellable) -> None:
        """Leave this call alone from now on."""
        with self._lock:
            self._open.pop(call, None)

    def cancel_open(self, thread: int | None = None) -> None:
        """End all calls that are under way, so that whoever waits for them wakes up and tries again.

        Args:
            thread: identity of the one whose calls these are; None for all.
        """
        with self._lock:
            calls = [call for call, waiting in self._open.items() if thread in (None, waiting)]
        for call in calls:  # outside the lock: whoever wakes up takes its call off the list
            call.cancel()

    def end_waits(self) -> None:
        """End the calls that the main thread waits for, for a signal has come."""
        self.cancel_open(threading.main_thread().ident)

    def stop_with(self, error: OrmoError) -> None:
        """End all calls, and fail all attempts from now on with this error."""
        self._fatal = error  # first: who wakes up asks `check` whether to try again
        self.cancel_open()

    @interrupted_safely
    def close(self) -> None:
        """End all calls and the channel; may be called from any thread, and again."""
        self._closed.set()  # first, as in `stop_with`; it also ends the pauses between attempts
        self.cancel_open()
        with self._lock:
            channels = list(self._channels)
        for channel in channels:
            channel.close()


def _channel_options(patience: Patience) -> list[tuple[str, int]]:
    failures = FailureDetection(patience.failure_timeout)
    ping_timeout_ms, pause_ms = int(1000 * failures.ping_timeout_seconds), int(1000 * failures.longest_pause_seconds)
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", 0),  # they would be off for large requests alone; `retry` serves all
        ("grpc.keepalive_time_ms", int(1000 * failures.ping_seconds)),
        ("grpc.keepalive_timeout_ms", ping_timeout_ms),
        # Without it a stopped server on a live host is noticed after a minute only.
        ("grpc.http2.ping_timeout_ms", ping_timeout_ms),
        # A round of the synchronous scheduler may be silent for many pings.
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", min(100, pause_ms)),
        ("grpc.min_reconnect_backoff_ms", 5000),  # also the time that one attempt to connect may take
        ("grpc.max_reconnect_backoff_ms", pause_ms),
        # Else clients of one process share a connection, and one's backoff holds up another.
        ("grpc.use_local_subchannel_pool", 1),
    ]


_SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServer"].full_name


class TensorStub:
    """Starts calls on a channel.

    Attributes:
        push_pull, describe_model, pull_params, offer_model: the methods, as `parameter_server.proto` documents them.
            Messages with tensors are `Headed` or `Chunk`; what comes in may be `Malformed`.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self.push_pull = channel.stream_stream(
            f"/{_SERVICE}/PushPull",
            request_serializer=Framing(pb.PushPullRequest).encode,
            response_deserializer=Framing(pb.PushPullResponse).decode,
        )
        self.describe_model = channel.unary_stream(
            f"/{_SERVICE}/DescribeModel",
            request_serializer=pb.DescribeModelRequest.SerializeToString,
            response_deserializer=Parser(pb.DescribeModelResponse).parse,
        )
        self.pull_params = channel.unary_stream(
            f"/{_SERVICE}/PullParams",
            request_serializer=pb.PullParamsRequest.SerializeToString,
            response_deserializer=Framing(pb.PullParamsResponse).decode,
        )
        self.offer_model = channel.stream_unary(
            f"/{_SERVICE}/OfferModel",
            request_serializer=Framing(pb.OfferModelRequest).encode,
            response_deserializer=pb.OfferModelResponse.FromString,
        )
