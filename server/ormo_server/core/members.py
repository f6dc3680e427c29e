"""Members, then their tickets: workers join, leave and replace each other, and every ticket is handed out, redeemed or
voided here (`hand_out`, `in_flight`, `close`).

Clocks and leases are the driver's (`deadlines`).
"""

import hashlib
from typing import TypeVar

from ormo_server.core.errors import NotAMember, Replaced, TicketUnknown
from ormo_server.core.ids import SlotKey
from ormo_server.core.inputs import Push
from ormo_server.core.state import Departed, Member, Slot, State, Ticket

# A process that was replaced or has left either learns of it soon or is dead; this many are told apart, then the oldest
# are forgotten.
PROCESSES_REMEMBERED = 1024

_K = TypeVar("_K")
_V = TypeVar("_V")


def find(state: State, worker: str, incarnation: int) -> Member:
    """The live worker with this id and incarnation.

    Raises:
        Replaced: a newer incarnation of the worker has joined.
        NotAMember: it never joined, has left, or its lease ran out.
    """
    refuse_replaced(state, worker, incarnation)
    member = state.members.get(worker)
    if member is None or member.incarnation != incarnation:
        raise NotAMember(f"worker {worker!r} is not a member of this run: join first, or again")
    return member


def refuse_replaced(state: State, worker: str, incarnation: int) -> None:
    """Turn away a process whose place another one took.

    Raises:
        Replaced: a newer incarnation of the worker has joined.
    """
    if (worker, incarnation) in state.replaced:
        raise Replaced(
            f"a newer process has joined as worker {worker!r}: this one must stop; to run both, give them different "
            "worker ids"
        )


def add(state: State, worker: str, incarnation: int, slots: int, *, run_seed: int) -> Member:
    """Take a worker in, with the smallest free rank and a data seed of its own.

    A process that comes back finds its slots as it left them: what it pushes again has its result still.
    """
    before = state.departed.pop(worker, None)
    if before is not None and before.incarnation != incarnation:
        # Also a process that had left or was taken for dead is replaced when another comes under its name: when it
        # wakes up it must not throw that one out.
        _remember(state.replaced, (worker, before.incarnation), None)
        before = None
    if before is None or len(before.slots) != slots:
        before = Departed(incarnation, [Slot() for _ in range(slots)])
    taken = {member.rank for member in state.members.values()}
    rank = next(rank for rank in range(len(taken) + 1) if rank not in taken)
    state.joins += 1
    seed = data_seed(run_seed, state.epoch, state.joins)
    member = Member(worker, incarnation, rank, seed, before.slots)
    state.members[worker] = member
    state.live_slots += slots
    return member


def remove(state: State, member: Member) -> list[SlotKey]:
    """Let a worker go: its tickets are void.

    Returns:
        Its slots that waited for a ticket.
    """
    waited = []
    for number in range(len(member.slots)):
        key = (member.worker, number)
        ticket = held(state, key)
        if ticket is not None:
            close(state, ticket)
        if key in state.waiting:
            del state.waiting[key]
            waited.append(key)
        state.rule.slot_closed(key)
    del state.members[member.worker]
    state.live_slots -= len(member.slots)
    _remember(state.departed, member.worker, Departed(member.incarnation, member.slots))
    return waited


def data_seed(run_seed: int, epoch: int, joins: int) -> int:
    """A 64-bit seed that differs for every join of a run, so that restarts do not repeat data."""
    digest = hashlib.sha256(f"{run_seed}/{epoch}/{joins}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _remember(memory: dict[_K, _V], key: _K, value: _V) -> None:
    memory[key] = value
    while len(memory) > PROCESSES_REMEMBERED:
        del memory[next(iter(memory))]


# Tickets are handed out, redeemed and voided here: `close` ends one, whether it was redeemed or became void.
# These functions never move `issue` or the parameters.


# So many may be idle, one after the other, and the next who joins waits for none of them still. More would let those
# who have pushed in a round wait for longer while many workers start.
MOST_LATE = 4


def hand_out(
    state: State,
    slot: SlotKey,
    bucket: int,
    bucket_size: int,
    now: float,
    *,
    delivered: bool,
    iteration: int | None = None,
) -> Ticket:
    """Give a slot that has none a ticket at this iteration; None for the current one."""
    holder, number = state.slot(slot), state.next_ticket
    assert holder.ticket is None, "a slot holds at most one ticket"
    ite = state.iteration if iteration is None else iteration
    ticket = Ticket(state.epoch, number, slot, ite, bucket, now, delivered, bucket_size)
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
