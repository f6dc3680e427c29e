"""A state machine whose workers compute with one workload, in whatever order a driver lets them."""

import math
import time
from dataclasses import dataclass, field

import torch

from ormo_server.core.blocks import SquaredNorm
from ormo_server.core.errors import NormTooLarge
from ormo_server.core.events import Granted
from ormo_server.core.inputs import Gradient, Requester
from ormo_server.core.keys import SlotKey
from ormo_server.core.method import Run
from ormo_server.core.state import Ticket
from ormo_server.core.state_machine import StateMachine
from ormo_server.sim.record import Record
from ormo_server.sim.workload import Computed, Model, SimulatedWorker, Workload
from ormo_server.store import buffers_of


@dataclass(slots=True)
class Place:
    """What a simulated worker knows of one of its slots.

    Attributes:
        key: of the slot.
        params: as delivered with the ticket, shape (d,), float32.
        request: the highest request number that was used.
        ticket: that it holds; None while it waits.
        buffers_kept: the server kept some of its buffers at the last push.
        wants_buffers: so that its next request asks for them, as a real worker's does: when it hears of it, the one
            that goes with the push has left.
    """

    key: SlotKey
    params: torch.Tensor
    request: int = 0
    ticket: Ticket | None = None
    buffers_kept: bool = False
    wants_buffers: bool = False


@dataclass(slots=True)
class Process:
    """A simulated worker process.

    Attributes:
        name: the worker's id.
        incarnation: which process of that id.
        worker: computes its gradients.
        places: one for each slot.
    """

    name: str
    incarnation: int
    worker: SimulatedWorker
    places: list[Place] = field(default_factory=list)


class Training:
    """One run in virtual time. Needs a copy of the parameters for each ticket in flight, and one gradient.

    Args:
        run: what decides how the state moves.
        workload: what the workers compute.
        record: what is written down.
        evaluate_every: gradients between evaluations.
        epoch: of the server.
    """

    def __init__(self, run: Run, workload: Workload, record: Record, *, evaluate_every: int, epoch: int = 0) -> None:
        start = workload.initial(run.seed)
        vectors = start.params, start.float_buffers, start.int_buffers
        buffers = None if start.manifest is None else buffers_of(start.manifest)
        self.machine = StateMachine.fresh(run, *vectors, epoch=epoch, buffers=buffers)
        self.processes: dict[str, Process] = {}
        self._workload = workload
        self._record = record
        self._evaluate_every = evaluate_every
        self._gradient = torch.empty_like(start.params)
        self._refused_in_a_row = 0

    @property
    def over(self) -> bool:
        """Whether the run has come to its end, or nothing good can come of it any more."""
        return self.machine.state.finished or self._record.diverged

    def join(self, now: float, name: str, incarnation: int, slots: int) -> Process:
        """A worker joins; it asks for no ticket yet."""
        member = self.machine.join(now, name, incarnation, slots)
        worker = self._workload.start_worker(member.data_seed, self._model())
        params = self.machine.state.params
        places = [Place((name, number), torch.empty_like(params)) for number in range(slots)]
        self.processes[name] = Process(name, incarnation, worker, places)
        return self.processes[name]

    def leave(self, now: float, process: Process) -> None:
        """A worker leaves, or is taken for dead."""
        self.machine.leave(now, process.name, process.incarnation)
        if self.processes.get(process.name) is process:
            del self.processes[process.name]

    def request(self, now: float, process: Process, place: Place) -> None:
        """A slot asks for a ticket, with the request number that it has."""
        self.machine.request_ticket(now, _requester(process, place))

    def granted(self) -> list[Place]:
        """The places that have got a ticket, and its parameters, since the last call."""
        places = []
        for event in self.machine.take_events():
            if not isinstance(event, Granted):
                continue
            name, number = event.slot
            place = self.processes[name].places[number]
            self.machine.write_delivery(event, place.params)
            place.ticket = event.ticket
            if place.wants_buffers:
                self.processes[name].worker.mend(self._model())
            place.buffers_kept, place.wants_buffers = False, place.buffers_kept and not place.wants_buffers
            places.append(place)
        return places

    def push(self, now: float, process: Process, place: Place, samples: int | None = None) -> None:
        """Compute the gradient for the ticket that the place holds, and push it.

        Args:
            now: when it arrives.
            process, place: whose it is.
            samples: that it counts for; None for those of the mini-batch.
        """
        assert place.ticket is not None
        started = time.perf_counter()
        computed = process.worker.gradient(place.ticket.number, place.params, self._gradient)
        self._record.computed(time.perf_counter() - started)
        square = SquaredNorm(self._gradient).total()
        if square is None:
            self._refuse(now, place)
            return
        count = computed.samples if samples is None else samples
        buffers = _buffers_sent(computed)
        gradient = Gradient(place.ticket.key, self._gradient, count, *buffers, norm=math.sqrt(square))
        try:
            result = self.machine.push(now, _requester(process, place), gradient)
        except NormTooLarge:
            self._refuse(now, place)
            return
        self._refused_in_a_row = 0
        place.ticket, place.buffers_kept = None, result.buffers_kept
        self._record.pushed(result, computed.loss)
        if not result.discarded and (result.iteration % self._evaluate_every == 0 or self.machine.state.finished):
            self.evaluate(now)

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

    def _model(self) -> Model:
        state = self.machine.state
        return Model(state.params, state.float_buffers, state.int_buffers)


def _requester(process: Process, place: Place) -> Requester:
    return Requester(process.name, process.incarnation, place.key[1], place.request)


def _buffers_sent(computed: Computed) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    floats, ints = computed.float_buffers, computed.int_buffers
    return floats if floats.numel() else None, ints if ints.numel() else None
