"""Why a call was refused: the reasons that travel in `google.rpc.ErrorInfo` and label the metrics."""

from enum import StrEnum

ERROR_DOMAIN = "ormo.v1"


class Reason(StrEnum):
    """One word per reason; `parameter_server.proto` says at which call it can come and what to do then."""

    BAD_MANIFEST = "BAD_MANIFEST"
    BAD_PAYLOAD = "BAD_PAYLOAD"
    BAD_REQUEST = "BAD_REQUEST"
    DISK_FULL = "DISK_FULL"
    DRAINING = "DRAINING"
    FINISHED = "FINISHED"
    INTERNAL = "INTERNAL"
    MANIFEST_DIGEST = "MANIFEST_DIGEST"
    MEMORY_LIMIT = "MEMORY_LIMIT"
    MODEL_EXISTS = "MODEL_EXISTS"
    NON_FINITE = "NON_FINITE"
    NOT_A_MEMBER = "NOT_A_MEMBER"
    NORM_TOO_LARGE = "NORM_TOO_LARGE"
    NOT_READY = "NOT_READY"
    NOT_WANTED = "NOT_WANTED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    PROTOCOL_VERSION = "PROTOCOL_VERSION"
    REPLACED = "REPLACED"
    STALE_REQUEST = "STALE_REQUEST"
    SUPERSEDED = "SUPERSEDED"
    TICKET_UNKNOWN = "TICKET_UNKNOWN"
    TOO_MANY_STREAMS = "TOO_MANY_STREAMS"
    TOO_MANY_WORKERS = "TOO_MANY_WORKERS"
    TOO_MUCH_IN_FLIGHT = "TOO_MUCH_IN_FLIGHT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    UNSOUND_WORKER = "UNSOUND_WORKER"


# A gradient that is refused for one of these leaves its ticket to another one.
UNSOUND_GRADIENT = frozenset({Reason.NON_FINITE, Reason.NORM_TOO_LARGE})
