"""What is compared: a module for each, with `serve`, which does not return, and `connect`, a worker's round trip."""

from importlib import import_module
from types import ModuleType

SOCKET = "socket"
ORMO = "ormo"
_MODULES = {
    SOCKET: "sockets",
    ORMO: "ormo",
    "ormo, bfloat16": "ormo_bfloat16",
    "torch.distributed.rpc": "torch_rpc",
    "torch.distributed.rpc, tuned": "torch_rpc_tuned",
    "grpcio + protobuf": "grpcio",
    "pyzmq": "zmq",
}
# Only when asked for.
_MORE = {"ormo, journal": "ormo_journal", "ormo, journal without fsync": "ormo_journal_off", "ormo, TLS": "ormo_tls"}
USUAL = tuple(_MODULES)
NAMES = (*USUAL, *_MORE)


def module(name: str) -> ModuleType:
    """The contender of this name."""
    return import_module(f"benchmarks.round_trips.contenders.{(_MODULES | _MORE)[name]}")
