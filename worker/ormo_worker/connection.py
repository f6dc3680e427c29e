"""The channel to the server, and the loop in which calls are tried again."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
import tenacity

from ormo_protos.tensors import MAX_MESSAGE_BYTES
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_worker.errors import ClientClosed, OrmoError, ServerUnreachable
from ormo_worker.refusal import CallEnded, ended
from ormo_worker.session import Step

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

# gRPC allows no client to ping more often.
_KEEPALIVE_SECONDS = 10.0
# A restarted server should not be met by all its workers in the same moment, nor wait long for any.
_LONGEST_PAUSE_SECONDS = 2.0
_BACKOFF = tenacity.wait_random_exponential(multiplier=0.1, min=0.05, max=_LONGEST_PAUSE_SECONDS)
_SECONDS_BETWEEN_LOGS = 15.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for the server.

    Attributes:
        connect_timeout: seconds until the first sign of life, after which a caller's call fails.
        failure_timeout: seconds without a byte after which the connection counts as dead and is made anew.
        give_up_after: seconds without a sign of life after the first one, after which a call fails; None
            to try for ever.
    """

    connect_timeout: float = 60.0
    failure_timeout: float = 30.0
    give_up_after: float | None = None


class TryAgain(Exception):
    """Raised in an attempt: the same call is to be made again, after a pause of at least these seconds."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_seconds = seconds


class Waiting(TryAgain):
    """As `TryAgain`, where nothing has failed: it is not yet time."""


class Cancellable(Protocol):
    """A call that is under way."""

    def cancel(self) -> object:
        """End it at once."""


class Connection:
    """One channel to the server: made at once, connected when first used, made again when it breaks.

    Attributes:
        server: the address as the user gave it.
        patience: how long to wait.
        stub: the server's methods.
    """

    def __init__(self, server: str, patience: Patience) -> None:
        self.server = server
        self.patience = patience
        self._channel = grpc.insecure_channel(server, options=_channel_options(patience))
        self.stub = ParameterServerStub(self._channel)
        self._open: set[Cancellable] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._fatal: OrmoError | None = None
        self._contacted = False
        self._heard_at = time.monotonic()
        self._logged_at: dict[int, float] = {}

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    @property
    def silent_seconds(self) -> float:
        """Seconds since anything came from the server."""
        return time.monotonic() - self._heard_at

    def heard(self) -> None:
        """Note that the server is alive."""
        self._heard_at = time.monotonic()
        if not self._contacted:
            self._contacted = True
            _LOG.debug("the server at %s answers", self.server)

    def check(self) -> None:
        """Raise what stands against any further call.

        Raises:
            ClientClosed: `close` was called.
            OrmoError: what `stop_with` was given.
        """
        if self._fatal is not None:
            raise self._fatal
        if self.closed:
            raise ClientClosed("this client was closed: make a new one to go on")

    def unary(self, method: Callable[..., T], request: Any, seconds: float | None = None) -> T:
        """Make one call with one answer, without retries.

        Args:
            method: of the stub.
            request: its message.
            seconds: time limit; the failure timeout by default.

        Raises:
            CallEnded: it ended without its answer.
        """
        limit = self.patience.failure_timeout if seconds is None else seconds
        if not self._contacted:
            limit = min(limit, self.patience.connect_timeout)
        with self.watched():
            answer = method(request, timeout=limit)
        self.heard()
        return answer

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn gRPC's errors into `CallEnded`, and those with the server's reason into signs of life.

        Raises:
            CallEnded: the call ended without its answer.
            ClientClosed: there is no channel any more.
        """
        try:
            yield
        except grpc.RpcError as error:
            end = ended(error)
            if end.reason:
                self.heard()
            raise end from None
        except ValueError:
            self.check()  # gRPC's way to say that the channel is closed
            raise

    @contextmanager
    def guarded(self, call: Cancellable) -> Iterator[None]:
        """End this call if the server falls silent while the block runs, or if `cancel_open` is called.

        For callers without a lease; where there is one, its heartbeat watches all calls.
        """
        started, done = time.monotonic(), threading.Event()
        limit = self.patience.failure_timeout

        def watch() -> None:
            while not done.wait(limit / 4):
                if min(self.silent_seconds, time.monotonic() - started) >= limit:
                    call.cancel()

        self.add(call)
        watcher = threading.Thread(target=watch, name="ormo-silence", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            self.remove(call)
            call.cancel()  # in case that it was left before its end

    def add(self, call: Cancellable) -> None:
        """Have `cancel_open` end this call."""
        with self._lock:
            self._open.add(call)

    def remove(self, call: Cancellable) -> None:
        """Leave this call alone from now on."""
        with self._lock:
            self._open.discard(call)

    def cancel_open(self) -> None:
        """End all calls that are under way, so that whoever waits for them wakes up and tries again."""
        with self._lock:
            calls = list(self._open)
        for call in calls:
            call.cancel()

    def stop_with(self, error: OrmoError) -> None:
        """End all calls, and fail all attempts from now on with this error."""
        self._fatal = error
        self.cancel_open()

    def retrying(self, attempt: Callable[[], T], what: str, *, within: float | None = None) -> T:
        """Call `attempt` until it succeeds, with growing pauses.

        Args:
            attempt: raises `TryAgain` or `CallEnded` to be called again, where that can help.
            what: what it does, for logs and errors, as in "joining the run".
            within: seconds that all of it may take, for what is not worth more; None to go by patience.

        Raises:
            ServerUnreachable: nothing was heard of the server for as long as patience lasts, or `within`
                is over.
            ClientClosed: `close` was called meanwhile.
            RunFinished: the server says that the run is over.
            Refused: the server won't do it, now or later.
        """

        def checked() -> T:
            self.check()
            return attempt()

        loop = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_helps),
            stop=self._out_of_patience if within is None else tenacity.stop_after_delay(within),
            wait=_pause,
            sleep=self._sleep,
            before_sleep=lambda state: self._log(what, state),
            retry_error_callback=lambda state: self._give_up(what, state, within),
        )
        try:
            return loop(checked)
        except CallEnded as end:
            raise end.error(what) from None

    def close(self) -> None:
        """End all calls and the channel; may be called from any thread, and again."""
        self._closed.set()
        self.cancel_open()
        self._channel.close()

    def _sleep(self, seconds: float) -> None:
        self._closed.wait(seconds)

    def _patience_seconds(self) -> float:
        if not self._contacted:
            return self.patience.connect_timeout
        return float("inf") if self.patience.give_up_after is None else self.patience.give_up_after

    def _out_of_patience(self, state: tenacity.RetryCallState) -> bool:
        # A client that has just begun to ask can't blame the server for the silence before.
        silent = min(self.silent_seconds, time.monotonic() - state.start_time)
        return self.closed or silent >= self._patience_seconds()

    def _log(self, what: str, state: tenacity.RetryCallState) -> None:
        """Say why another attempt follows, but not for each of them."""
        waiting = state.outcome is not None and isinstance(state.outcome.exception(), Waiting)
        level = logging.INFO if waiting else logging.WARNING
        now = time.monotonic()
        if not self.closed and now - self._logged_at.get(level, float("-inf")) >= _SECONDS_BETWEEN_LOGS:
            self._logged_at[level] = now
            sentence = "%s at %s: %s" if waiting else "%s at %s failed (%s): trying again"
            _LOG.log(level, sentence, what, self.server, _cause(state))

    def _give_up(self, what: str, state: tenacity.RetryCallState, within: float | None) -> Any:
        self.check()
        seconds = f"{self._patience_seconds() if within is None else within:g} seconds"
        if not self._contacted:
            raise ServerUnreachable(
                f"no parameter server answered at {self.server} within {seconds} ({_cause(state)}): start "
                "ormo-server there, or correct the address"
            )
        raise ServerUnreachable(
            f"{what} at {self.server} did not succeed for {seconds} ({_cause(state)}): look at the server's log "
            "and at the network, then start this program again"
        )


def _channel_options(patience: Patience) -> list[tuple[str, int]]:
    failure_ms = max(1000, int(patience.failure_timeout * 1000))
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", 0),  # they would be off for large requests alone; `retrying` serves all
        ("grpc.keepalive_time_ms", int(_KEEPALIVE_SECONDS * 1000)),
        ("grpc.keepalive_timeout_ms", failure_ms),
        # Without it a stopped server on a live host is noticed after a minute only.
        ("grpc.http2.ping_timeout_ms", failure_ms),
        # A round of the synchronous scheduler may be silent for many pings.
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5000),  # also the time that one attempt to connect may take
        ("grpc.max_reconnect_backoff_ms", int(_LONGEST_PAUSE_SECONDS * 1000)),
        # Else clients of one process share a connection, and one's backoff holds up another.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def _helps(error: BaseException) -> bool:
    """Whether the attempt that raised this may succeed later."""
    return isinstance(error, TryAgain) or (isinstance(error, CallEnded) and error.step is Step.SEND_AGAIN)


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt: the backoff, or longer where the server asks for it."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked_for = error.retry_seconds if isinstance(error, TryAgain | CallEnded) else 0.0
    return max(_BACKOFF(state), asked_for)


def _cause(state: tenacity.RetryCallState) -> str:
    return str(state.outcome.exception()) if state.outcome is not None else "no attempt was made"
