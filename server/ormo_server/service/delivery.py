"""Parameters on their way to a worker, and the wait for them."""

import queue
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ormo_protos.tensors import Chunk, Payload, frozen_chunks
from ormo_server.core.errors import OrmoError
from ormo_server.core.ids import SlotKey
from ormo_server.core.state import Ticket
from ormo_server.service.copies import Copy


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a request for parameters is answered with.

    Attributes:
        epoch, iteration: of the parameters.
        samples: counted so far in the run.
        ticket: None for readers.
        payload: None if nothing is newer than what the reader has.
        copy: that fills the payload; None if it is full.
        position: in the journal, of what it follows from.
        frozen: the model's frozen tensors, which go after the payload as they are, without a copy; None if they were
            not asked for.
    """

    epoch: int
    iteration: int
    samples: int
    ticket: Ticket | None
    payload: Payload | None
    copy: Copy | None = None
    position: int = 0
    frozen: torch.Tensor | None = None

    def chunks(self) -> Iterator[Chunk]:
        """The payload in pieces, each as soon as it is there."""
        if self.payload is None:
            return
        for chunk in self.payload.chunks():
            if self.copy is not None:
                self.copy.wait_for(chunk.offset + len(chunk.data))
            yield chunk
        if self.frozen is not None:
            yield from frozen_chunks(self.frozen, self.payload.layout.frozen_offset)


class PeerGone(Exception):
    """The peer of a call has gone away: there is nobody to answer."""


class Waiter:
    """A slot's wait for its ticket: resolved once, from whichever thread makes the ticket possible.

    Attributes:
        slot: who waits.
        payload: where the parameters will be written.
        delivery: that has come; None before.
    """

    def __init__(self, slot: SlotKey, payload: Payload) -> None:
        self.slot = slot
        self.payload = payload
        self.delivery: Delivery | None = None
        self._outcomes: queue.SimpleQueue[Delivery | Exception] = queue.SimpleQueue()  # the first one counts

    def resolve(self, delivery: Delivery) -> None:
        """The ticket is here and `payload` is filled, or being filled."""
        self.delivery = delivery
        self._outcomes.put(delivery)

    def fail(self, error: OrmoError | PeerGone) -> None:
        """The ticket will not come."""
        self._outcomes.put(error)

    def wait(self) -> Delivery:
        """Block until the ticket is here; to be called once.

        Raises:
            OrmoError: why it will not come.
            PeerGone: nobody waits for it any more.
        """
        outcome = self._outcomes.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
