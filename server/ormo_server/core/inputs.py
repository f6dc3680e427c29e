"""What moves the state machine: seven inputs, as plain data whose fields are a trace's columns.

`seconds` are those of the driver's clock, which never runs backwards in a run. Tensors are no part of an input, so that
it can be kept, compared and written as it is: the gradient of a `Push` goes beside it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ormo_server.core.ids import SlotKey, TicketKey
from ormo_server.core.vectors import Vector


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
class Join:
    """A worker introduces itself; repeated by the current incarnation, the answer is the same.

    Raises:
        Replaced: a newer incarnation of this id has joined.
        Finished: the run is over.
        BadRequest: a number of slots that the scheduler can't serve, or other than before.
        TooManyWorkers: `max_workers` are here.
    """

    seconds: float
    worker: str
    incarnation: int
    slots: int


@dataclass(frozen=True, slots=True)
class Leave:
    """A worker gives up its lease, or it ran out: its tickets are void and K follows.

    Raises:
        Replaced: a newer incarnation of this id has joined.
    """

    seconds: float
    worker: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Request:
    """A slot wants a ticket. It is granted at once, or by a later input, when the scheduler allows.

    A ticket that the slot held is void, unless it was not delivered yet and is this request's answer. A result that was
    kept for an earlier request is confirmed.

    Raises:
        NotAMember, Replaced, BadRequest, StaleRequest: see `StateMachine.requesting_slot`.
        Finished: the run is over.
    """

    seconds: float
    worker: str
    incarnation: int
    slot: int
    request: int


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Nobody listens any more for the ticket that a slot waits for. It need not wait, nor exist."""

    worker: str
    slot: int


@dataclass(frozen=True, slots=True)
class Return:
    """A ticket comes back unused, or its time ran out: it is void, if it was in flight and this worker's."""

    seconds: float
    worker: str
    incarnation: int
    ticket: int
    ticket_epoch: int


@dataclass(frozen=True, slots=True)
class Push:
    """A gradient is filed in the bucket of its ticket, moves the parameters, and uses up the ticket.

    A retry of the slot's last redeemed ticket gets the result that was kept, and changes nothing. `local_steps` is how
    many it holds the sum of, 0 for a gradient.

    Raises:
        NotAMember, Replaced, BadRequest, StaleRequest: see `StateMachine.requesting_slot`.
        Finished: the run is over.
        BadRequest: besides, `local_steps` is not from 1 to the run's, or not 0 in a run without.
        TicketUnknown: the slot does not hold this ticket.
        NormTooLarge: the gradient is so long that the parameters might become infinite.
        StaleRequest: besides, the number is that of another gradient, whose result is kept.
    """

    seconds: float
    worker: str
    incarnation: int
    slot: int
    request: int
    ticket: int
    ticket_epoch: int
    samples: int = 0
    local_steps: int = 0

    @property
    def ticket_key(self) -> TicketKey:
        """(epoch, number)."""
        return (self.ticket_epoch, self.ticket)


@dataclass(frozen=True, slots=True)
class SetLearningRate:
    """From the next bucket on, η is as if the settings had said this: warm-up and schedule go on, at this peak.

    Raises:
        BadRequest: below `step_size.LOWEST`, or above `HIGHEST`.
        Finished: the run is over.
    """

    seconds: float
    learning_rate: float


Input = Join | Leave | Request | Withdraw | Return | Push | SetLearningRate


@dataclass(frozen=True, slots=True)
class Gradient:
    """The tensors of a `Push`, already known to be finite (buffers need not be) and of the model's size.

    Attributes:
        values: g, shape (d,), float32 or bfloat16, or read as float32 where it is int8: the mean over the mini-batch,
            weight decay added; or the pseudo-gradient of local steps.
        float_buffers: the worker's, shape (f,), float32; None if it sent none.
        int_buffers: the worker's, shape (i,), int64, or the bits of float64; None if it sent none.
        norm: Euclidean, of `values`; None for one that was taken before, and is only done again.
    """

    values: Vector
    float_buffers: torch.Tensor | None = None
    int_buffers: torch.Tensor | None = None
    norm: float | None = None
