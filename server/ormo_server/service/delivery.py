"""Parameters on their way to a worker, and the wait for them.

A delivery is exactly the parameters at its ticket's iteration. For a large model the copy of these into its payload
goes on after the lock is free, while the first of them are sent already: only the next gradient has to wait for its
end.

Who wakes whom: a `Waiter` is resolved by the thread whose input made its ticket possible, under the machine's lock, and
waited for by the thread of its own stream, without it. A `Copy` is filled by the one thread of `Copies`, and waited for
by streams that send it and by the next gradient.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch

from ormo_protos.tensors import Chunk, Payload, frozen_chunks
from ormo_runtime.process import StartedPool
from ormo_server.core.effects import Effects, Granted, superseded
from ormo_server.core.errors import OrmoError
from ormo_server.core.ids import SlotKey
from ormo_server.core.machine import StateMachine
from ormo_server.core.state import Ticket
from ormo_server.core.vectors import blocks
from ormo_server.journal import Journal
from ormo_server.metrics.noted import Distribution

# Handing a copy to another thread costs as much as copying some 2 MiB: only what is longer by far is worth it.
_COPIED_UNDER_LOCK = 4 << 20


class Copy:
    """One payload being filled."""

    def __init__(self) -> None:
        self._there = threading.Condition()
        self._bytes = 0
        self._error: Exception | None = None
        self._over = False

    def wait_for(self, size: int) -> None:
        """Block until the payload's first so many bytes are there.

        Raises:
            Exception: what the copy failed with.
        """
        with self._there:
            self._there.wait_for(lambda: self._over or self._bytes >= size)
            if self._error is not None:
                raise self._error

    def wait(self) -> None:
        """Block until nothing more is written."""
        with self._there:
            self._there.wait_for(lambda: self._over)

    def advance(self, size: int) -> None:
        """So many bytes are there."""
        with self._there:
            self._bytes = size
            self._there.notify_all()

    def end(self, error: Exception | None = None) -> None:
        """Nothing more will be written."""
        with self._there:
            self._over, self._error = True, error
            self._there.notify_all()


class Copies:
    """Fills payloads one after the other, in a thread of its own.

    Args:
        seconds: where the time of each copy is counted.

    Raises:
        RuntimeError: the system has no thread for it.
    """

    def __init__(self, seconds: Distribution) -> None:
        self._seconds = seconds
        self._thread = StartedPool(1, "copies")
        self._last: Copy | None = None

    def begin(self, payload: Payload, write: Callable[[torch.Tensor, slice], object]) -> Copy:
        """Start to fill the parameters of a payload, whose other sections are there already.

        Args:
            payload: to be filled.
            write: writes a part of the parameters into a tensor of the same shape.
        """
        self._last = copy = Copy()
        self._thread.submit(self._fill, payload, write, copy)
        return copy

    def finish(self) -> float:
        """Block until all that were begun have ended: from now on the parameters may change.

        Returns:
            The seconds that this took.
        """
        if self._last is None:
            return 0.0
        started = time.perf_counter()
        self._last.wait()
        self._last = None
        return time.perf_counter() - started

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _fill(self, payload: Payload, write: Callable[[torch.Tensor, slice], object], copy: Copy) -> None:
        started, parameters = time.perf_counter(), payload.parameters
        try:
            for part in blocks(parameters.numel()):
                write(parameters, part)
                copy.advance(part.stop * parameters.element_size())
            self._seconds.note(time.perf_counter() - started)
            copy.advance(payload.layout.total_bytes)
        except Exception as error:  # noqa: BLE001 - whoever sends the payload raises it
            copy.end(error)
        else:
            copy.end()


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a request for parameters is answered with.

    Attributes:
        epoch, iteration: of the parameters.
        samples: counted so far in the run.
        learning_rate: η in force.
        ticket: None for readers.
        payload: None if nothing is newer than what the reader has.
        copy: that fills the payload; None if it is full.
        position: in the journal, of what it follows from.
        frozen: the model's frozen tensors, which go after the payload as they are, without a copy; None if they were
            not asked for.
    """

    epoch: int
    iteration: int
    samples: int
    learning_rate: float
    ticket: Ticket | None
    payload: Payload | None
    copy: Copy | None = None
    position: int = 0
    frozen: torch.Tensor | None = None

    def chunks(self) -> Iterator[Chunk]:
        """The payload in pieces, each as soon as it is there."""
        if self.payload is None:
            return iter(())
        chunks = self.payload.chunks()
        if self.copy is not None:
            chunks = map(partial(_wait_for, self.copy), chunks)
        if self.frozen is not None:
            chunks = chain(chunks, frozen_chunks(self.frozen, self.payload.layout.frozen_offset))
        return chunks


def _wait_for(copy: Copy, chunk: Chunk) -> Chunk:
    copy.wait_for(chunk.offset + len(chunk.data))
    return chunk


class PeerGone(Exception):
    """The peer of a call has gone away: there is nobody to answer."""


class Waiter:
    """A slot's wait for its ticket: resolved once, from whichever thread makes the ticket possible.

    Attributes:
        slot: who waits.
        payload: where the parameters will be written.
        delivery: that has come; None before.
    """

    def __init__(self, slot: SlotKey, payload: Payload) -> None:
        self.slot = slot
        self.payload = payload
        self.delivery: Delivery | None = None
        self._outcomes: queue.SimpleQueue[Delivery | Exception] = queue.SimpleQueue()  # the first one counts

    def resolve(self, delivery: Delivery) -> None:
        """The ticket is here and `payload` is filled, or being filled."""
        self.delivery = delivery
        self._outcomes.put(delivery)

    def fail(self, error: OrmoError | PeerGone) -> None:
        """The ticket will not come."""
        self._outcomes.put(error)

    def wait(self) -> Delivery:
        """Block until the ticket is here; to be called once.

        Raises:
            OrmoError: why it will not come.
            PeerGone: nobody waits for it any more.
        """
        outcome = self._outcomes.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class Waiting:
    """The slots that wait for a ticket, and what ends their waits. Only who holds the machine's lock may call it.

    Args:
        machine: whose tickets they wait for.
        copies: fills the payloads of large models.
        copy_seconds: where the time of small ones is counted.
        journal: what deliveries are recorded in that the update rule keeps.
    """

    def __init__(
        self, machine: StateMachine, copies: Copies, copy_seconds: Distribution, journal: Journal | None
    ) -> None:
        self._machine = machine
        self._copies = copies
        self._copy_seconds = copy_seconds
        self._journal = journal
        self._waiters: dict[SlotKey, Waiter] = {}

    def enter(self, waiter: Waiter) -> Waiter | None:
        """The slot waits from now on: to be called before its request, which may grant the ticket at once.

        Returns:
            Who waited in its place, for `supersede` or `put_back`.
        """
        older = self._waiters.get(waiter.slot)
        self._waiters[waiter.slot] = waiter
        return older

    def supersede(self, older: Waiter | None) -> None:
        """The request was taken: whoever waited before waits in vain."""
        if older is not None:
            older.fail(superseded(older.slot))

    def put_back(self, waiter: Waiter, older: Waiter | None) -> None:
        """The request was refused: all is as it was."""
        del self._waiters[waiter.slot]
        if older is not None:
            self._waiters[older.slot] = older

    def leave(self, waiter: Waiter) -> bool:
        """Nobody listens any more; says whether it still waited."""
        if self._waiters.get(waiter.slot) is not waiter:
            return False
        del self._waiters[waiter.slot]
        return True

    def answer(self, effects: Effects, position: int) -> None:
        """End the waits that an input ended, before the next input changes the parameters.

        Args:
            effects: of the input.
            position: of the journal, after it.
        """
        for released in effects.released:
            self._waiters.pop(released.slot).fail(released.error)
        for granted in effects.granted:
            self._deliver(granted, position)

    def _deliver(self, granted: Granted, position: int) -> None:
        waiter = self._waiters.pop(granted.slot)
        state, ticket, payload, copy = self._machine.state, granted.ticket, waiter.payload, None
        if payload.layout.with_buffers:
            copy_buffers(self._machine, payload)
        if payload.layout.total_bytes > _COPIED_UNDER_LOCK and not state.rule.keeps_deliveries:
            copy = self._copies.begin(payload, self._machine.delivery(granted))
        else:
            started = time.perf_counter()
            self._machine.write_delivery(granted, payload.parameters)
            self._copy_seconds.note(time.perf_counter() - started)
            if state.rule.keeps_deliveries and self._journal is not None:
                position = self._journal.append_delivery(granted.slot, payload.layout.dtype)
        counted, rate = state.samples, state.learning_rate
        waiter.resolve(Delivery(ticket.epoch, ticket.iteration, counted, rate, ticket, payload, copy, position))


def copy_buffers(machine: StateMachine, payload: Payload) -> None:
    """Copy the model's buffers of this moment into a payload that has room for them."""
    payload.float_buffers.copy_(machine.state.float_buffers)
    payload.int_buffers.copy_(machine.state.int_buffers)
