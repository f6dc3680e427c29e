"""What each role may call. A method that is not here may be called by nobody, once there is a list of callers."""

from enum import StrEnum

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from ormo_protos.v1 import parameter_server_pb2 as pb


class Role(StrEnum):
    """What a caller is to a run."""

    WORKER = "worker"
    READER = "reader"
    ADMIN = "admin"


_WORKERS = frozenset({Role.WORKER})
_ALL = frozenset(Role)
_ADMINS = frozenset({Role.ADMIN})

_SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServer"].full_name
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name

# Where a message names a worker, that it is the caller's own is checked besides.
ALLOWED: dict[str, frozenset[Role]] = {
    f"/{_SERVICE}/Join": _WORKERS,
    f"/{_SERVICE}/OfferModel": _WORKERS,
    f"/{_SERVICE}/PullParams": _ALL,
    f"/{_SERVICE}/PushGradient": _WORKERS,
    f"/{_SERVICE}/PushPull": _WORKERS,
    f"/{_SERVICE}/Heartbeat": _WORKERS,
    f"/{_SERVICE}/Leave": _WORKERS,
    f"/{_SERVICE}/ReportEvaluation": _ALL,
    f"/{_SERVICE}/GetStatus": _ALL,
    f"/{_SERVICE}/Control": _ADMINS,
    f"/{_HEALTH}/Check": _ALL,
    f"/{_HEALTH}/List": _ALL,
    f"/{_HEALTH}/Watch": _ALL,
    f"/{_REFLECTION}/ServerReflectionInfo": _ALL,  # served with `--reflection` only
}
