"""What comes of an exchange."""

from dataclasses import dataclass

from ormo_server.core.errors import OrmoError
from ormo_server.core.state import PushResult
from ormo_server.service.delivery import Waiter


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
