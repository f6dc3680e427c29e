"""The one table of refusals: why a call is refused, with which status, and what its caller does next.

Reasons travel in `google.rpc.ErrorInfo` and label the metrics. Server, worker, the test of the contract and the pages
share this table; `parameter_server.proto` says at which call a reason can come.
"""

from enum import Enum, StrEnum
from typing import Self

ERROR_DOMAIN = "ormo.v1"


class Next(Enum):
    """What a caller does after a refusal."""

    SEND_AGAIN = "send the same request again, after a pause"
    PULL = "pull again, without the gradient"
    JOIN = "join, then send the same request again"
    FINISHED = "stop: the run is over"
    REPLACED = "stop: a newer process has this worker's place"
    FAIL = "give up with an error: the same request would be refused again"


class Reason(StrEnum):
    """One row per reason.

    Attributes:
        status: name of gRPC's status code that the call ends with.
        then: what the caller does next.
        meaning: one sentence for people.
    """

    status: str
    then: Next
    meaning: str

    def __new__(cls, word: str, status: str, then: Next, meaning: str) -> Self:
        """A word that knows its row."""
        made = str.__new__(cls, word)
        made._value_, made.status, made.then, made.meaning = word, status, then, meaning
        return made

    BAD_MANIFEST = (
        "BAD_MANIFEST",
        "INVALID_ARGUMENT",
        Next.FAIL,
        "A description of a model that contradicts itself or the contract.",
    )
    BAD_PAYLOAD = (
        "BAD_PAYLOAD",
        "INVALID_ARGUMENT",
        Next.FAIL,
        "Tensor bytes of a wrong dtype or length, out of order, sent twice or missing.",
    )
    BAD_REQUEST = (
        "BAD_REQUEST",
        "INVALID_ARGUMENT",
        Next.FAIL,
        "Bytes that are not the expected message, or a field outside its documented limits.",
    )
    DISK_FULL = (
        "DISK_FULL",
        "RESOURCE_EXHAUSTED",
        Next.SEND_AGAIN,
        "The server's disk is full.",
    )
    DRAINING = ("DRAINING", "UNAVAILABLE", Next.SEND_AGAIN, "The server is about to stop.")
    FINISHED = (
        "FINISHED",
        "FAILED_PRECONDITION",
        Next.FINISHED,
        "The run has reached its set number of gradients or samples.",
    )
    # What stopped on a bug restores itself and answers again.
    INTERNAL = ("INTERNAL", "INTERNAL", Next.SEND_AGAIN, "A bug of the server; its log has the sentence.")
    LOCAL_STEPS = (
        "LOCAL_STEPS",
        "FAILED_PRECONDITION",
        Next.FAIL,
        "The run has local steps, and the worker sends the gradient of each step.",
    )
    MANIFEST_DIGEST = ("MANIFEST_DIGEST", "INVALID_ARGUMENT", Next.FAIL, "The server trains another model.")
    MEMORY_LIMIT = (
        "MEMORY_LIMIT",
        "RESOURCE_EXHAUSTED",
        Next.FAIL,
        "The model needs more memory than the server may use.",
    )
    MODEL_EXISTS = (
        "MODEL_EXISTS",
        "ALREADY_EXISTS",
        Next.JOIN,
        "A model was offered, but the server has one already.",
    )
    # Of a gradient, this and NORM_TOO_LARGE come as a push result where the stream goes on.
    NON_FINITE = (
        "NON_FINITE",
        "INVALID_ARGUMENT",
        Next.FAIL,
        "NaN or infinity in a gradient, a buffer or an offered model.",
    )
    NORM_TOO_LARGE = (
        "NORM_TOO_LARGE",
        "INVALID_ARGUMENT",
        Next.FAIL,
        "A gradient whose norm is above the set bound, or so large that the model might become infinite.",
    )
    NOT_A_MEMBER = (
        "NOT_A_MEMBER",
        "FAILED_PRECONDITION",
        Next.JOIN,
        "The worker never joined, has left, or its lease ran out.",
    )
    NOT_READY = ("NOT_READY", "UNAVAILABLE", Next.SEND_AGAIN, "The server is starting, or has no model yet.")
    NOT_WANTED = (
        "NOT_WANTED",
        "FAILED_PRECONDITION",
        Next.JOIN,
        "A model from a worker that was not asked for one, or took too long.",
    )
    PERMISSION_DENIED = (
        "PERMISSION_DENIED",
        "PERMISSION_DENIED",
        Next.FAIL,
        "The server knows the caller, and its role does not allow this.",
    )
    PROTOCOL_VERSION = (
        "PROTOCOL_VERSION",
        "FAILED_PRECONDITION",
        Next.FAIL,
        "The worker speaks another version of the protocol.",
    )
    REPLACED = (
        "REPLACED",
        "FAILED_PRECONDITION",
        Next.REPLACED,
        "A newer process with the same worker id has joined.",
    )
    STALE_REQUEST = (
        "STALE_REQUEST",
        "FAILED_PRECONDITION",
        Next.FAIL,
        "A request number below one that the slot has used already.",
    )
    SUPERSEDED = ("SUPERSEDED", "ABORTED", Next.SEND_AGAIN, "A newer stream of the same slot took over.")
    TICKET_UNKNOWN = (
        "TICKET_UNKNOWN",
        "FAILED_PRECONDITION",
        Next.PULL,
        "The ticket was never handed out to this slot, is used up, or is void.",
    )
    TOO_MANY_STREAMS = (
        "TOO_MANY_STREAMS",
        "RESOURCE_EXHAUSTED",
        Next.SEND_AGAIN,
        "As many streams are open as the server has threads for.",
    )
    TOO_MANY_WORKERS = (
        "TOO_MANY_WORKERS",
        "RESOURCE_EXHAUSTED",
        Next.SEND_AGAIN,
        "As many workers as allowed are members already.",
    )
    TOO_MUCH_IN_FLIGHT = (
        "TOO_MUCH_IN_FLIGHT",
        "RESOURCE_EXHAUSTED",
        Next.SEND_AGAIN,
        "The caller has as many bytes of tensors under way as it may, or the server's machine has no memory left.",
    )
    UNAUTHENTICATED = ("UNAUTHENTICATED", "UNAUTHENTICATED", Next.FAIL, "The server does not know the caller.")
    UNSOUND_WORKER = (
        "UNSOUND_WORKER",
        "FAILED_PRECONDITION",
        Next.FAIL,
        "Too many of this process's gradients were refused: it must stop.",
    )


# A gradient that is refused for one of these leaves its ticket to another one.
UNSOUND_GRADIENT = frozenset({Reason.NON_FINITE, Reason.NORM_TOO_LARGE})


def refusals_table() -> str:
    """A Markdown table of all reasons: status code, meaning, and what the caller does next."""
    rows = ["| reason | status | means | what the caller does |", "| --- | --- | --- | --- |"]
    rows += [f"| `{reason}` | `{reason.status}` | {reason.meaning} | {reason.then.value} |" for reason in Reason]
    return "\n".join(rows) + "\n"
