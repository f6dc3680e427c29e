"""A state as plain tensors and plain data, for checkpoints, and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ormo_server.core import members
from ormo_server.core.buffers import Buffers
from ormo_server.core.errors import SettingsError
from ormo_server.core.ids import TicketKey
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import Run
from ormo_server.core.pace import Pace
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.core.state import Departed, Member, PushResult, Slot, State, Ticket
from ormo_server.core.step_size import HIGHEST, LOWEST, Tuning

_COUNTERS = (
    "epoch",
    "learning_rate",
    "iteration",
    "samples",
    "newest_bucket",
    "issue",
    "filled",
    "next_ticket",
    "joins",
    "started",
    "finished",
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of a core's state.

    Attributes:
        tensors: `params`, `float_buffers`, `int_buffers`, `rule.NAME` for each vector of the rule, and
            `round_params` if a round has undelivered tickets.
        fields: everything else, as JSON can hold it.
    """

    tensors: dict[str, torch.Tensor]
    fields: dict[str, Any]


def take(machine: StateMachine, *, copied: bool = True) -> Snapshot:
    """The state as it is now.

    Args:
        machine: that has it.
        copied: so that the machine may go on at once; without, it must stay as it is while the snapshot is used.

    Raises:
        MemoryError: there is none for a copy.
    """
    state = machine.state
    views = {"params": state.params, "float_buffers": state.float_buffers, "int_buffers": state.int_buffers}
    views |= {f"rule.{name}": vector for name, vector in state.rule.vectors.items()}
    if state.round_params is not None:
        views["round_params"] = state.round_params
    fields: dict[str, Any] = {name: getattr(state, name) for name in _COUNTERS}
    fields["tuning"] = None if state.tuning is None else dataclasses.asdict(state.tuning)
    fields["rule"] = machine.run.method.rule
    fields["rule_counters"] = dict(state.rule.counters)
    fields["scheduler"] = machine.run.method.scheduler
    fields["staleness_bound"] = machine.run.method.staleness_bound
    if machine.run.local_steps:  # older servers do not know it
        fields["local_steps"] = machine.run.local_steps
    fields["members"] = [_row(member) for member in state.members.values()]
    fields["tickets"] = [_ticket(ticket) for ticket in state.tickets.values()]
    fields["replaced"] = [list(key) for key in state.replaced]
    fields["departed"] = {worker: _row(process) for worker, process in state.departed.items()}
    fields["waiting"] = [list(key) for key in state.waiting]
    fields["round_tickets"] = list(state.round_tickets)
    return Snapshot(_copies(views) if copied else views, fields)


def _row(process: Member | Departed) -> dict[str, Any]:
    return _without(process, ("buffers_kept", False), ("pace", None))


def _ticket(ticket: Ticket) -> dict[str, Any]:
    # Without K where nobody will ask for it.
    return _without(ticket, ("bucket_size", 0), ("local_steps", 0))


def _without(kept: Member | Departed | Ticket, *unsaid: tuple[str, object]) -> dict[str, Any]:
    """As plain data, without what older servers do not know, where there is none of it."""
    return dataclasses.asdict(kept, dict_factory=lambda pairs: dict(pair for pair in pairs if pair not in unsaid))


def _copies(views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    try:
        return {name: view.clone() for name, view in views.items()}
    except RuntimeError as error:  # PyTorch's word for it
        raise MemoryError("this machine has no memory for a copy of the state") from error


def resume(run: Run, snapshot: Snapshot, buffers: Buffers | None = None) -> StateMachine:
    """The very machine that a snapshot was taken of, down to who waited: for what came after it to be done again.

    Args:
        run: the settings that were in force.
        snapshot: taken over, not copied.
        buffers: see `StateMachine`.
    """
    state = _state(run, snapshot)
    state.waiting = dict.fromkeys((worker, slot) for worker, slot in snapshot.fields["waiting"])
    return StateMachine(run, state, buffers)


def restore(
    run: Run, snapshot: Snapshot, *, epoch: int, keep_tickets: bool, buffers: Buffers | None = None
) -> StateMachine:
    """The machine that a snapshot was taken of, as a server goes on with it. Nobody waits: streams have ended.

    Args:
        run: the settings to go on with.
        snapshot: taken over, not copied.
        epoch: of the server from now on.
        keep_tickets: nothing was applied after the snapshot (a drain, or a complete replay): tickets in flight and
            kept results stay good. Otherwise all are void and the round is closed.
        buffers: see `StateMachine`.

    Raises:
        SettingsError: the snapshot belongs to another update rule.
    """
    rule_name = snapshot.fields["rule"]
    if rule_name != run.method.rule:
        raise SettingsError(
            f"the checkpoint was written with the update rule {rule_name!r} and the settings say "
            f"{run.method.rule!r}: restore with the same rule, or start a new run from the checkpoint's model"
        )
    state = _state(run, snapshot)
    machine = StateMachine(run, state, buffers)
    if not keep_tickets or _was_looser(snapshot, run):
        _void_everything(state)
    if (snapshot.fields["scheduler"], snapshot.fields.get("local_steps", 0)) != (run.method.scheduler, run.local_steps):
        _change_terms(state)
    # Earlier versions let an operator set any finite number.
    tuned = state.tuning
    if tuned is not None and (tuned.instead_of != run.learning_rate.peak or not LOWEST <= tuned.peak <= HIGHEST):
        state.tuning = None
    state.epoch = epoch
    # Whoever was a member once has been waited for already.
    state.started = True
    # The settings may put the end elsewhere than it was.
    state.finished = False
    if machine.reached_end():
        machine.finish()
    return machine


def _was_looser(snapshot: Snapshot, run: Run) -> bool:
    """Whether tickets went out under a larger staleness bound than the run has now: they may come back too late."""
    before, now = snapshot.fields.get("staleness_bound"), run.method.staleness_bound
    return before is not None and now is not None and before > now


def _state(run: Run, snapshot: Snapshot) -> State:
    tensors, fields = snapshot.tensors, snapshot.fields
    rule = UPDATE_RULES[run.method.rule](0, run.coefficients)
    rule.vectors = {name.removeprefix("rule."): t for name, t in tensors.items() if name.startswith("rule.")}
    rule.counters |= fields.get("rule_counters", {})
    state = State(tensors["params"], tensors["float_buffers"], tensors["int_buffers"], rule, fields["epoch"], 0.0)
    for name in _COUNTERS:
        setattr(state, name, fields[name])
    tuning = fields.get("tuning")
    state.tuning = None if tuning is None else Tuning(**tuning)
    state.members = {row["worker"]: _member(row) for row in fields["members"]}
    state.live_slots = sum(len(member.slots) for member in state.members.values())
    restored = (Ticket(**{**row, "slot": tuple(row["slot"])}) for row in fields["tickets"])
    state.tickets = {ticket.key: ticket for ticket in restored}
    state.replaced = dict.fromkeys((worker, incarnation) for worker, incarnation in fields["replaced"])
    state.departed = {worker: _departed(row) for worker, row in fields["departed"].items()}
    state.round_params = tensors.get("round_params")
    # Earlier versions let nobody into a round that was open.
    first, end = fields.get("round_tickets", (0, 0))
    state.round_tickets = (first, end)
    return state


def _member(row: Mapping[str, Any]) -> Member:
    pace = row.get("pace")
    kept = {"slots": [_slot(slot) for slot in row["slots"]], "pace": None if pace is None else Pace(**pace)}
    return Member(**{**row, **kept})


def _departed(row: Mapping[str, Any] | int) -> Departed:
    # Earlier versions wrote the incarnation alone.
    return Departed(row, []) if isinstance(row, int) else Departed(row["incarnation"], [*map(_slot, row["slots"])])


def _slot(row: Mapping[str, Any]) -> Slot:
    result = row["result"]
    return Slot(
        row["request"],
        _ticket_key(row["ticket"]),
        None if result is None else PushResult(**result),
        _ticket_key(row.get("redeemed")),
        row.get("ticket_seconds"),
        row.get("idle", False),
    )


def _ticket_key(row: Sequence[int] | None) -> TicketKey | None:
    return None if row is None else (row[0], row[1])


def _change_terms(state: State) -> None:
    """Members joined on other terms: they join again. Buckets go on after the newest."""
    _void_everything(state)
    for member in list(state.members.values()):
        members.remove(state, member)
    if state.iteration:
        state.issue, state.filled = state.newest_bucket + 1, 0


def _void_everything(state: State) -> None:
    for ticket in list(state.tickets.values()):
        members.close(state, ticket)
    present = [member.slots for member in state.members.values()]
    for slots in present + [process.slots for process in state.departed.values()]:
        for slot in slots:
            slot.result = None
