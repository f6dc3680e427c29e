"""A worker's slots at work: in which thread each exchanges its gradient, and whose parameters come next.

A gradient's way out: the training thread packs it (`Gathered`), the thread that exchanges it waits for the copies from
the device (`Gradient`), and the slot sends it. Its way back is one `ExchangeOutcome`, which the training thread takes.
"""

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from typing_extensions import override

from ormo_protos.tensors import Payload
from ormo_runtime.logs import Fields
from ormo_runtime.process import end_on_signals, leave_if_asked
from ormo_worker.client import ExchangeOutcome, Gradient, Slot
from ormo_worker.client.arguments import Observer
from ormo_worker.errors import ClientClosed
from ormo_worker.pytorch.devices import Arriving, Copies

_LOG = logging.getLogger(__name__)
_JOIN_SECONDS = 5.0  # the connection is closed by then, so nothing keeps a thread


@dataclass(frozen=True, slots=True)
class Gathered:
    """A gradient that may still be on its way from the device.

    Attributes:
        payload: the memory that it is sent from, complete once the copies are done; it must not change before its
            exchange is over.
        copies: those that fill the payload.
        samples: how many the mini-batch had.
        loss: the mini-batch's mean, perhaps still on its way; None if not known.
        loaded_at: when the model had the parameters that it was computed at, by `time.monotonic`.
        before: the copies of the gradient before this one; None for the first, and where each exchange is over before
            the next gradient is begun.
        local_steps: how many it is the sum of; 0 in a run without.
    """

    payload: Payload
    copies: Copies
    samples: int
    loss: Arriving | float | None
    loaded_at: float
    before: Copies | None = None
    local_steps: int = 0

    def wait(self) -> Gradient:
        """The gradient, once it is there; in any thread, but in one only."""
        # A device may still be at one gradient when it gets the parameters for the next: that time counts once.
        began = self.loaded_at if self.before is None else max(self.loaded_at, self.before.wait())
        seconds = self.copies.wait() - began
        loss = self.loss.number() if isinstance(self.loss, Arriving) else self.loss
        return Gradient(self.payload, self.samples, loss, seconds, self.local_steps)


class Pipeline(ABC):
    """Gradients go out, parameters come in; for the training thread, but for `finish`, `settle` and `stop`.

    These three may come from any thread: the garbage collector closes a forgotten optimizer wherever it happens to run.

    Attributes:
        current: the slot whose parameters came last and whose gradient is due; None if another has to come first.
        under_way: gradients that were given and whose outcome nobody has got yet.
    """

    current: int | None
    under_way: int

    @abstractmethod
    def start(self) -> ExchangeOutcome:
        """Wait for one slot's parameters, and have all others ask for theirs.

        Raises:
            OrmoError: as `Slot.exchange`.
        """

    @abstractmethod
    def swap(self, gathered: Gathered) -> ExchangeOutcome:
        """Give the current slot its gradient, and wait for the next parameters.

        Raises:
            OrmoError: as `Slot.exchange`, of any slot.
        """

    @abstractmethod
    def next(self) -> ExchangeOutcome:
        """Wait for the next parameters, where none are current.

        Raises:
            OrmoError: as `swap`.
        """

    @property
    @abstractmethod
    def awaits_result(self) -> bool:
        """Whether a gradient whose exchange was interrupted may not have arrived, and nobody goes on with it."""

    @abstractmethod
    def renew(self) -> ExchangeOutcome:
        """Give the current slot's ticket back, and wait for the next parameters.

        Raises:
            OrmoError: as `swap`.
        """

    @abstractmethod
    def finish(self, gathered: Gathered) -> None:
        """Give the current slot its last gradient, after which it wants nothing; `settle` waits for it."""

    @abstractmethod
    def settle(self, seconds: float) -> None:
        """Wait until the gradients under way are exchanged, but not for longer."""

    @abstractmethod
    def drain(self) -> Iterator[ExchangeOutcome]:
        """What came of exchanges that are over, and that nobody waited for."""

    @abstractmethod
    def stop(self) -> None:
        """End the threads. Close the connection before: an exchange that waits for the server holds its thread."""


class OneAtATime(Pipeline):
    """One slot, exchanging in the caller's thread: nothing is computed, and nothing is under way, between two calls."""

    def __init__(self, slot: Slot, observer: Observer) -> None:
        self.current = slot.number
        self.under_way = 0
        self._slot = slot
        self._observer = observer
        self._done: queue.SimpleQueue[ExchangeOutcome | _Failed] = queue.SimpleQueue()
        self._last: _SlotThread | None = None  # of its last gradient alone: that must not keep a worker that leaves

    @override
    def start(self) -> ExchangeOutcome:
        return self.next()

    @override
    def swap(self, gathered: Gathered) -> ExchangeOutcome:
        gradient = gathered.wait()  # before the clock starts: until then the device computes, and nobody waits
        began = time.monotonic()
        outcome = self._slot.exchange(gradient)
        self._observer.note_wait(time.monotonic() - began)
        if outcome.delivered is not None:
            self._slot.note_loaded(outcome.delivered)
        return outcome

    @override
    def next(self) -> ExchangeOutcome:
        outcome = self._slot.exchange(None)
        if outcome.delivered is not None:
            self._slot.note_loaded(outcome.delivered)
        return outcome

    @property
    @override
    def awaits_result(self) -> bool:
        return self._slot.awaits_result

    @override
    def renew(self) -> ExchangeOutcome:
        return self.next()  # who asks for a ticket gives up the one that it has

    @override
    def finish(self, gathered: Gathered) -> None:
        self._last = _SlotThread(self._slot, self._done.put)
        self._last.start()
        self._last.give(gathered, last=True)

    @override
    def settle(self, seconds: float) -> None:
        if self._last is not None:
            self._last.wait(seconds)

    @override
    def drain(self) -> Iterator[ExchangeOutcome]:
        while not self._done.empty():
            done = self._done.get()
            if isinstance(done, ExchangeOutcome):
                yield done
            else:
                done.log()

    @override
    def stop(self) -> None:
        if self._last is not None:
            self._last.stop()


class InFlight(Pipeline):
    """Several slots, each exchanging in a thread of its own, while the caller computes.

    Parameters are taken in the order in which they arrived. Slots in fixed turns would mostly come in the same
    order, as each asks after the one before, but not always: a stream that broke is late, and a server with
    bounded staleness may hand out its next ticket only when the last is redeemed. Whoever waits for one slot
    while another holds a ticket then waits for ever. Taking the first that is there, nobody ever waits with a
    ticket in hand; and the oldest goes first, so none grows staler than it must.

    No lock is needed: a slot's thread touches its slot and puts the outcome into the one queue; `current`, `under_way`
    and the failure belong to the thread that takes outcomes out.
    """

    def __init__(self, slots: tuple[Slot, ...], observer: Observer) -> None:
        self.current = None
        self.under_way = 0
        self._slots = slots
        self._observer = observer
        self._done: queue.SimpleQueue[ExchangeOutcome | _Failed | None] = queue.SimpleQueue()
        self._threads = tuple(_SlotThread(slot, self._done.put) for slot in slots)
        self._failure: Exception | None = None
        end_on_signals(self)

    @override
    def start(self) -> ExchangeOutcome:
        for thread in self._threads:
            thread.start()
        first, *others = self._threads
        first.give(None)
        outcome = self.next()
        for thread in others:  # not before: what comes first has what need not come again, such as frozen tensors
            thread.give(None)
        return outcome

    @override
    def swap(self, gathered: Gathered) -> ExchangeOutcome:
        if self._failure is not None:
            raise self._failure
        assert self.current is not None
        # None before it is given: who is interrupted from here on has no ticket left for another gradient.
        slot, self.current = self.current, None
        self.under_way += 1
        self._threads[slot].give(gathered)
        began = time.monotonic()
        outcome = self.next()
        self._observer.note_wait(time.monotonic() - began)
        return outcome

    @override
    def next(self) -> ExchangeOutcome:
        if self._failure is None:
            while (done := self._done.get()) is None:
                leave_if_asked()
            if isinstance(done, ExchangeOutcome):
                return self._note(done)
            self._failure = done.error  # for good: that slot has given its exchange up
        raise self._failure

    @property
    @override
    def awaits_result(self) -> bool:
        return False  # the slot's thread goes on with it, whatever happens to the caller

    @override
    def renew(self) -> ExchangeOutcome:
        slot, self.current = self.current, None
        if slot is not None:
            self._threads[slot].give(None)
        return self.next()

    @override
    def finish(self, gathered: Gathered) -> None:
        slot, self.current = self.current, None
        assert slot is not None
        self.under_way += 1
        self._threads[slot].give(gathered, last=True)

    @override
    def settle(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.wait(max(0.0, deadline - time.monotonic()))

    @override
    def drain(self) -> Iterator[ExchangeOutcome]:
        while not self._done.empty():
            done = self._done.get()
            if isinstance(done, ExchangeOutcome):
                yield self._note(done)
            elif done is not None and done.had_gradient:
                self.under_way -= 1
                done.log()

    @override
    def stop(self) -> None:
        self._failure = self._failure or ClientClosed(
            "this worker has left the run: create a new optimizer to continue"
        )
        for thread in self._threads:
            thread.stop()

    def end_waits(self) -> None:
        """Have `next` look whether a signal has come; the slots' threads go on with what they have."""
        self._done.put(None)

    def _note(self, outcome: ExchangeOutcome) -> ExchangeOutcome:
        if outcome.fate is not None:
            self.under_way -= 1
        if outcome.delivered is not None:
            self.current = outcome.slot
            self._slots[outcome.slot].note_loaded(outcome.delivered)
        return outcome


@dataclass(frozen=True, slots=True)
class _Failed:
    """An exchange that ended with an error.

    Attributes:
        slot: number of the slot that made it.
        had_gradient: whether a gradient was in it, and not only a wish for parameters.
        error: why it was given up.
    """

    slot: int
    had_gradient: bool
    error: Exception

    def log(self) -> None:
        said = "what became of a gradient in flight is not known: %s"
        _LOG.info(said, self.error, extra=Fields(slot=self.slot))


class _SlotThread:
    """Pipeline for one slot, one gradient after the other.

    Args:
        slot: used by this thread alone once it has started.
        done: takes the outcomes, in the order in which the exchanges end.
    """

    def __init__(self, slot: Slot, done: Callable[[ExchangeOutcome | _Failed], None]) -> None:
        self._slot = slot
        self._done = done
        self._given: queue.SimpleQueue[_Given | None] = queue.SimpleQueue()
        self._last: _Given | None = None
        # No executor of concurrent.futures: the interpreter would wait at its end for exchanges that never end.
        self._thread = threading.Thread(target=self._run, name=f"ormo-slot-{slot.number}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def give(self, gathered: Gathered | None, *, last: bool = False) -> None:
        self._last = _Given(gathered, last)
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
            self._done(self._exchange(given))
            given.over.set()  # not before: whoever has waited for it finds the outcome in the queue

    def _exchange(self, given: "_Given") -> ExchangeOutcome | _Failed:
        gathered = given.gathered
        try:
            gradient = None if gathered is None else gathered.wait()
            if given.last and gradient is not None:
                return self._slot.push_last(gradient)
            return self._slot.exchange(gradient)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's to see
            return _Failed(self._slot.number, gathered is not None, error)


@dataclass(frozen=True, slots=True)
class _Given:
    """What a slot's thread is to exchange.

    Attributes:
        gathered: the gradient; None to ask for parameters alone.
        last: whether it is the last one, and no parameters are wanted.
        over: set when its outcome is in the queue.
    """

    gathered: Gathered | None
    last: bool = False
    over: threading.Event = field(default_factory=threading.Event)
