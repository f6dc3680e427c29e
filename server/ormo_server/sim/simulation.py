"""Discrete events in virtual time: when gradients arrive, and who joins, leaves and crashes when."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from ormo_runtime.settings import UsageError
from ormo_server.sim.machines import Change, Machine, MachinePark
from ormo_server.sim.training import Place, Process, Training

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
            host.free_at = max(self.now + host.travel_seconds, host.free_at) + host.machine.next_compute_seconds()
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
                f"{change.kind} at {change.seconds:g} s: there is no worker {change.number} then; "
                f"{sum(h.alive for h in self._hosts.values())} are there, counted from 0 in the order of joining"
            )
        host.alive = False
        seconds = self._failure_seconds if change.kind == "crash" else 0.0
        self._at(self.now + seconds, self._gone, host)

    def _gone(self, host: Host) -> None:
        self._training.leave(self.now, host.process)
        self._start_granted()
