"""A recorded run, followed input by input: the same order, the same times, gradients computed anew."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from ormo_runtime.settings import UsageError
from ormo_server.core.errors import OrmoError
from ormo_server.core.inputs import Input, Join, Leave, Push, Request
from ormo_server.sim.training import Place, Process, Training
from ormo_server.trace import Recorded, Refused, Segment
from ormo_server.trace.rows import Entry


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
                f"the same process of worker {given.worker} joins again and goes on with its data, and the version "
                "that wrote the trace did not record whether the gradient that it had in hand was refused"
            )
        if len(known.places) != given.slots:
            raise _NotTold(f"worker {given.worker} joins again with {given.slots} slots, not {len(known.places)}")
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
            raise _Stray(f"worker {worker} is not there")
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
            raise _Stray(f"ticket {given.ticket} is pushed, but {process.name} does not have it")
        if place.request == place.refused:
            raise _NotTold(f"worker {process.name} pushed again what had been refused, which no worker of ours does")
        self._training.push(given.seconds, process, place, given.samples)

    def _lose(self, refused: Refused) -> None:
        process, place = self._place(refused)
        if refused.request <= place.refused:
            return  # it joined again between two tries
        if place.ticket is None or place.ticket.key != (refused.ticket_epoch, refused.ticket):
            raise _NotTold(
                f"a gradient of worker {process.name} for ticket {refused.ticket} was refused, whose parameters are "
                "not the last that it got"
            )
        place.refused = refused.request
        self._training.lose(process, place)


def _process_of(join: Join) -> tuple[str, int]:
    return (join.worker, join.incarnation)


class _Stray(Exception):
    """An input about somebody or something that is not there."""


class _NotTold(Exception):
    """It can't be known which gradients a worker computed."""
