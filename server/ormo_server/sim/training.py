"""A state machine whose workers compute with one workload, in whatever order a driver lets them."""

import math
import time
from dataclasses import dataclass, field

import torch

from ormo_runtime.workload import Computed, Model, SimulatedWorker, Workload, share_of_run
from ormo_server.core.effects import Effects, Granted
from ormo_server.core.errors import NormTooLarge
from ormo_server.core.ids import SlotKey
from ormo_server.core.inputs import Gradient, Input, Join, Leave, Push, Request
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import Run
from ormo_server.core.state import Ticket
from ormo_server.core.vectors import SquaredNorm
from ormo_server.sim.record import Message, Record
from ormo_server.store import buffers_of


@dataclass(slots=True)
class Place:
    """What a simulated worker knows of one of its slots.

    Attributes:
        key: the slot's key.
        params: as delivered with the ticket, shape (d,), float32.
        request: the highest request number that was used.
        ticket: that came last and whose gradient was not pushed yet; None while it waits.
        progress: of the run when it came, 0 to 1.
        refused: request number of the last gradient that was refused in the run that is followed.
        wants_buffers: the model's come with the next delivery: until a gradient was computed with them.
        buffers: that came with the last delivery, if any did.
        joins: how often the worker had joined when they came.
        buffers_kept: the server kept some of its own at the last push.
        wants_mended: so that its next request asks for them, as a real worker's does: when it hears of it, the one
            that goes with the push has left.
    """

    key: SlotKey
    params: torch.Tensor
    request: int = 0
    ticket: Ticket | None = None
    progress: float = 0.0
    refused: int = 0
    wants_buffers: bool = True
    buffers: Model | None = None
    joins: int = 0
    buffers_kept: bool = False
    wants_mended: bool = False


@dataclass(slots=True)
class Process:
    """A simulated worker process.

    Attributes:
        name: the worker's id.
        incarnation: which process of that id.
        worker: computes its gradients.
        first_ticket: no ticket with a lower number was handed out since it joined.
        joins: how often it has joined.
        loaded_joins: when it last took all of the model's buffers.
        places: one for each slot.
    """

    name: str
    incarnation: int
    worker: SimulatedWorker
    first_ticket: int
    joins: int = 1
    loaded_joins: int = 0
    places: list[Place] = field(default_factory=list)


class Training:
    """One run in virtual time. Needs a copy of the parameters for each ticket in flight, and one gradient.

    Args:
        run: what decides how the state moves.
        workload: what the workers compute.
        record: what is written down.
        evaluate_every: gradients between evaluations.
        epoch: the server's epoch.
        clipped_at: the norm that longer gradients are scaled down to; None for none.
    """

    def __init__(
        self,
        run: Run,
        workload: Workload,
        record: Record,
        *,
        evaluate_every: int,
        epoch: int = 0,
        clipped_at: float | None = None,
    ) -> None:
        start = workload.initial(run.seed)
        vectors = start.params, start.float_buffers, start.int_buffers
        buffers = None if start.manifest is None else buffers_of(start.manifest)
        self.machine = StateMachine.fresh(run, *vectors, epoch=epoch, buffers=buffers)
        self.processes: dict[str, Process] = {}
        self._workload = workload
        self._record = record
        self._evaluate_every = evaluate_every
        self._clipped_at = clipped_at
        self._gradient = torch.empty_like(start.params)
        self._granted: list[Granted] = []
        record.message = Message.of(start)
        self._refused_in_a_row = 0

    @property
    def over(self) -> bool:
        """Whether the run has come to its end, or nothing good can come of it any more."""
        return self.machine.state.finished or self._record.diverged

    def join(self, now: float, name: str, incarnation: int, slots: int) -> Process:
        """Let a worker join; it asks for no ticket yet."""
        first_ticket = self.machine.state.next_ticket
        member = self.take(Join(now, name, incarnation, slots)).member
        assert member is not None
        worker = self._workload.start_worker(member.data_seed, self._model())
        params = self.machine.state.params
        places = [Place((name, number), torch.empty_like(params)) for number in range(slots)]
        self.processes[name] = Process(name, incarnation, worker, first_ticket, places=places)
        return self.processes[name]

    def join_again(self, now: float, process: Process) -> None:
        """Let a process that was considered gone join anew: it goes on with its data, and gets the model's buffers."""
        process.first_ticket = self.machine.state.next_ticket
        process.joins += 1
        self.take(Join(now, process.name, process.incarnation, len(process.places)))
        for place in process.places:
            place.wants_buffers = True
        self.processes[process.name] = process

    def leave(self, now: float, process: Process) -> None:
        """Let a worker leave, or be considered gone."""
        self.take(Leave(now, process.name, process.incarnation))
        if self.processes.get(process.name) is process:
            del self.processes[process.name]

    def request(self, now: float, process: Process, place: Place) -> None:
        """A slot asks for a ticket, with the request number that it has."""
        self.take(Request(now, process.name, process.incarnation, place.key[1], place.request))

    def take(self, given: Input, gradient: Gradient | None = None) -> Effects:
        """Give the machine an input; what it grants is handed on by `granted`."""
        effects = self.machine.step(given, gradient)
        self._granted += effects.granted
        return effects

    def granted(self) -> list[Place]:
        """The places that have got a ticket, and its parameters, since the last call."""
        granted, self._granted, places = self._granted, [], []
        for each in granted:
            name, number = each.slot
            place = self.processes[name].places[number]
            self.machine.write_delivery(each, place.params)
            state = self.machine.state
            place.ticket = each.ticket
            place.progress = share_of_run(self.machine.run, state.iteration, state.samples)
            self._record.delivered()
            asked = place.wants_buffers or place.wants_mended
            if asked:
                place.buffers, place.joins = self._buffers_sent(place), self.processes[name].joins
            place.buffers_kept, place.wants_mended = False, place.buffers_kept and not asked
            places.append(place)
        return places

    def push(
        self, now: float, process: Process, place: Place, samples: int | None = None, local_steps: int | None = None
    ) -> None:
        """Compute the gradient for the ticket that the place holds, or make its local steps, and push what comes of it.

        Args:
            now: when it arrives.
            process, place: whose it is.
            samples: that it counts for; None for those of the mini-batches.
            local_steps: how many; None for as many as the ticket says.
        """
        assert place.ticket is not None
        steps = place.ticket.local_steps if local_steps is None else local_steps
        computed = self._compute(process, place, steps)
        square = SquaredNorm(self._gradient).total()
        if square is None:
            self._refuse(now, place)
            return
        count, ticket = computed.samples if samples is None else samples, place.ticket
        gradient = Gradient(self._gradient, *_buffers_pushed(computed), norm=self._clipped(math.sqrt(square)))
        who = process.name, process.incarnation, place.key[1], place.request
        try:
            result = self.take(Push(now, *who, ticket.number, ticket.epoch, count, steps), gradient).result
        except NormTooLarge:
            self._refuse(now, place)
            return
        assert result is not None
        self._refused_in_a_row = 0
        place.ticket, place.buffers_kept = None, result.buffers_kept
        self._record.pushed(result, computed.loss)
        if not result.discarded and (result.iteration % self._evaluate_every == 0 or self.machine.state.finished):
            self.evaluate(now)

    def lose(self, process: Process, place: Place) -> None:
        """Compute the gradient for the ticket that came last, of which nothing became in the run that is followed."""
        assert place.ticket is not None
        self._compute(process, place, place.ticket.local_steps)
        self._record.refused(diverged=False)

    def _compute(self, process: Process, place: Place, steps: int) -> Computed:
        assert place.ticket is not None
        if place.buffers is not None:
            # Not as they come: with several slots, a gradient of another one may be computed before.
            if place.joins <= process.loaded_joins:  # it has gone on with its own
                process.worker.mend(place.buffers)
            else:
                process.worker.take_buffers(place.buffers)
            process.loaded_joins, place.buffers = place.joins, None
        if place.ticket.number >= process.first_ticket:
            place.wants_buffers = False
        started = time.perf_counter()
        number, worker = place.ticket.number, process.worker
        if steps:
            computed = worker.local_steps(number, place.params, self._gradient, steps=steps, progress=place.progress)
        else:
            computed = worker.gradient(number, place.params, self._gradient)
        self._record.computed(time.perf_counter() - started)
        return computed

    def _clipped(self, norm: float) -> float:
        """The gradient's norm, after it was scaled down if it was above the bound."""
        if self._clipped_at is None or norm <= self._clipped_at:
            return norm
        self._gradient.mul_(self._clipped_at / norm)
        return self._clipped_at

    def _refuse(self, now: float, place: Place) -> None:
        # As a server does. Once every slot has been refused in a row, newer parameters do not help either.
        place.ticket = None
        self._refused_in_a_row += 1
        diverged = self._refused_in_a_row > self.machine.state.live_slots
        self._record.refused(diverged=diverged)
        if diverged:
            self.evaluate(now)

    def evaluate(self, now: float) -> None:
        """Score the parameters and write a row, unless the last row is of this iteration already."""
        if self._record.is_scored(self.machine.state.iteration):
            return
        started = time.perf_counter()
        scores = self._workload.evaluate(self._model())
        self._record.evaluated(now, self.machine, scores, time.perf_counter() - started)

    def _buffers_sent(self, place: Place) -> Model | None:
        state = self.machine.state
        if not (state.float_buffers.numel() or state.int_buffers.numel()):
            return None
        return Model(place.params, state.float_buffers.clone(), state.int_buffers.clone())

    def _model(self) -> Model:
        state = self.machine.state
        return Model(state.params, state.float_buffers, state.int_buffers)


def _buffers_pushed(computed: Computed) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    floats, ints = computed.float_buffers, computed.int_buffers
    return floats if floats.numel() else None, ints if ints.numel() else None
