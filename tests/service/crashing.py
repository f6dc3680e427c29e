"""Servers with a journal that die as SIGKILL would have it, and what they had by then."""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ormo_protos.manifest import FLOAT32
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.core import snapshot
from ormo_server.service import server as of_server
from ormo_server.service.server import Server
from service.wire import SMALL, WireWorker, connected, eventually, payload, served

JOURNALED: dict[str, Any] = {"journal": True, "checkpoint_seconds": 3600.0}


PROCESSES = itertools.count(1)


@contextlib.contextmanager
def crashing(directory: Path, **changes: Any) -> Iterator[Server]:
    """A server that ends without a drain or a checkpoint, as SIGKILL would have it."""
    with served(directory, **JOURNALED | changes) as server:
        yield server


def everything_hashed(server: Server) -> tuple[Any, ...]:
    """The same of a large model."""
    with server.host.engine.inspect() as machine:
        taken = snapshot.take(machine)
        fields = {name: value for name, value in taken.fields.items() if name not in ("epoch", "waiting")}
        return fields, {name: hashlib.sha256(tensor.numpy()).hexdigest() for name, tensor in taken.tensors.items()}


def everything(server: Server) -> tuple[Any, ...]:
    """All of the state but what each server has of its own: the epoch, and who waits."""
    with server.host.engine.inspect() as machine:
        taken = snapshot.take(machine)
        fields = {name: value for name, value in taken.fields.items() if name not in ("epoch", "waiting")}
        return fields, {name: tensor.tolist() for name, tensor in taken.tensors.items()}


def trained(server: Server, *, rounds: int = 3, dtype: int = FLOAT32) -> tuple[WireWorker, WireWorker]:
    """Two workers, new each time, with a ticket each, by all the ways there are."""
    with connected(server) as stub:
        anna, bert = (WireWorker(stub, name, incarnation=next(PROCESSES), start=1.0) for name in ("anna", "bert"))
        anna.join()
        bert.join()
        anna.pull(dtype=dtype)
        bert.pull(dtype=dtype)
        stream = anna.open()
        for value in range(1, rounds + 1):
            stream.begin(payload(SMALL, value, buffers=True, dtype=dtype))
            stream.result()
            stream.delivery()
            bert.push(payload(SMALL, -0.5 * value, dtype=dtype))
            bert.pull(dtype=dtype)
        return anna, bert


def unserved(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """End gRPC's thread that takes calls, as the first call does that can't have a thread of the pool.

    From then on gRPC never tells that it has stopped: nobody need wait for that as long as a server does.
    """
    monkeypatch.setattr(of_server, "_GRPC_STOP_SECONDS", 0.1)
    server._pool.shutdown()
    with connected(server) as stub:
        call = stub.GetStatus.future(pb.GetStatusRequest())
        eventually(lambda: not server.serving)
        call.cancel()
