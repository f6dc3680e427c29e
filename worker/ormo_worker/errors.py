"""What can go wrong for a worker, at the address that programs import it from."""

from ormo_worker.client.errors import (
    ClientClosed,
    ModelMismatch,
    ModelUnusable,
    OlderServer,
    OptionRefused,
    OrmoError,
    ParametersChanged,
    ProtocolBroken,
    Refused,
    Replaced,
    RunFinished,
    ServerUnreachable,
    WorkerError,
)

__all__ = [
    "ClientClosed",
    "ModelMismatch",
    "ModelUnusable",
    "OlderServer",
    "OptionRefused",
    "OrmoError",
    "ParametersChanged",
    "ProtocolBroken",
    "Refused",
    "Replaced",
    "RunFinished",
    "ServerUnreachable",
    "WorkerError",
]
