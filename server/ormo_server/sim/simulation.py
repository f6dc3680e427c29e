"""The two drivers of a simulated run: discrete events in virtual time, and a recorded run, input by input."""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from ormo_runtime.settings import UsageError
from ormo_server.core.errors import OrmoError
from ormo_server.core.inputs import Input, Join, Leave, Push, Request
from ormo_server.sim.machines import Change, Machine, MachinePark
from ormo_server.sim.training import Place, Process, Training
from ormo_server.trace import Recorded, Refused, Segment
from ormo_server.trace.rows import Entry

BYTES_PER_NUMBER = 4


@dataclass(slots=True)
class Host:
    """A machine with the worker process on it.

    Attributes:
        machine: how fast it is.
        process: on it.
        travel_seconds: how long a gradient or parameters travel, one way.
        alive: False once it has left or crashed.
        free_at: when its processor is done with what it has to do.
    """

    machine: Machine
    process: Process
    travel_seconds: float
    alive: bool = True
    free_at: float = 0.0


class Simulation:
    """Workers on unequal machines, training at the same time.

    A cycle is: parameters travel to the worker, it computes, the gradient travels back, is applied, and the next ticket
    is asked for at the same moment, as in one `PushPull` exchange. The server takes no time. A worker with several
    slots computes for one at a time.

    Args:
        training: the run; nobody has joined yet.
        park: where machines come from.
        workers: how many there are at the start.
        slots: in-flight places of each worker.
        changes: what happens later.
        failure_seconds: virtual seconds from a worker's crash until the server considers it gone.
    """

    def __init__(
        self,
        training: Training,
        park: MachinePark,
        *,
        workers: int,
        slots: int,
        changes: Sequence[Change] = (),
        failure_seconds: float = 30.0,
    ) -> None:
        self.now = 0.0
        self._training = training
        self._park = park
        self._slots = slots
        self._failure_seconds = failure_seconds
        self._message_bytes = BYTES_PER_NUMBER * training.machine.state.params.numel()
        self._hosts: dict[str, Host] = {}
        self._order = count()
        # (when, which of those at the same time, what, with what)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._at(0.0, self._join, workers)
        for change in changes:
            self._at(change.seconds, self._change, change)

    def run(self) -> None:
        """Let it happen, until the run is over or nothing more can happen."""
        training = self._training
        while self._events and not training.over:
            self.now, _, happen, details = heapq.heappop(self._events)
            happen(*details)
        training.evaluate(self.now)

    def _at(self, seconds: float, happen: Callable[..., None], *details: Any) -> None:
        heapq.heappush(self._events, (seconds, next(self._order), happen, details))

    def _join(self, number: int) -> None:
        # All are members before the first asks, so that K is right from the first ticket on.
        newcomers = [self._new_host() for _ in range(number)]
        for host in newcomers:
            for place in host.process.places:
                self._ask(host, place)
        self._start_granted()

    def _new_host(self) -> Host:
        machine = self._park.next_machine()
        process = self._training.join(self.now, machine.name, 1, self._slots)
        host = Host(machine, process, machine.travel_seconds(self._message_bytes))
        self._hosts[machine.name] = host
        return host

    def _ask(self, host: Host, place: Place) -> None:
        place.request += 1
        self._training.request(self.now, host.process, place)

    def _start_granted(self) -> None:
        for place in self._training.granted():
            host = self._hosts[place.key[0]]
            assert place.ticket is not None
            steps = max(1, place.ticket.local_steps)
            seconds = sum(host.machine.next_compute_seconds() for _ in range(steps))
            host.free_at = max(self.now + host.travel_seconds, host.free_at) + seconds
            self._at(host.free_at + host.travel_seconds, self._gradient_arrives, host, place, place.ticket.key)

    def _gradient_arrives(self, host: Host, place: Place, ticket: tuple[int, int]) -> None:
        if not host.alive or place.ticket is None or place.ticket.key != ticket:
            return
        place.request += 1
        self._training.push(self.now, host.process, place)
        if not self._training.over:
            self._training.request(self.now, host.process, place)
            self._start_granted()

    # Comings and goings

    def _change(self, change: Change) -> None:
        if change.kind == "join":
            self._join(change.number)
            return
        host = self._hosts.get(f"worker-{change.number}")
        if host is None or not host.alive:
            raise UsageError(
                f"{change.kind} at {change.seconds:g} s: no worker {change.number} exists at that time; there are "
                f"{sum(h.alive for h in self._hosts.values())}, numbered from 0 in joining order"
            )
        host.alive = False
        seconds = self._failure_seconds if change.kind == "crash" else 0.0
        self._at(self.now + seconds, self._gone, host)

    def _gone(self, host: Host) -> None:
        self._training.leave(self.now, host.process)
        self._start_granted()


class Replay:
    """Drives a run by a trace. With the settings and the workload of the recorded run it ends in the same bits.

    Another update rule or step scale may be tried on the same order, under the same scheduler. For another scheduler,
    replay the compute times alone.

    Args:
        training: a run that is as the recorded one was at its start, with its epoch.
        segment: the record, from a fresh start.
    """

    def __init__(self, training: Training, segment: Segment) -> None:
        self.now = 0.0
        self._training = training
        self._inputs = segment.inputs
        self._knows_refusals = segment.start.refusals
        self._joins_to_come = Counter(
            _process_of(entry.input)
            for entry in segment.inputs
            if isinstance(entry, Recorded) and isinstance(entry.input, Join)
        )
        self._away: dict[tuple[str, int], Process] = {}
        # What worker processes have a part in; the others are the machine's alone.
        self._acts: dict[type[Input], Callable[[Any], object]] = {
            Join: self._join,
            Leave: self._leave,
            Request: self._request,
            Push: self._push,
        }

    def run(self) -> None:
        """Feed all inputs, as long as the run is not over.

        Raises:
            UsageError: an input does not fit what came before it: the settings or the scheduler are others; or it
                can't be known which gradients were computed.
        """
        for number, taken in enumerate(self._inputs, start=1):
            if self._training.over:
                break
            try:
                self._feed(taken)
            except (OrmoError, _Stray) as error:
                raise UsageError(
                    f"input {number} of the trace does not fit ({error}): follow it with the scheduler and settings it "
                    "was recorded with, or replay its compute times alone with --compute-seconds trace:FILE"
                ) from error
            except _NotTold as error:
                raise UsageError(
                    f"input {number} of the trace, in line {number + 1}, can't be followed ({error}): replay its "
                    "compute times alone with --compute-seconds trace:FILE"
                ) from error
            self._training.granted()
        self._training.evaluate(self.now)

    def _feed(self, entry: Entry) -> None:
        if isinstance(entry, Refused):
            self._lose(entry)
            self.now = entry.seconds
            return
        given = entry.input
        act = self._acts.get(type(given), self._training.take)
        act(given)
        self.now = getattr(given, "seconds", self.now)

    # Who is there

    def _join(self, given: Join) -> None:
        key = _process_of(given)
        self._joins_to_come[key] -= 1
        known = self._away.pop(key, None)
        if known is None:
            self._training.join(given.seconds, given.worker, given.incarnation, given.slots)
            return
        if not self._knows_refusals:
            raise _NotTold(
                f"worker {given.worker} rejoined, and the trace does not record whether its pending "
                "gradient was refused"
            )
        if len(known.places) != given.slots:
            raise _NotTold(f"worker {given.worker} rejoins with {given.slots} slots instead of {len(known.places)}")
        self._training.join_again(given.seconds, known)

    def _leave(self, given: Leave) -> None:
        process = self._process(given.worker, given.incarnation)
        self._training.leave(given.seconds, process)
        key = (process.name, process.incarnation)
        if self._joins_to_come[key]:  # else its parameters would be kept for nothing
            self._away[key] = process

    def _process(self, worker: str, incarnation: int) -> Process:
        process = self._training.processes.get(worker)
        if process is None or process.incarnation != incarnation:
            raise _Stray(f"worker {worker} is not a member at this point")
        return process

    def _place(self, asks: Request | Push | Refused) -> tuple[Process, Place]:
        process = self._process(asks.worker, asks.incarnation)
        place = process.places[asks.slot]
        place.request = asks.request
        return process, place

    # What they computed

    def _request(self, given: Request) -> None:
        self._training.request(given.seconds, *self._place(given))

    def _push(self, given: Push) -> None:
        process, place = self._place(given)
        if place.ticket is None or place.ticket.key != given.ticket_key:
            raise _Stray(f"worker {process.name} pushed ticket {given.ticket}, which it does not hold")
        if place.request == place.refused:
            raise _NotTold(f"worker {process.name} pushed a refused gradient again, which ormo workers never do")
        self._training.push(given.seconds, process, place, given.samples, given.local_steps)

    def _lose(self, refused: Refused) -> None:
        process, place = self._place(refused)
        if refused.request <= place.refused:
            return  # it joined again between two tries
        if place.ticket is None or place.ticket.key != (refused.ticket_epoch, refused.ticket):
            raise _NotTold(
                f"worker {process.name} had a gradient refused for ticket {refused.ticket}, which is not the last "
                "ticket it received"
            )
        place.refused = refused.request
        self._training.lose(process, place)


def _process_of(join: Join) -> tuple[str, int]:
    return (join.worker, join.incarnation)


class _Stray(Exception):
    """An input about somebody or something that is not there."""


class _NotTold(Exception):
    """It can't be known which gradients a worker computed."""
