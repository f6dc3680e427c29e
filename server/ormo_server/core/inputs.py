"""What goes into the state machine: who asks, and the gradient that a worker pushes."""

from dataclasses import dataclass

import torch

from ormo_server.core.state import SlotKey, TicketKey


@dataclass(frozen=True, slots=True)
class Requester:
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
    """A gradient as it came in, already known to be finite and of the model's size.

    Attributes:
        ticket: key of the ticket that it redeems.
        values: g, shape (d,), float32 or bfloat16, mean over the mini-batch, weight decay added.
        samples: in the mini-batch.
        float_buffers: the worker's, shape (f,), float32; None if it sent none.
        int_buffers: the worker's, shape (i,), int64; None if it sent none.
    """

    ticket: TicketKey
    values: torch.Tensor
    samples: int = 0
    float_buffers: torch.Tensor | None = None
    int_buffers: torch.Tensor | None = None
