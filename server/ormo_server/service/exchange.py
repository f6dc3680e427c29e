"""What goes into an exchange, and what comes of it."""

import math
from dataclasses import dataclass

from ormo_protos.tensors import Payload
from ormo_server.core.blocks import all_finite, squared_norm
from ormo_server.core.errors import NonFinite, OrmoError
from ormo_server.core.inputs import Requester
from ormo_server.core.keys import TicketKey
from ormo_server.core.state import PushResult
from ormo_server.service.delivery import Waiter


@dataclass(frozen=True, slots=True)
class Push:
    """A gradient that has arrived whole.

    Attributes:
        ticket: that it redeems.
        payload: its tensors.
        samples: in the mini-batch.
        loss: of the mini-batch, None if not told.
        compute_seconds: as the worker measured; 0 if not told.
    """

    ticket: TicketKey
    payload: Payload
    samples: int
    loss: float | None
    compute_seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an exchange led to. Parts that were not asked for are None.

    Attributes:
        result: of the gradient, unless it was refused.
        refusal: why the gradient was refused; the exchange goes on.
        waiter: for the ticket that was asked for.
        finished: instead of a ticket: the run is over.
    """

    result: PushResult | None = None
    refusal: OrmoError | None = None
    waiter: Waiter | None = None
    finished: bool = False


def is_finite(payload: Payload) -> bool:
    """Whether the tensors are free of NaN and infinity. Integers always are."""
    return all_finite(payload.parameters) and all_finite(payload.float_buffers)


def finite_norm(payload: Payload) -> float | None:
    """The gradient's Euclidean norm, in one walk with the search for NaN and infinity; None if there is any."""
    square = squared_norm(payload.parameters)
    if square is None or not all_finite(payload.float_buffers):
        return None
    return math.sqrt(square)


def non_finite(requester: Requester, push: Push) -> NonFinite:
    """The refusal of a gradient that is not finite."""
    where = "gradient" if not all_finite(push.payload.parameters) else "buffers"
    return NonFinite(
        f"the {where} of worker {requester.worker!r}, request {requester.request}, has NaN or infinite values and was "
        "not applied; its ticket stays valid. Lower the learning rate, or clip or rescale the gradient"
    )
