"""What each role may call. A method that is not here may be called by nobody, once there is a list of callers."""

from enum import StrEnum

from google.protobuf.descriptor import ServiceDescriptor
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

SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServer"]
HEALTH: ServiceDescriptor = health_pb2.DESCRIPTOR.services_by_name["Health"]  # type: ignore[assignment] # its class in C
REFLECTION: ServiceDescriptor = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]  # type: ignore[assignment]

# Where a message names a worker, that it is the caller's own is checked besides.
ALLOWED: dict[str, frozenset[Role]] = {
    f"/{SERVICE.full_name}/Join": _WORKERS,
    f"/{SERVICE.full_name}/OfferModel": _WORKERS,
    f"/{SERVICE.full_name}/DescribeModel": _ALL,
    f"/{SERVICE.full_name}/PullParams": _ALL,
    f"/{SERVICE.full_name}/PushGradient": _WORKERS,
    f"/{SERVICE.full_name}/PushPull": _WORKERS,
    f"/{SERVICE.full_name}/Heartbeat": _WORKERS,
    f"/{SERVICE.full_name}/Leave": _WORKERS,
    f"/{SERVICE.full_name}/ReportEvaluation": _ALL,
    f"/{SERVICE.full_name}/GetStatus": _ALL,
    f"/{SERVICE.full_name}/Control": _ADMINS,
    f"/{HEALTH.full_name}/Check": _ALL,
    f"/{HEALTH.full_name}/List": _ALL,
    f"/{HEALTH.full_name}/Watch": _ALL,
    f"/{REFLECTION.full_name}/ServerReflectionInfo": _ALL,  # served with `--reflection` only
}
