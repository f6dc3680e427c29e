"""What comes out of the state machine besides answers: the ends of waits."""

from dataclasses import dataclass

import torch

from ormo_server.core.errors import OrmoError, Superseded
from ormo_server.core.keys import SlotKey
from ormo_server.core.state import Ticket


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


Event = Granted | Released


def superseded(slot: SlotKey) -> Superseded:
    """The error for a wait that a newer request of the same slot took over."""
    return Superseded(f"a newer stream of slot {slot[1]} of worker {slot[0]!r} took over")
