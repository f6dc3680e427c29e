"""What follows from an input: the answer, tickets for slots that waited, and the ends of other waits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ormo_server.core.errors import OrmoError, Superseded
from ormo_server.core.ids import SlotKey
from ormo_server.core.state import Member, PushResult, Ticket


@dataclass(frozen=True, slots=True)
class Granted:
    """A waiting slot has its ticket. `params` is what to send, or None: `StateMachine.write_delivery` at once."""

    slot: SlotKey
    ticket: Ticket
    params: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Released:
    """A waiting slot will not get its ticket."""

    slot: SlotKey
    error: OrmoError


@dataclass(frozen=True, slots=True)
class Redeemed:
    """What became of a push: the ticket that it used up, and how its gradient counted. A trace's columns, as inputs.

    Attributes:
        iteration, bucket, handed_out_seconds: the ticket's.
        delay: τ, gradients applied between the ticket's parameters and this gradient.
        lag: newest bucket less the gradient's, never negative.
        step_size: η times the step scale used; 0 if discarded.
        discarded: counted, not applied.
        iteration_after: the run's, when the gradient had been counted.
        buffers_kept: a buffer that came with it had NaN or infinity, and the server's stayed as it was.
    """

    iteration: int
    bucket: int
    handed_out_seconds: float
    delay: int
    lag: int
    step_size: float
    discarded: bool
    iteration_after: int
    buffers_kept: bool = False


@dataclass(frozen=True, slots=True)
class Effects:
    """All that followed from one input.

    Attributes:
        changed: the state is another one; an input that changed nothing need not be recorded.
        member: of a `Join`.
        result: of a `Push`: where the gradient counted, or what was kept for its retry.
        redeemed: of a `Push` that was no retry.
        bucket_size: K, as it counted.
        learning_rate: η, as it counted.
        released: in order.
        granted: in order, after those.
    """

    changed: bool = True
    member: Member | None = None
    result: PushResult | None = None
    redeemed: Redeemed | None = None
    bucket_size: int = 1
    learning_rate: float = 0.0
    released: Sequence[Released] = ()
    granted: Sequence[Granted] = ()


NOTHING = Effects(changed=False)


def superseded(slot: SlotKey) -> Superseded:
    """The error for a wait that a newer request of the same slot took over."""
    return Superseded(f"a newer stream of slot {slot[1]} of worker {slot[0]!r} took over")
