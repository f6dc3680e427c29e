"""A recorded run, followed input by input: the same order, the same times, gradients computed anew."""

from collections import Counter

from ormo_runtime.settings import UsageError
from ormo_server.core.errors import OrmoError
from ormo_server.core.inputs import (
    Joined,
    LearningRateSet,
    Left,
    Pushed,
    Requested,
    Requester,
    Returned,
    Withdrawn,
)
from ormo_server.core.keys import TicketKey
from ormo_server.sim.training import Place, Process, Training
from ormo_server.trace import Refused, Segment
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
        self._joins_to_come = Counter(_process_of(taken) for taken in segment.inputs if isinstance(taken, Joined))
        self._away: dict[tuple[str, int], Process] = {}

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
                    "was recorded with, or replay its compute times alone with --compute-time trace:FILE"
                ) from error
            except _NotTold as error:
                raise UsageError(
                    f"input {number} of the trace, in line {number + 1}, can't be followed ({error}): replay its "
                    "compute times alone with --compute-time trace:FILE"
                ) from error
            self._training.granted()
        self._training.evaluate(self.now)

    def _feed(self, taken: Entry) -> None:
        machine = self._training.machine
        match taken:
            case Withdrawn(slot):
                machine.withdraw_request(slot)
                return
            case Joined():
                self._join(taken)
            case Left(now, worker, incarnation):
                self._leave(now, self._process(worker, incarnation))
            case Returned(now, worker, incarnation, ticket):
                machine.return_ticket(now, worker, incarnation, ticket)
            case LearningRateSet(now, learning_rate):
                machine.set_learning_rate(now, learning_rate)
            case Requested(now, requester):
                process, place = self._place(requester)
                self._training.request(now, process, place)
            case Refused(_, requester, ticket):
                self._lose(requester, ticket)
            case Pushed():
                self._push(taken)
        self.now = taken.now

    # Who is there

    def _join(self, taken: Joined) -> None:
        key = _process_of(taken)
        self._joins_to_come[key] -= 1
        known = self._away.pop(key, None)
        if known is None:
            self._training.join(taken.now, taken.worker, taken.incarnation, taken.slots)
            return
        if not self._knows_refusals:
            raise _NotTold(
                f"the same process of worker {taken.worker} joins again and goes on with its data, and the version "
                "that wrote the trace did not record whether the gradient that it had in hand was refused"
            )
        if len(known.places) != taken.slots:
            raise _NotTold(f"worker {taken.worker} joins again with {taken.slots} slots, not {len(known.places)}")
        self._training.join_again(taken.now, known)

    def _leave(self, now: float, process: Process) -> None:
        self._training.leave(now, process)
        key = (process.name, process.incarnation)
        if self._joins_to_come[key]:  # else its parameters would be kept for nothing
            self._away[key] = process

    def _process(self, worker: str, incarnation: int) -> Process:
        process = self._training.processes.get(worker)
        if process is None or process.incarnation != incarnation:
            raise _Stray(f"worker {worker} is not there")
        return process

    def _place(self, requester: Requester) -> tuple[Process, Place]:
        process = self._process(requester.worker, requester.incarnation)
        place = process.places[requester.slot]
        place.request = requester.request
        return process, place

    # What they computed

    def _push(self, taken: Pushed) -> None:
        process, place = self._place(taken.requester)
        if place.ticket is None or place.ticket.key != taken.ticket.key:
            raise _Stray(f"ticket {taken.ticket.number} is pushed, but {process.name} does not have it")
        if place.request == place.refused:
            raise _NotTold(f"worker {process.name} pushed again what had been refused, which no worker of ours does")
        self._training.push(taken.now, process, place, taken.samples)

    def _lose(self, requester: Requester, ticket: TicketKey) -> None:
        process, place = self._place(requester)
        if requester.request <= place.refused:
            return  # it joined again between two tries
        if place.ticket is None or place.ticket.key != ticket:
            raise _NotTold(
                f"a gradient of worker {process.name} for ticket {ticket[1]} was refused, whose parameters are not the "
                "last that it got"
            )
        place.refused = requester.request
        self._training.lose(process, place)


def _process_of(taken: Joined) -> tuple[str, int]:
    return (taken.worker, taken.incarnation)


class _Stray(Exception):
    """An input about somebody or something that is not there."""


class _NotTold(Exception):
    """It can't be known which gradients a worker computed."""
