"""A recorded run, followed input by input: the same order, the same times, gradients computed anew."""

from ormo_protos.usage import UsageError
from ormo_server.core.errors import OrmoError
from ormo_server.core.inputs import (
    Input,
    Joined,
    LearningRateSet,
    Left,
    Pushed,
    Requested,
    Requester,
    Returned,
    Withdrawn,
)
from ormo_server.sim.training import Place, Process, Training
from ormo_server.trace import Segment


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

    def run(self) -> None:
        """Feed all inputs, as long as the run is not over.

        Raises:
            UsageError: an input does not fit what came before it: the settings or the scheduler are others.
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
            self._training.granted()
        self._training.evaluate(self.now)

    def _feed(self, taken: Input) -> None:
        machine = self._training.machine
        match taken:
            case Withdrawn(slot):
                machine.withdraw_request(slot)
                return
            case Joined(now, worker, incarnation, slots):
                self._training.join(now, worker, incarnation, slots)
            case Left(now, worker, incarnation):
                self._training.leave(now, self._process(worker, incarnation))
            case Returned(now, worker, incarnation, ticket):
                machine.return_ticket(now, worker, incarnation, ticket)
            case LearningRateSet(now, learning_rate):
                machine.set_learning_rate(now, learning_rate)
            case Requested(now, requester):
                process, place = self._place(requester)
                self._training.request(now, process, place)
            case Pushed(now, requester, ticket, samples):
                process, place = self._place(requester)
                if place.ticket is None or place.ticket.key != ticket.key:
                    raise _Stray(f"ticket {ticket.number} is pushed, but {requester.worker} does not have it")
                self._training.push(now, process, place, samples)
        self.now = taken.now

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


class _Stray(Exception):
    """An input about somebody or something that is not there."""
