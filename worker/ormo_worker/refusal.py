"""How a call ended: gRPC's status, with the server's reason where it gave one."""

from typing import Self, cast

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ormo_protos.reasons import ERROR_DOMAIN, Reason
from ormo_runtime.logs import printable
from ormo_worker.errors import Refused, Replaced, RunFinished
from ormo_worker.session import Step, step_after


class CallEnded(Exception):
    """A call ended without the answer that was awaited.

    Attributes:
        code: the status code's name; "OK" for a stream that the server ended too early.
        reason: as in `ormo_protos.reasons`; empty if the status carries none, as with a lost connection.
        message: what the server or gRPC said, for people.
        retry_seconds: how long the server asks to wait; 0 if it does not say.
    """

    def __init__(self, code: str, reason: str, message: str, retry_seconds: float = 0.0) -> None:
        super().__init__(f"{reason or code}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.retry_seconds = retry_seconds

    @classmethod
    def of(cls, call: grpc.Call) -> Self:
        """Read a call that has ended."""
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        for detail in _details(call):
            for kind in (info, retry):
                detail.Unpack(kind)  # does nothing if it is of another kind
        reason = info.reason if info.domain == ERROR_DOMAIN else ""
        seconds = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        # Whoever answered there: what it says gets into errors, and so to the terminals of programs that are not ours.
        return cls(call.code().name, printable(reason), printable(call.details() or "no details"), seconds)

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
            return replaced(self.message)
        return Refused(f"the server refused {what} ({self}){_ADVICE.get(self.code, '')}", self.reason)


def replaced(message: str) -> Replaced:
    """The error of a worker whose place another process has taken."""
    return Replaced(
        f"a newer process has joined with this worker's id ({message}): if that was not meant, give each "
        "worker an id of its own with --worker-id",
        Reason.REPLACED,
    )


_ADVICE = {
    "UNIMPLEMENTED": ": what listens there is no ormo-server, or one of another version; check the address",
    "UNAUTHENTICATED": ": give this worker the credentials that the server expects",
    "PERMISSION_DENIED": ": ask the operator of the server for access",
}


def _details(call: grpc.Call) -> list[any_pb2.Any]:
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # details that contradict the status, as a proxy may leave them
        return []
    return list(status.details) if status is not None else []


def ended(error: grpc.RpcError) -> CallEnded:
    """The end of the call that raised this: gRPC's errors are calls, though their type does not say so."""
    return CallEnded.of(cast(grpc.Call, error))
