"""Handing tickets out, redeeming them and making them void. These functions never move `issue` or the parameters."""

from ormo_server.core.errors import TicketUnknown
from ormo_server.core.inputs import Push
from ormo_server.core.keys import SlotKey
from ormo_server.core.state import Slot, State, Ticket

# So many may be idle, one after the other, and the next who joins waits for none of them still. More would let those
# who have pushed in a round wait for longer while many workers start.
MOST_LATE = 4


def hand_out(
    state: State, slot: SlotKey, bucket: int, now: float, *, delivered: bool, iteration: int | None = None
) -> Ticket:
    """Give a slot that has none a ticket at this iteration; None for the current one."""
    holder, number = state.slot(slot), state.next_ticket
    assert holder.ticket is None, "a slot holds at most one ticket"
    ite = state.iteration if iteration is None else iteration
    ticket = Ticket(state.epoch, number, slot, ite, bucket, now, delivered)
    state.next_ticket += 1
    holder.ticket = (state.epoch, number)
    state.tickets[holder.ticket] = ticket
    return ticket


def held(state: State, slot: SlotKey) -> Ticket | None:
    """The ticket that the slot holds."""
    key = state.slot(slot).ticket
    return None if key is None else state.tickets[key]


def in_flight(state: State, slot: Slot, push: Push) -> Ticket:
    """The ticket that a push names, if this slot of its worker holds it and got its parameters.

    Raises:
        TicketUnknown: it was never delivered to the slot, is used up, or is void.
    """
    ticket = None if slot.ticket is None else state.tickets[slot.ticket]
    if ticket is None or slot.ticket != (push.ticket_epoch, push.ticket) or not ticket.delivered:
        holds = "holds none" if ticket is None else f"holds ticket {ticket.number}"
        raise TicketUnknown(
            f"ticket {push.ticket} of epoch {push.ticket_epoch:016x} is not in flight: slot {push.slot} of worker "
            f"{push.worker!r} {holds}. It was used up, became void or never was; pull again, this gradient is lost"
        )
    return ticket


def close(state: State, ticket: Ticket) -> None:
    """The ticket is redeemed or void: it is not in flight any more."""
    slot = state.slot(ticket.slot)
    assert slot.ticket is not None
    del state.tickets[slot.ticket]
    slot.ticket = None
    if state.round_params is not None:
        drop_delivered_round(state)


def to_come_in(state: State) -> Ticket | None:
    """A ticket of the open round, if others may come into it; None if not.

    They may as long as tickets are in flight that the round began with, and then until it has `MOST_LATE` others.
    """
    oldest, (_, end) = next(iter(state.tickets.values()), None), state.round_tickets
    if oldest is None or not end:
        return None
    return oldest if oldest.number < end or state.next_ticket - end < MOST_LATE else None


def drop_delivered_round(state: State) -> None:
    """Forget the parameters of the round's opening once nobody can get them any more."""
    if state.round_params is None or to_come_in(state) is not None:
        return
    if all(ticket.delivered for ticket in state.tickets.values()):
        state.round_params = None
