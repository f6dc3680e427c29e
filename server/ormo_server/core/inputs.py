"""What goes into the state machine: who asks, the gradient that a worker pushes, and inputs as plain records."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ormo_server.core.keys import SlotKey, TicketKey
from ormo_server.core.state import PushResult, Ticket


class Requester(NamedTuple):
    """Who asks: a slot of an incarnation of a worker, with the slot's rising request number (from 1 up)."""

    worker: str
    incarnation: int
    slot: int
    request: int

    @property
    def slot_key(self) -> SlotKey:
        """(worker, slot)."""
        return (self.worker, self.slot)


@dataclass(frozen=True, slots=True)
class Gradient:
    """A gradient as it came in, already known to be finite (buffers need not be) and of the model's size.

    Attributes:
        ticket: key of the ticket that it redeems.
        values: g, shape (d,), float32 or bfloat16, mean over the mini-batch, weight decay added.
        samples: in the mini-batch.
        float_buffers: the worker's, shape (f,), float32; None if it sent none.
        int_buffers: the worker's, shape (i,), int64, or the bits of float64; None if it sent none.
        norm: Euclidean, of `values`; None for one that was taken before, and is only done again.
    """

    ticket: TicketKey
    values: torch.Tensor
    samples: int = 0
    float_buffers: torch.Tensor | None = None
    int_buffers: torch.Tensor | None = None
    norm: float | None = None


# Inputs that took effect. `now` is seconds on the driver's clock, as it was passed in.


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker became a member, in the place of an older incarnation if there was one."""

    now: float
    worker: str
    incarnation: int
    slots: int


@dataclass(frozen=True, slots=True)
class Left:
    """A worker is no member any more: it left, or its lease ran out."""

    now: float
    worker: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Requested:
    """A slot asked for a ticket."""

    now: float
    requester: Requester


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A slot waits no longer."""

    slot: SlotKey


@dataclass(frozen=True, slots=True)
class Returned:
    """A ticket came back unused, or was out for too long."""

    now: float
    worker: str
    incarnation: int
    ticket: TicketKey


@dataclass(frozen=True, slots=True)
class Pushed:
    """A gradient redeemed a ticket."""

    now: float
    requester: Requester
    ticket: Ticket
    samples: int
    result: PushResult


@dataclass(frozen=True, slots=True)
class LearningRateSet:
    """The operator has set the learning rate."""

    now: float
    learning_rate: float


Input = Joined | Left | Requested | Withdrawn | Returned | Pushed | LearningRateSet
