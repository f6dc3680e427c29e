"""The workers of a run: as many actors as are wanted, and what becomes of each."""

import itertools
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from ormo_runtime.settings_loader import BAD_SETTINGS_EXIT_CODE
from ormo_worker.integrations.ray.program import Ended, Program
from ormo_worker.integrations.ray.settings import RaySettings

_LOG = logging.getLogger(__name__)
_LEAVE_SECONDS = 30.0  # local steps are pushed first, and a push is tried again for a while
_PLACED_SECONDS = 10.0  # an actor that has not answered for so long waits for a node that has room
_REPLACED_EXIT_CODE = 3


@dataclass
class Worker:
    """One worker of the run.

    Attributes:
        number: that its name ends with.
        actor: that has its program.
        ended: resolves to an `Ended`.
        where: resolves to the address of the node that it is on, once it is on one.
        asked: when that was asked.
        node: the address, as it was last known; empty before it is placed.
        failures: how often its program failed.
        leaving: when it was asked to leave; None: it was not.
    """

    number: int
    actor: Any
    ended: Any
    where: Any
    asked: float = field(default_factory=time.monotonic)
    node: str = ""
    failures: int = 0
    leaving: float | None = None

    @property
    def placed(self) -> bool:
        """Whether it is on a node, as far as is known."""
        return bool(self.node) and time.monotonic() - self.asked < _PLACED_SECONDS


def outcome(ended: Any) -> Ended:
    """What `run` returned; Ray's own complaint if the actor could not be."""
    try:
        result: Ended = ray.get(ended)
    except RayError as error:
        return Ended(1, str(error).strip().splitlines()[-1])
    return result


class Fleet:
    """Starts workers, starts those again that failed, lets some leave.

    Args:
        settings: of the run.
        server: HOST:PORT of it.

    Attributes:
        workers: those that run or are to run, by number.
        done: numbers of those that came to the run's end.
        failed: how those ended that are not started again, by number.
    """

    def __init__(self, settings: RaySettings, server: str) -> None:
        self._settings = settings
        self._words = settings.worker_words(server)
        self._actors = ray.remote(Program).options(
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
            max_restarts=-1,  # a node that dies is no failure of the worker
            max_task_retries=-1,  # so that `run` runs again
            max_concurrency=3,
            scheduling_strategy="SPREAD",
        )
        self.workers: dict[int, Worker] = {}
        self.done: set[int] = set()
        self.failed: dict[int, Ended] = {}

    def resize(self, wanted: int) -> None:
        """Start or dismiss as many as it takes for this number of workers."""
        staying = [number for number, worker in self.workers.items() if worker.leaving is None]
        known = sorted({*staying, *self.done, *self.failed})
        for number in known[wanted:]:
            self.failed.pop(number, None)
            if number in staying:
                _LOG.info("%s leaves", self.name(number))
                self.dismiss(self.workers[number])
        free = (number for number in itertools.count() if number not in {*known, *self.workers})
        for _ in range(wanted - len(known)):
            self._start(next(free))

    def name(self, number: int) -> str:
        """The id of the worker with this number."""
        return f"{self._settings.name}-{number}"

    def _start(self, number: int, failures: int = 0) -> None:
        name = self.name(number)
        actor: Any = self._actors.remote(name, "ormo_worker", [*self._words, "--worker-id", name])
        self.workers[number] = Worker(number, actor, actor.run.remote(), actor.address.remote(), failures=failures)

    def dismiss(self, worker: Worker) -> None:
        """Have it leave the run; at once if it is on no node."""
        worker.leaving = time.monotonic()
        worker.actor.stop.remote()
        if not worker.placed:
            ray.kill(worker.actor)

    def look(self, ended: set[Any]) -> None:
        """See how it goes.

        Args:
            ended: promises that have come true.
        """
        for worker in list(self.workers.values()):
            if worker.ended in ended:
                del self.workers[worker.number]
                self._judge(worker, outcome(worker.ended))
            elif worker.where in ended:
                self._found(worker)
            elif worker.leaving is not None and time.monotonic() - worker.leaving > _LEAVE_SECONDS:
                ray.kill(worker.actor)

    def _found(self, worker: Worker) -> None:
        try:
            node = ray.get(worker.where)
        except RayError:
            return  # its end is told, too
        if node != worker.node:
            _LOG.info("%s is on node %s%s", self.name(worker.number), node, " now" if worker.node else "")
        worker.node, worker.where = node, worker.actor.address.remote()
        worker.asked = time.monotonic()

    def _judge(self, worker: Worker, ended: Ended) -> None:
        name, failures = self.name(worker.number), worker.failures + 1
        if worker.leaving is not None:
            _LOG.info("%s has left", name)
        elif ended.code == 0:
            self.done.add(worker.number)
        # With 2 its settings or its task can't be used, with 3 another process has taken its place: the next one
        # would fare the same.
        elif (
            ended.code in (BAD_SETTINGS_EXIT_CODE, _REPLACED_EXIT_CODE) or failures > self._settings.restarts_per_worker
        ):
            self.failed[worker.number] = ended
            _LOG.error("%s ended with code %d and is not started again: %s", name, ended.code, ended.last_words)
        else:
            limit = self._settings.restarts_per_worker
            _LOG.warning(
                "%s ended with code %d and is started again (%d of %d): %s",
                *(name, ended.code, failures, limit, ended.last_words),
            )
            self._start(worker.number, failures)

    @property
    def over(self) -> bool:
        """Whether nobody trains any more: workers came to the run's end, and no other one is on any node."""
        return not self.workers or (bool(self.done) and not any(worker.placed for worker in self.workers.values()))

    def kill(self) -> None:
        """End all at once."""
        for worker in self.workers.values():
            ray.kill(worker.actor)
        self.workers.clear()
