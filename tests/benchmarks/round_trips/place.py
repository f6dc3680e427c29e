"""What a contender's processes are told, and the one update that all of them make."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def serving(address: str, metrics: str = "") -> None:
    """Say where to connect to."""
    import sys

    sys.stdout.write(f"serving address={address} metrics={metrics}\n")
    sys.stdout.flush()
