"""How a call ended, and the loop in which calls are tried again: how often, how long, and what is said about it."""

import logging
import random
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Self, TypeVar, cast

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ormo_protos.refusals import ERROR_DOMAIN, Reason
from ormo_runtime.logs import printable
from ormo_runtime.process import interrupted_safely
from ormo_runtime.timeouts import FailureDetection
from ormo_worker.client.arguments import Observer, Patience, positive_seconds
from ormo_worker.client.protocol import Step, step_after
from ormo_worker.errors import Refused, Replaced, RunFinished, ServerUnreachable

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

_FIRST_PAUSE_SECONDS = 0.1
_MOST_DOUBLINGS = 20  # the longest pause is reached long before
_SECONDS_BETWEEN_LOGS = 15.0
_SECONDS_BETWEEN_LOOKS = 0.2
# For so long a server that stopped in order may be away without a warning: a new pod on another node takes less.
_SECONDS_OF_A_RESTART = 60.0
# What is said at most once in these seconds, and how loud.
_WAITS = "%s at %s: %s"
_PARTED = "%s at %s: the server ends calls in order (%s): waiting until it is back"
_FAILED = "%s at %s failed (%s): trying again"
_LEVELS = {_WAITS: logging.INFO, _PARTED: logging.INFO, _FAILED: logging.WARNING}
# How calls end while a server that has stopped in order is away, and while it starts again.
_AWAY = {Reason.DRAINING, Reason.NOT_READY, "CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE"}
# A server asks for some seconds; one that asks for years must not be waited for.
_LONGEST_ASKED_SECONDS = 60.0


class CallEnded(Exception):
    """A call ended without the answer that was awaited.

    Attributes:
        code: the status code's name; "OK" for a stream that the server ended too early.
        reason: as in `ormo_protos.refusals`; empty if the status carries none, as with a lost connection.
        message: what the server or gRPC said, for people.
        retry_seconds: how long the server asks to wait; 0 if it does not say.
        is_farewell: whether the server stops in order: it says so, or ends, itself, what would have gone on.
    """

    def __init__(self, code: str, reason: str, message: str, retry_seconds: float = 0.0) -> None:
        super().__init__(f"{reason or code}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.retry_seconds = retry_seconds
        self.is_farewell = False

    @classmethod
    def of(cls, call: grpc.Call) -> Self:
        """Read a call that has ended."""
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        for detail in _details(call):
            for kind in (info, retry):
                detail.Unpack(kind)  # does nothing if it is of another kind
        reason = info.reason if info.domain == ERROR_DOMAIN else ""
        if not reason and _TOO_LARGE_FOR_A_PROXY in (call.details() or ""):
            return cls("RESOURCE_EXHAUSTED", "", f"HTTP status 413: {BODY_LIMIT}")
        seconds = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        # Whoever answered there: what it says gets into errors, and so to the terminals of programs that are not ours.
        end = cls(call.code().name, printable(reason), printable(call.details() or "no details"), seconds)
        end.is_farewell = reason == Reason.DRAINING or (not reason and _is_cancelled_there(call))
        return end

    @property
    def cause(self) -> str:
        """The reason, or the status code where there is none that is known: there are a few of both."""
        return self.reason if self.reason in set(Reason) else self.code

    @property
    def step(self) -> Step:
        """What this leads to, outside an exchange."""
        return step_after(self.code, self.reason)

    def error(self, what: str) -> Exception:
        """The exception for the caller, if this can't be mended.

        Args:
            what: what was being done, as in "joining the run".
        """
        if self.step is Step.FINISHED:
            return RunFinished(f"the run is over: {self.message}")
        if self.step is Step.REPLACED:
            return replaced_error(self.message)
        advice = _ADVICE.get(self.reason) or _ADVICE.get(self.code, "")
        return Refused(f"the server refused {what} ({self}){advice}", self.reason)


def replaced_error(message: str) -> Replaced:
    """The error of a worker whose place another process has taken."""
    return Replaced(
        f"a newer process has joined with this worker's id ({message}): if that was not meant, give each "
        "worker an id of its own with --worker-id",
        Reason.REPLACED,
    )


# How gRPC tells of an answer by something that speaks HTTP, and not gRPC.
_TOO_LARGE_FOR_A_PROXY = "http2 header with status: 413"
BODY_LIMIT = (
    "a proxy on the way to the server ends calls that send more than it allows: set nginx's client_max_body_size to 0 "
    "(it is 1 MiB unless set), or the same of another proxy"
)

# By reason, or by status code.
_ADVICE = {
    Reason.LOCAL_STEPS: ": give this worker an optimizer of its own, with inner= (ormo-worker: --inner)",
    "UNIMPLEMENTED": ": what listens there is not an ormo-server, or is one of another version; check the address",
    "UNAUTHENTICATED": ": give this worker the credentials that the server expects",
    "PERMISSION_DENIED": ": ask the operator of the server for access",
}


def _is_cancelled_there(call: grpc.Call) -> bool:
    """Whether the server cancelled it, as one that drains does between two exchanges; one that has died can't."""
    return call.code() is grpc.StatusCode.CANCELLED and not cast("grpc.Future[object]", call).cancelled()


def _details(call: grpc.Call) -> list[any_pb2.Any]:
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # details that contradict the status, as a proxy may leave them
        return []
    return list(status.details) if status is not None else []


def as_call_ended(error: grpc.RpcError) -> CallEnded:
    """The end of the call that raised this: gRPC's errors are calls, though their type does not say so."""
    return CallEnded.of(cast(grpc.Call, error))


class TryAgain(Exception):
    """Raised in an attempt: the same call is to be made again.

    Attributes:
        retry_seconds: the least pause before.
        cause: the server's reason, or gRPC's status code.
    """

    def __init__(self, message: str, seconds: float = 0.0, cause: str = "CANCELLED") -> None:
        super().__init__(message)
        self.retry_seconds = seconds
        self.cause = cause

    @classmethod
    def after(cls, end: CallEnded, message: str = "") -> "TryAgain":
        """For a call that ended so that another attempt may succeed."""
        return cls(f"{message}{end}", end.retry_seconds, end.cause)


class Waiting(TryAgain):
    """As `TryAgain`, where nothing has failed: it is not yet time."""


class SignsOfLife:
    """When the server was last heard.

    Attributes:
        any: whether it ever was.
    """

    def __init__(self) -> None:
        self.any = False
        self._heard_at = time.monotonic()
        self._farewell_at = float("-inf")

    @property
    def silent_seconds(self) -> float:
        """Seconds since anything came from the server, or since there was somebody to hear it."""
        return time.monotonic() - self._heard_at

    def mark_alive(self) -> None:
        """Note that the server is alive."""
        self._heard_at = time.monotonic()
        self.any = True

    def mark_farewell(self) -> None:
        """Note that the server stops in order."""
        self._farewell_at = time.monotonic()

    def mark_back(self) -> None:
        """Note that it serves again: what ends now ends for another reason."""
        self._farewell_at = float("-inf")

    @property
    def restarts(self) -> bool:
        """Whether it has stopped in order a moment ago, and is not back."""
        return time.monotonic() - self._farewell_at < _SECONDS_OF_A_RESTART


class RetryLoop:
    """Makes attempts until one succeeds.

    Args:
        server: where it is, for logs and errors.
        patience: how long to go on.
        signs: when the server was last heard.
        closed: ends all pauses.
        check: raises what stands against another attempt.
        observer: is told of every attempt that failed and is followed by another.
    """

    def __init__(
        self,
        server: str,
        patience: Patience,
        signs: SignsOfLife,
        closed: threading.Event,
        check: Callable[[], None],
        observer: Observer,
    ) -> None:
        failures = FailureDetection(patience.failure_timeout)
        self._server = server
        self._patience = patience
        self._shortest, self._longest = failures.shortest_pause_seconds, failures.longest_pause_seconds
        self._signs = signs
        self._closed = closed
        self._check = check
        self._observer = observer
        self._logged_at: dict[str, float] = {}

    @interrupted_safely
    def run(self, attempt: Callable[[], T], what: str, *, within: float | None = None) -> T:
        """Call `attempt` until it succeeds, with growing pauses.

        Args:
            attempt: raises `TryAgain` or `CallEnded` to be called again, where that can help.
            what: what it does, for logs and errors, as in "joining the run".
            within: seconds that all of it may take, for what is not worth more; None to go by patience.

        Raises:
            OptionRefused: `within` is no time.
            ServerUnreachable: nothing was heard of the server for as long as patience lasts, or `within`
                is over.
            OrmoError: what `check` raises.
            RunFinished: the server says that the run is over.
            Refused: the server won't do it, now or later.
        """
        began = time.monotonic()
        if within is not None:
            within = positive_seconds("within", within)
        for failures in count(1):
            self._check()  # before each attempt: a closed client or a signal must not wait for another time limit
            try:
                outcome = attempt()
            except (TryAgain, CallEnded) as failure:
                self._pause(failure, what, failures, began, within)
                continue
            if failures > 1:
                self._signs.mark_back()
                # Who has read that something failed is told that it went well after all; others never heard of it.
                if max(self._last_said(_PARTED), self._last_said(_FAILED)) >= began:
                    _LOG.info("%s at %s succeeded after %.1f s", what, self._server, time.monotonic() - began)
            return outcome
        raise AssertionError("counting has no end")

    def _pause(
        self, failure: TryAgain | CallEnded, what: str, failures: int, began: float, within: float | None
    ) -> None:
        """Wait before the next attempt, or raise if there is none."""
        if isinstance(failure, CallEnded) and failure.step is not Step.SEND_AGAIN:
            raise failure.error(what) from None
        if self._is_over(began, within):
            self._check()
            raise self._unreachable(failure, what, within) from None
        self._check()  # a call that was ended because this program leaves has not failed
        if not isinstance(failure, Waiting):
            self._observer.note_retry(failure.cause)
        self._log(failure, what)
        # At random, so that the workers of a server that is back do not all come in the same moment.
        longest = max(
            self._shortest, min(self._longest, _FIRST_PAUSE_SECONDS * 2 ** min(failures - 1, _MOST_DOUBLINGS))
        )
        backoff = random.uniform(self._shortest, longest)  # noqa: S311 - nobody gains by guessing it
        self._wait(max(backoff, min(failure.retry_seconds, _LONGEST_ASKED_SECONDS)))

    def _wait(self, seconds: float) -> None:
        # `close`, in another thread, ends the pause; a signal is not raised in here.
        while seconds > 0 and not self._closed.wait(min(seconds, _SECONDS_BETWEEN_LOOKS)):
            self._check()
            seconds -= _SECONDS_BETWEEN_LOOKS

    def _is_over(self, began: float, within: float | None) -> bool:
        passed = time.monotonic() - began
        if within is not None:
            return passed >= within
        # A client that has just begun to ask can't blame the server for the silence before.
        return self._closed.is_set() or min(self._signs.silent_seconds, passed) >= self._patience_seconds()

    def _patience_seconds(self) -> float:
        if not self._signs.any:
            return self._patience.connect_timeout
        return float("inf") if self._patience.give_up_after is None else self._patience.give_up_after

    def _log(self, failure: TryAgain | CallEnded, what: str) -> None:
        """Say why another attempt follows, but not for each of them."""
        sentence = _FAILED
        if isinstance(failure, Waiting):
            sentence = _WAITS
        elif failure.cause in _AWAY and self._signs.restarts:
            sentence = _PARTED
        now = time.monotonic()
        if not self._closed.is_set() and now - self._last_said(sentence) >= _SECONDS_BETWEEN_LOGS:
            self._logged_at[sentence] = now
            _LOG.log(_LEVELS[sentence], sentence, what, self._server, failure)

    def _last_said(self, sentence: str) -> float:
        return self._logged_at.get(sentence, float("-inf"))

    def _unreachable(self, failure: TryAgain | CallEnded, what: str, within: float | None) -> ServerUnreachable:
        seconds = f"{self._patience_seconds() if within is None else within:g} seconds"
        if not self._signs.any:
            return ServerUnreachable(
                f"no parameter server answered at {self._server} within {seconds} ({failure}): start "
                "ormo-server there, or correct the address; if it asks for certificates, check --tls-ca, --tls-cert "
                "and their dates"
            )
        return ServerUnreachable(
            f"{what} at {self._server} kept failing for {seconds} ({failure}): look at the server's log "
            "and at the network, then start this program again"
        )
