"""A worker's slots at work: in which thread each exchanges its gradient, and whose parameters come next."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ormo_protos.tensors import Payload
from ormo_runtime.logs import Fields
from ormo_worker.client import ExchangeOutcome, Gradient, Slot
from ormo_worker.client.arguments import Observer, Outcome
from ormo_worker.errors import ClientClosed
from ormo_worker.pytorch.devices import Copies

_LOG = logging.getLogger(__name__)
_JOIN_SECONDS = 5.0  # the connection is closed by then, so nothing keeps a thread


@dataclass(frozen=True, slots=True)
class Gathered:
    """A gradient that may still be on its way from the device.

    Attributes:
        payload: of it, complete once the copies are done.
        copies: to the payload.
        samples: in the mini-batch.
        loss: gives the mini-batch's mean, once the copies are done; None if not known.
        loaded_at: when the model had the parameters, by `time.monotonic`.
        before: the copies of the gradient before this one; None for the first.
    """

    payload: Payload
    copies: Copies
    samples: int
    loss: Callable[[], float] | None
    loaded_at: float
    before: Copies | None = None

    def arrived(self) -> Gradient:
        """The gradient, once it is there."""
        # A device may still be at one gradient when it gets the parameters for the next: that time counts once.
        began = self.loaded_at if self.before is None else max(self.loaded_at, self.before.wait())
        seconds = self.copies.wait() - began
        return Gradient(self.payload, self.samples, None if self.loss is None else self.loss(), seconds)


@dataclass(frozen=True, slots=True)
class Exchanged:
    """An exchange that is over.

    Attributes:
        slot: its number.
        gathered: the gradient; None if parameters alone were asked for.
        outcome: what came of it.
    """

    slot: int
    gathered: Gathered | None
    outcome: ExchangeOutcome


class Exchanges(Protocol):
    """Gradients go out, parameters come in; for one thread, but for `settle` and `stop`."""

    @property
    def current(self) -> int | None:
        """The slot whose parameters came last and whose gradient is due; None if another has to come first."""

    @property
    def under_way(self) -> int:
        """Gradients whose outcome was not taken yet."""

    def start(self) -> Exchanged:
        """Wait for one slot's parameters, and have all others ask for theirs.

        Raises:
            OrmoError: as `Slot.exchange`.
        """

    def swap(self, gathered: Gathered) -> Exchanged:
        """Give the current slot its gradient, and wait for the next parameters.

        Raises:
            OrmoError: as `Slot.exchange`, of any slot.
        """

    def next(self) -> Exchanged:
        """Wait for the next parameters, where none are current.

        Raises:
            OrmoError: as `swap`.
        """

    def settle(self, seconds: float) -> None:
        """Wait until the gradients under way are exchanged, but not for longer."""

    def collected(self) -> Iterator[Exchanged]:
        """Exchanges that are over, and that nobody waited for."""

    def stop(self) -> None:
        """End the threads; the connection is closed before."""


class OneAtATime:
    """One slot, exchanging in the caller's thread: nothing is computed while a gradient travels."""

    current = 0
    under_way = 0

    def __init__(self, slot: Slot, observer: Observer) -> None:
        self._slot = slot
        self._observer = observer

    def start(self) -> Exchanged:
        """See `Exchanges`, as for all of these."""
        return self.next()

    def swap(self, gathered: Gathered) -> Exchanged:
        """See `Exchanges`."""
        gathered.copies.wait()
        began = time.monotonic()
        exchanged = self._exchanged(gathered)
        self._observer.blocked(time.monotonic() - began)
        return exchanged

    def next(self) -> Exchanged:
        """See `Exchanges`."""
        return self._exchanged(None)

    def settle(self, seconds: float) -> None:
        """Nothing is ever under way between two calls."""

    def collected(self) -> Iterator[Exchanged]:
        """See `Exchanges`."""
        return iter(())

    def stop(self) -> None:
        """There is no thread."""

    def _exchanged(self, gathered: Gathered | None) -> Exchanged:
        exchanged = _exchange(self._slot, gathered, self._observer)
        self._slot.taken(exchanged.outcome)
        return exchanged


class InFlight:
    """Several slots, each exchanging in a thread of its own, while the caller computes.

    Parameters are taken in the order in which they arrived. Slots in fixed turns would mostly come in the same
    order, as each asks after the one before, but not always: a stream that broke is late, and a server with
    bounded staleness may hand out its next ticket only when the last is redeemed. Whoever waits for one slot
    while another holds a ticket then waits for ever. Taking the first that is there, nobody ever waits with a
    ticket in hand; and the oldest goes first, so none grows staler than it must.
    """

    def __init__(self, slots: tuple[Slot, ...], observer: Observer) -> None:
        self.current: int | None = None
        self.under_way = 0
        self._slots = slots
        self._observer = observer
        self._done: queue.SimpleQueue[Exchanged | _Failed] = queue.SimpleQueue()
        self._threads = tuple(_SlotThread(slot, observer, self._done) for slot in slots)
        self._failure: Exception | None = None

    def start(self) -> Exchanged:
        """See `Exchanges`, as for all of these."""
        for thread in self._threads:
            thread.start()
        first, *others = self._threads
        first.give(None)
        exchanged = self.next()
        for thread in others:  # not before: what comes first has what need not come again, such as frozen tensors
            thread.give(None)
        return exchanged

    def swap(self, gathered: Gathered) -> Exchanged:
        """See `Exchanges`."""
        if self._failure is not None:
            raise self._failure
        assert self.current is not None
        slot, self.current = self.current, None
        self.under_way += 1
        self._threads[slot].give(gathered)
        began = time.monotonic()
        exchanged = self.next()
        self._observer.blocked(time.monotonic() - began)
        return exchanged

    def next(self) -> Exchanged:
        """See `Exchanges`."""
        if self._failure is None:
            done = self._done.get()
            if isinstance(done, Exchanged):
                return self._taken(done)
            self._failure = done.error  # for good: that slot has given its exchange up
        raise self._failure

    def settle(self, seconds: float) -> None:
        """See `Exchanges`."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.wait(max(0.0, deadline - time.monotonic()))

    def collected(self) -> Iterator[Exchanged]:
        """See `Exchanges`."""
        while not self._done.empty():
            done = self._done.get()
            if isinstance(done, Exchanged):
                yield self._taken(done)
            elif done.gathered is not None:
                self.under_way -= 1
                said = "what became of a gradient in flight is not known: %s"
                _LOG.info(said, done.error, extra=Fields(slot=done.slot))

    def stop(self) -> None:
        """See `Exchanges`."""
        self._failure = self._failure or ClientClosed("this worker has left the run: make a new optimizer to go on")
        for thread in self._threads:
            thread.stop()

    def _taken(self, done: Exchanged) -> Exchanged:
        if done.gathered is not None:
            self.under_way -= 1
        if done.outcome.delivered is not None:
            self.current = done.slot
        self._slots[done.slot].taken(done.outcome)
        return done


@dataclass(frozen=True, slots=True)
class _Failed:
    """An exchange that ended with an error."""

    slot: int
    gathered: Gathered | None
    error: Exception


class _SlotThread:
    """Exchanges for one slot, one gradient after the other."""

    def __init__(self, slot: Slot, observer: Observer, done: "queue.SimpleQueue[Exchanged | _Failed]") -> None:
        self._slot = slot
        self._observer = observer
        self._done = done
        self._given: queue.SimpleQueue[_Given | None] = queue.SimpleQueue()
        self._last: _Given | None = None
        # No executor of concurrent.futures: the interpreter would wait at its end for exchanges that never end.
        self._thread = threading.Thread(target=self._run, name=f"ormo-slot-{slot.number}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def give(self, gathered: Gathered | None) -> None:
        self._last = _Given(gathered)
        self._given.put(self._last)

    def wait(self, seconds: float) -> None:
        """For the gradient that it has, if any; a request for parameters alone is not worth it."""
        if self._thread is threading.current_thread():  # which the garbage collector may use to close
            return
        if self._last is not None and self._last.gathered is not None:
            self._last.over.wait(seconds)

    def stop(self) -> None:
        self._given.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        while (given := self._given.get()) is not None:
            self._done.put(self._exchanged(given.gathered))
            given.over.set()

    def _exchanged(self, gathered: Gathered | None) -> Exchanged | _Failed:
        try:
            return _exchange(self._slot, gathered, self._observer)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's to see
            return _Failed(self._slot.number, gathered, error)


@dataclass(frozen=True, slots=True)
class _Given:
    """What a slot's thread is to exchange.

    Attributes:
        gathered: the gradient; None to ask for parameters alone.
        over: set when its outcome can be taken.
    """

    gathered: Gathered | None
    over: threading.Event = field(default_factory=threading.Event)


def _exchange(slot: Slot, gathered: Gathered | None, observer: Observer) -> Exchanged:
    """One exchange, in whichever thread."""
    if gathered is None:
        return Exchanged(slot.number, None, slot.exchange(None))
    gradient = gathered.arrived()
    observer.stages([("compute", gradient.compute_seconds)])
    outcome = slot.exchange(gradient)
    became: Outcome = "lost" if outcome.refusal is None else "refused"
    if outcome.result is not None:
        became = "discarded" if outcome.result.discarded else "applied"
    observer.stepped(became)
    return Exchanged(slot.number, gathered, outcome)
