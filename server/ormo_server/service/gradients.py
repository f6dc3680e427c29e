"""Gradients as they arrive: whether they are sound, and how long they are."""

import math
import time
from dataclasses import dataclass

from ormo_protos.tensors import Payload
from ormo_server.core.errors import NonFinite
from ormo_server.core.ids import TicketKey
from ormo_server.core.inputs import Requester
from ormo_server.core.vectors import SquaredNorm


@dataclass(frozen=True, slots=True)
class ReceivedGradient:
    """A gradient that has arrived whole.

    Attributes:
        ticket: that it redeems.
        payload: its tensors.
        samples: in the mini-batch.
        loss: of the mini-batch, NaN if it is not finite; None if not told.
        compute_seconds: as the worker measured; 0 if not told.
        norm: Euclidean, of the gradient; None if it has NaN or infinity. Buffers are the core's to judge.
    """

    ticket: TicketKey
    payload: Payload
    samples: int
    loss: float | None
    compute_seconds: float
    norm: float | None


class FiniteNorm:
    """The gradient's Euclidean norm, in one walk with the search for NaN and infinity, as its bytes arrive.

    Attributes:
        seconds: that it took so far.
    """

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._square = SquaredNorm(payload.parameters)
        self.seconds = 0.0

    def arrived(self, size: int) -> None:
        """The payload's first so many bytes are there."""
        started = time.perf_counter()
        self._square.count(size // self._payload.parameters.element_size())
        self.seconds += time.perf_counter() - started

    def norm(self) -> float | None:
        """None if there is NaN or infinity."""
        started = time.perf_counter()
        square = self._square.total()
        self.seconds += time.perf_counter() - started
        return None if square is None else math.sqrt(square)


def non_finite(requester: Requester) -> NonFinite:
    """The refusal of a gradient that is not finite."""
    return NonFinite(
        f"the gradient of worker {requester.worker!r}, request {requester.request}, has NaN or infinite values and was "
        "not applied; its ticket stays valid, unless the exchange asked for the next one. Lower the learning rate, or "
        "clip or rescale the gradient",
        worker=requester.worker,
    )
