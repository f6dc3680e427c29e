"""What a contender's processes are told, and the one update that all of them make."""

import threading
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Small numbers, so that nothing overflows however long it goes on.
LEARNING_RATE, MOMENTUM = 1e-3, 0.9
RoundTrip = Callable[[], None]


@dataclass(frozen=True)
class Place:
    """Where a process stands.

    Attributes:
        elements: of the model, float32.
        workers: that there are at once.
        rank: of this one, from 0 up.
        address: of the server; empty in the server itself.
        folder: for what a server keeps.
    """

    elements: int
    workers: int
    rank: int
    address: str
    folder: Path

    def gradient(self) -> np.ndarray:
        """What a worker pushes, shape (elements,), float32."""
        return np.full(self.elements, 1e-6, dtype=np.float32)

    def parameters(self) -> np.ndarray:
        """Where a worker wants the parameters, shape (elements,), float32."""
        return np.zeros(self.elements, dtype=np.float32)


class Model:
    """A model at whoever serves it: OrMo's update, in place and whole, one gradient at a time."""

    def __init__(self, elements: int) -> None:
        import torch

        from ormo_server.core.rules import Coefficients, Landing
        from ormo_server.core.rules.ormo import Ormo

        torch.set_num_threads(1)
        self._torch = torch
        self._params = torch.zeros(elements)
        self._rule = Ormo(elements, Coefficients(MOMENTUM))
        self._landing = Landing(LEARNING_RATE, 0, 0, 4, ("w", 0))
        self._lock = threading.Lock()

    def exchange(self, gradient: "np.ndarray", out: "np.ndarray") -> None:
        """Apply a gradient, and write the parameters after it to `out`, which may be the gradient itself."""
        with self._lock:
            self._rule.apply(self._params, self._torch.from_numpy(gradient), self._landing)
            self._torch.from_numpy(out).copy_(self._params)


# For messages of any size.
GRPC_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def serve_grpc(place: Place, service: str, handler: Any) -> None:
    """Serve one method, PushPull, with nothing tuned, until killed."""
    import grpc

    server = grpc.server(futures.ThreadPoolExecutor(place.workers + 4), options=GRPC_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"PushPull": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    serving(f"127.0.0.1:{port}")
    server.wait_for_termination()


def serving(address: str, metrics: str = "") -> None:
    """Say where to connect to."""
    import sys

    sys.stdout.write(f"serving address={address} metrics={metrics}\n")
    sys.stdout.flush()
