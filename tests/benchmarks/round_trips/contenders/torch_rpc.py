"""torch.distributed.rpc as it comes. On one host it moves tensors through shared memory, not over the network."""

import os
import socket
import threading

from benchmarks.round_trips.place import Model, Place, RoundTrip, serving

_model: Model | None = None


def serve(place: Place) -> None:
    """Serve until killed."""
    global _model  # noqa: PLW0603 - a remote function finds its state nowhere else
    _model = Model(place.elements)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serving(f"127.0.0.1:{port}")
    _init(place, "server", 0, port)
    threading.Event().wait()


def connect(place: Place) -> RoundTrip:
    """A worker among as many as there are; none begins before all are there."""
    import torch
    from torch.distributed import rpc

    torch.set_num_threads(1)
    _init(place, f"worker{place.rank}", place.rank + 1, int(place.address.split(":")[1]))
    gradient, parameters = torch.from_numpy(place.gradient()), torch.from_numpy(place.parameters())

    def round_trip() -> None:
        parameters.copy_(rpc.rpc_sync("server", _exchange, args=(gradient,), timeout=600))

    return round_trip


def _exchange(gradient: "object") -> "object":
    import torch

    assert _model is not None
    assert isinstance(gradient, torch.Tensor)
    parameters = torch.empty_like(gradient)
    _model.exchange(gradient.numpy(), parameters.numpy())
    return parameters


def _init(place: Place, name: str, rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TP_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo")
    from torch.distributed import rpc

    rpc.init_rpc(name, rank=rank, world_size=place.workers + 1)
