"""What is compared: a module for each, with `serve`, which does not return, and `connect`, a worker's round trip."""

from importlib import import_module
from types import ModuleType

SOCKET = "socket"
ORMO = "ormo"
STREAM = "bare gRPC stream"
RETURNING = "ormo, memory given back"
_MODULES = {
    SOCKET: "sockets",
    ORMO: "ormo",
    "ormo, bfloat16": "ormo_bfloat16",
    "torch.distributed.rpc": "torch_rpc",
    "torch.distributed.rpc, tuned": "torch_rpc_tuned",
    "grpcio + protobuf": "grpcio",
    "pyzmq": "zmq",
    STREAM: "stream",
}
# Only when asked for.
_MORE = {
    "ormo, journal": "ormo_journal",
    "ormo, journal without fsync": "ormo_journal_off",
    "ormo, TLS": "ormo_tls",
    RETURNING: "ormo_returning",
}
USUAL = tuple(_MODULES)
NAMES = (*USUAL, *_MORE)
# What a user could take instead: the floors, of sockets and of gRPC, do less than is needed, and the others are ours.
ELSEWHERE = tuple(name for name in USUAL if name not in (SOCKET, STREAM) and not name.startswith(ORMO))


def module(name: str) -> ModuleType:
    """The contender of this name."""
    return import_module(f"benchmarks.round_trips.contenders.{(_MODULES | _MORE)[name]}")
