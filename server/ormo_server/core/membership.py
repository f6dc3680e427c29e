"""Who takes part: workers come, go, and take each other's places. Clocks and leases are the driver's (`deadlines`)."""

import hashlib
from typing import TypeVar

from ormo_server.core import tickets
from ormo_server.core.errors import NotAMember, Replaced
from ormo_server.core.keys import SlotKey
from ormo_server.core.state import Departed, Member, Slot, State

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
        ticket = tickets.held(state, key)
        if ticket is not None:
            tickets.close(state, ticket)
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
