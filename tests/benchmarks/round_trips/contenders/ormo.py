"""This project: the server as its command starts it, and the worker's own exchanges."""

import os
import sys

from benchmarks.round_trips.place import LEARNING_RATE, MOMENTUM, Place, RoundTrip
from ormo_runtime.process import keep_freed_memory
from ormo_runtime.tls import Credentials


def serve(place: Place, *more: str) -> None:
    """Become the server's program, with more flags if there are some."""
    os.execv(sys.executable, [sys.executable, "-m", "ormo_server", *arguments(place, *more)])


def arguments(place: Place, *more: str) -> list[str]:
    """What the server's program is called with."""
    flags = {
        "--listen": "127.0.0.1:0",
        "--metrics-listen": "127.0.0.1:0",
        "--directory": place.folder,
        "--max-workers": max(2, place.workers),
        "--learning-rate": LEARNING_RATE,
        "--momentum": MOMENTUM,
        "--checkpoint-seconds": 3600,
        "--log-level": "error",
    }
    return ["serve", *(str(word) for flag in flags.items() for word in flag), *more]


def connect(place: Place, dtype: int | None = None, credentials: Credentials | None = None) -> RoundTrip:
    """A worker that has joined. What it receives into is a payload, which is such an array."""
    import torch

    from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
    from ormo_protos.tensors import Payload, PayloadLayout
    from ormo_worker.client.api import ParameterClient
    from ormo_worker.client.messages import Gradient

    keep_freed_memory()
    torch.set_num_threads(1)
    manifest = Manifest.laid_out([TensorSpec("weight", (place.elements,), FLOAT32, PARAMETER)])

    def filled(value: float, wire: int, *, buffers: bool) -> Payload:
        payload = Payload(PayloadLayout.of(manifest, wire, with_buffers=buffers))  # type: ignore[arg-type]
        payload.parameters.fill_(value)
        return payload

    wire = FLOAT32 if dtype is None else dtype
    client = ParameterClient(
        place.address,
        manifest,
        model=lambda: filled(0.0, FLOAT32, buffers=True),
        worker_id=f"worker-{place.rank}",
        wire_dtype=wire,  # type: ignore[arg-type]
        credentials=credentials,
    )
    client.join()
    slot = client.slots[0]
    slot.exchange(None)
    source, sink = torch.from_numpy(place.gradient()), torch.from_numpy(place.parameters())
    gradient = Gradient(filled(1e-6, wire, buffers=False), samples=1)

    def round_trip() -> None:
        if wire != FLOAT32:
            gradient.payload.parameters.copy_(source)
        delivered = slot.exchange(gradient).delivered
        assert delivered is not None
        if wire != FLOAT32:
            sink.copy_(delivered.payload.parameters)

    return round_trip
