"""A tiny driver: feeds a state machine as worker processes would, and remembers what each of their slots knows."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ormo_server.core.effects import Effects, Granted
from ormo_server.core.errors import OrmoError
from ormo_server.core.ids import SlotKey, TicketKey
from ormo_server.core.inputs import (
    Gradient,
    Input,
    Join,
    Leave,
    Push,
    Request,
    Requester,
    Return,
    SetLearningRate,
    Withdraw,
)
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import Method, Run
from ormo_server.core.snapshot import take
from ormo_server.core.state import Member, PushResult
from ormo_server.core.step_size import LearningRate
from ormo_server.trace import Recorded


@dataclass
class Place:
    """What a worker process knows of one of its slots."""

    request: int = 0
    granted: Granted | None = None
    params: torch.Tensor | None = None  # as delivered with `granted`
    result: PushResult | None = None  # of `request`, if that was a push
    seconds: float | None = None  # from ticket to push, of the last ticket that it redeemed
    released: OrmoError | None = None
    bucket_size: int = 0  # K when `granted` came


@dataclass(frozen=True)
class Applied:
    """A gradient that counted, with what a reference needs to know of it.

    Attributes:
        values: float64.
        bucket_size_before: K when its ticket was handed out, by a scheduler that hands out to who asks.
        holder: worker, incarnation and slot of the ticket.
        sent: what the ticket's delivery carried, in float64.
        seconds: from ticket to push.
        seconds_of_slots: the same of the last push of every live slot that has pushed, this one included.
    """

    values: torch.Tensor
    step_size: float
    bucket: int
    ticket_iteration: int
    delay: int
    bucket_size: int
    bucket_size_before: int = 0
    holder: tuple[str, int, int] = ("", 0, 0)
    sent: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    seconds: float = 0.0
    seconds_of_slots: tuple[float, ...] = ()


@dataclass
class Driver:
    machine: StateMachine
    now: float = 0.0
    input_seconds: float = 1.0  # how far each input moves the clock
    wire: torch.dtype = torch.float32  # of deliveries
    incarnations: dict[str, int] = field(default_factory=dict)
    places: dict[SlotKey, Place] = field(default_factory=dict)
    departed: dict[tuple[str, int], dict[SlotKey, Place]] = field(default_factory=dict)  # processes that may come back
    granted: list[Granted] = field(default_factory=list)
    applied: list[Applied] = field(default_factory=list)
    gradients: dict[TicketKey, Gradient] = field(default_factory=dict)  # that redeemed a ticket

    def join(self, worker: str, slots: int = 1, incarnation: int = 1) -> Member:
        effects = self.machine.step(Join(self._tick(), worker, incarnation, slots))
        if self.incarnations.get(worker) != incarnation:
            self.forget(worker)
            self.incarnations[worker] = incarnation
            fresh = {(worker, slot): Place() for slot in range(slots)}
            before = self.departed.pop((worker, incarnation), fresh)
            self.places |= before if before.keys() == fresh.keys() else fresh
        self.collect(effects)
        assert effects.member is not None
        return effects.member

    def leave(self, worker: str) -> None:
        assert self.take(Leave(self._tick(), worker, self.incarnations[worker])).changed
        mine = {key: replace(place, granted=None) for key, place in self.places.items() if key[0] == worker}
        self.departed[worker, self.incarnations[worker]] = mine
        self.forget(worker)

    def forget(self, worker: str) -> None:
        self.incarnations.pop(worker, None)
        self.places = {key: place for key, place in self.places.items() if key[0] != worker}

    def request(self, worker: str, slot: int = 0, number: int | None = None) -> Granted | None:
        """Ask for a ticket, with a new request number unless one is given; None if it has to be waited for."""
        place = self.places[worker, slot]
        requester = self.requester(worker, slot, number)
        effects = self.machine.step(Request(self._tick(), *requester))
        if requester.request > place.request:
            place.result = None
        place.request, place.granted, place.params = requester.request, None, None
        self.collect(effects)
        return place.granted

    def push(self, worker: str, value: float | torch.Tensor, slot: int = 0, **details: Any) -> PushResult:
        """Push for the ticket that the slot holds, with a new request number.

        `number` and `ticket` may be given instead; so may `samples`, `local_steps` (else as many as the slot's ticket
        says), and all fields of a `Gradient`.
        """
        place = self.places[worker, slot]
        requester = self.requester(worker, slot, details.pop("number", None))
        key = details.pop("ticket", None) or self.ticket(worker, slot)
        size = self.machine.bucket_size
        values = value if isinstance(value, torch.Tensor) else torch.full_like(self.machine.state.params, value)
        usual = place.granted.ticket.local_steps if place.granted else self.machine.run.local_steps
        counts = details.pop("samples", 0), details.pop("local_steps", usual)
        gradient = Gradient(values, **details)
        effects = self.machine.step(Push(self._tick(), *requester, key[1], key[0], *counts), gradient)
        result = effects.result
        assert result is not None
        if not result.repeated:
            self.gradients[key] = gradient
            self._record((worker, slot), values, result, size)
            place.request, place.granted, place.result = requester.request, None, result
        self.collect(effects)
        return result

    def exchange(self, worker: str, value: float | torch.Tensor, slot: int = 0) -> PushResult:
        """Push and ask for the next ticket under one request number, as `PushPull` does."""
        result = self.push(worker, value, slot)
        self.request(worker, slot, number=result.request)
        return result

    def hand_back(self, worker: str, slot: int = 0) -> bool:
        """Return the slot's ticket unused."""
        returned = self.give_back(worker, self.ticket(worker, slot))
        self.places[worker, slot].granted = None
        return returned

    def give_back(self, worker: str, ticket: TicketKey) -> bool:
        """Return a ticket without the slot's knowing of it, as a time limit does."""
        return self.take(Return(self._tick(), worker, self.incarnations[worker], ticket[1], ticket[0])).changed

    def withdraw(self, worker: str, slot: int = 0) -> None:
        self.take(Withdraw(worker, slot))

    def set_learning_rate(self, peak: float) -> None:
        self.take(SetLearningRate(self._tick(), peak))

    def take(self, given: Input, gradient: Gradient | None = None) -> Effects:
        """An input as it is, of which no place knows."""
        effects = self.machine.step(given, gradient)
        self.collect(effects)
        return effects

    def requester(self, worker: str, slot: int = 0, number: int | None = None) -> Requester:
        request = self.places[worker, slot].request + 1 if number is None else number
        return Requester(worker, self.incarnations[worker], slot, request)

    def ticket(self, worker: str, slot: int = 0) -> TicketKey:
        granted = self.places[worker, slot].granted
        assert granted is not None, f"slot {slot} of {worker} has no ticket that it knows of"
        return granted.ticket.key

    def collect(self, effects: Effects) -> None:
        """Take in what an input brought to others."""
        for released in effects.released:
            self.places.get(released.slot, Place()).released = released.error
        for granted in effects.granted:
            place = self.places.get(granted.slot, Place())
            place.granted, place.params = granted, torch.empty_like(self.machine.state.params, dtype=self.wire)
            place.bucket_size = self.machine.bucket_size
            self.machine.write_delivery(granted, place.params)
            self.granted.append(granted)

    def _record(self, key: SlotKey, values: torch.Tensor, result: PushResult, bucket_size: int) -> None:
        place = self.places[key]
        assert place.granted is not None
        assert place.params is not None
        ticket = place.granted.ticket
        place.seconds = self.now - ticket.handed_out_seconds
        if result.discarded:
            return
        everyones = (each.seconds for each in self.places.values())
        self.applied.append(
            Applied(
                values.double(),
                result.step_size,
                ticket.bucket,
                ticket.iteration,
                result.delay,
                bucket_size,
                place.bucket_size,
                holder=(key[0], self.incarnations[key[0]], key[1]),
                sent=place.params.double(),
                seconds=place.seconds,
                seconds_of_slots=tuple(seconds for seconds in everyones if seconds is not None),
            )
        )

    def _tick(self) -> float:
        self.now += self.input_seconds
        return self.now


def run_of(rule: str = "ormo", scheduler: str = "asynchronous", **choices: Any) -> Run:
    """A run with learning rate 1 and momentum 1/2, so that small whole numbers stay exact in float32."""
    names = ("scale", "delay_threshold", "discard_delay", "discard_buckets", "staleness_bound", "bucket")
    of_the_method = {name: choices.pop(name) for name in names if name in choices}
    settings = {"learning_rate": LearningRate(1.0), "momentum": 0.5} | choices
    return Run(method=Method(rule=rule, scheduler=scheduler, **of_the_method), **settings)


def driver_of(run: Run, *workers: str, size: int = 1, slots: int = 1) -> Driver:
    """A driver of a fresh run that starts at 0, with these workers joined."""
    driver = Driver(StateMachine.fresh(run, torch.zeros(size)))
    for worker in workers:
        driver.join(worker, slots)
    return driver


def told_by(machine: StateMachine) -> list[Recorded]:
    """The inputs that take effect from now on, with what became of pushes."""
    told: list[Recorded] = []
    step = machine.step

    def note(given: Input, gradient: Gradient | None = None) -> Effects:
        effects = step(given, gradient)
        if effects.changed:
            told.append(Recorded(given, effects.redeemed))
        return effects

    machine.step = note  # type: ignore[method-assign]
    return told


def replay(machine: StateMachine, told: list[Recorded], gradients: dict[TicketKey, Gradient]) -> None:
    """Give a machine what another one took, and write the deliveries that follow."""
    for given, redeemed in told:
        effects = machine.step(given, gradients[given.ticket_key] if isinstance(given, Push) else None)
        assert (effects.changed, effects.redeemed) == (True, redeemed)
        for granted in effects.granted:
            machine.write_delivery(granted, torch.empty_like(machine.state.params))


def fingerprint(machine: StateMachine) -> tuple[str, dict[str, list[float]], list[SlotKey]]:
    """All of the state, comparable with ==: a refusal must leave it as it was."""
    snapshot = take(machine)
    tensors = {name: tensor.tolist() for name, tensor in snapshot.tensors.items()}
    return json.dumps(snapshot.fields), tensors, list(machine.state.waiting)


def rows(table: str) -> Iterator[dict[str, float]]:
    """The rows of a table whose first line names the columns."""
    head, *body = (line.split() for line in table.strip().splitlines())
    for cells in body:
        yield dict(zip(head, map(float, cells), strict=True))
