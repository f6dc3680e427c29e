"""Parameters on their way to a worker, and the wait for them."""

import queue
from dataclasses import dataclass

from ormo_protos.tensors import Payload
from ormo_server.core.errors import OrmoError
from ormo_server.core.keys import SlotKey
from ormo_server.core.state import Ticket


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a request for parameters is answered with.

    Attributes:
        epoch, iteration: of the parameters.
        samples: counted so far in the run.
        ticket: None for readers.
        payload: None if nothing is newer than what the reader has.
    """

    epoch: int
    iteration: int
    samples: int
    ticket: Ticket | None
    payload: Payload | None


class PeerGone(Exception):
    """The peer of a call has gone away: there is nobody to answer."""


class Waiter:
    """A slot's wait for its ticket: resolved once, from whichever thread makes the ticket possible.

    Attributes:
        slot: who waits.
        payload: where the parameters will be written.
        delivered: whether the ticket has come; nothing is written any more then.
    """

    def __init__(self, slot: SlotKey, payload: Payload) -> None:
        self.slot = slot
        self.payload = payload
        self.delivered = False
        self._outcomes: queue.SimpleQueue[Delivery | Exception] = queue.SimpleQueue()  # the first one counts

    def resolve(self, delivery: Delivery) -> None:
        """The ticket is here and `payload` is filled."""
        self.delivered = True
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
