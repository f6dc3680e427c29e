"""Whatever is lost, doubled, late or killed: each acknowledged gradient is in the parameters exactly once.

Plain SGD at rate 1: element j of the parameters is minus the number of gradients of worker j that were applied.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.driving import fingerprint
from core.scripts import SIZE
from journal.recording import MANIFEST, RecordedMachine, fresh_copy, journal_in
from ormo_server.core import snapshot
from ormo_server.core.errors import NotAMember, OrmoError, Replaced, StaleRequest, TicketUnknown
from ormo_server.core.ids import TicketKey
from ormo_server.core.inputs import Gradient, Join, Leave, Push, Request, Requester
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import PRESETS, Run
from ormo_server.core.state import PushResult
from ormo_server.core.step_size import LearningRate
from ormo_server.journal import Journal, Reading, replay, writer

RUN = Run(LearningRate(1.0), PRESETS["asgd"], momentum=0.0)
WORKERS = st.integers(0, SIZE - 1)
FATES = st.sampled_from(["heard", "heard", "heard", "answer lost", "request lost"])
TURNS = st.lists(st.tuples(WORKERS, FATES), min_size=3, max_size=12)


@dataclass
class Process:
    """What one process of a worker knows."""

    name: str
    column: int
    incarnation: int
    request: int = 0
    ticket: TicketKey | None = None
    pushes: list[tuple[int, TicketKey]] = field(default_factory=list)  # request and ticket of each, in order
    unanswered: bool = False  # the last one


class ExactlyOnce(RuleBasedStateMachine):
    """Processes, a server that is killed and comes back, and what must be true of both."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.now = 0.0
        self.epoch = 7
        self.lives = 0
        self.settled = 0
        self.processes: dict[str, Process] = {}
        self.former: list[Process] = []
        # Of each push: the process, its request, and where it landed.
        self.applied: dict[tuple[str, int, int], int] = {}
        self.positions: dict[tuple[str, int, int], int] = {}  # of those since the last checkpoint
        self.heard: dict[tuple[str, int, int], int] = {}
        self.lost_results = 0  # pushes that were applied, and refused when they were tried again
        self.serve(
            StateMachine.fresh(RUN, torch.zeros(SIZE), torch.zeros(2), torch.zeros(1, dtype=torch.int64), epoch=7)
        )

    def teardown(self) -> None:
        self.journal.close()
        self.folder.cleanup()

    # The server

    def serve(self, machine: StateMachine) -> None:
        # By turns in their lines and in files: each server finds what one before it has left.
        self.lives += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(writer.IN_LINE_BYTES, "off", self.lives % 2 * writer.IN_LINE_BYTES["always"])
            self.journal: Journal = journal_in(Path(self.folder.name))
        self.machine = RecordedMachine(RUN, machine.state)
        self.machine.journal = self.journal
        self.settled = 0
        self.checkpointed = snapshot.take(self.machine), self.journal.log
        self.positions = {}
        self.journal.forget_before(self.journal.log)

    def settle(self) -> None:
        self.journal.wait_durable(self.journal.position)
        self.settled = self.journal.position

    @rule(turns=TURNS)
    def kill(self, turns: list[tuple[int, str]]) -> None:
        """What was not settled is gone; nobody had heard of it."""
        self.train(turns)
        self.journal.close()
        self.applied = {name: at for name, at in self.applied.items() if self.positions.get(name, 0) <= self.settled}
        taken, log = self.checkpointed
        machine = snapshot.resume(RUN, fresh_copy(taken))
        reading = Reading(Path(self.folder.name), log, MANIFEST)
        replay(machine, reading, 0.0)
        assert not reading.lost
        self.come_back(machine)

    @rule(turns=TURNS)
    def drain(self, turns: list[tuple[int, str]]) -> None:
        self.train(turns)
        self.journal.close()
        self.come_back(self.machine)

    def come_back(self, machine: StateMachine) -> None:
        self.epoch += 1
        taken = fresh_copy(snapshot.take(machine))
        self.serve(snapshot.restore(RUN, taken, epoch=self.epoch, keep_tickets=True))

    @rule()
    def checkpoint(self) -> None:
        taken, log = snapshot.take(self.machine), self.journal.begin_log()
        self.settle()
        self.checkpointed = taken, log
        self.journal.forget_before(log)

    @rule(worker=WORKERS)
    def expire(self, worker: int) -> None:
        process = self.processes.get(f"w{worker}")
        if process is not None:
            self.machine.step(Leave(self.tick(), process.name, process.incarnation))

    # Processes

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    @initialize()
    def begin(self) -> None:
        for worker in range(SIZE):
            self.start(worker)

    @rule(worker=WORKERS)
    def start(self, worker: int) -> None:
        """A new process, in the place of the one before."""
        before = self.processes.get(f"w{worker}")
        if before is not None:
            self.former.append(before)
        process = Process(f"w{worker}", worker, 1 if before is None else before.incarnation + 1)
        self.processes[process.name] = process
        self.machine.step(Join(self.tick(), process.name, process.incarnation, 1))
        self.settle()

    @rule(turns=TURNS)
    def train(self, turns: list[tuple[int, str]]) -> None:
        """As workers do: ask, push, and try again until they hear."""
        for worker, fate in turns:
            process = self.processes[f"w{worker}"]
            if process.unanswered:
                self.retry(worker, heard=fate == "heard")
            elif process.ticket is None:
                self.ask(worker, heard=True)
            self.push(worker, fate)

    @rule(worker=WORKERS, heard=st.booleans())
    def ask(self, worker: int, heard: bool) -> None:
        """For a ticket; whoever is no member any more joins again."""
        process = self.processes[f"w{worker}"]
        process.request += 1
        process.unanswered = False
        requester = Requester(process.name, process.incarnation, 0, process.request)
        try:
            effects = self.machine.step(Request(self.tick(), *requester))
        except NotAMember:
            self.machine.step(Join(self.tick(), process.name, process.incarnation, 1))
            effects = self.machine.step(Request(self.tick(), *requester))
        granted = effects.granted
        process.ticket = None
        if heard:
            self.settle()
            process.ticket = granted[-1].ticket.key

    @rule(worker=WORKERS, fate=FATES)
    def push(self, worker: int, fate: str) -> None:
        process = self.processes[f"w{worker}"]
        if process.ticket is None or process.unanswered:
            return
        process.request += 1
        process.pushes.append((process.request, process.ticket))
        process.unanswered = True
        if fate != "request lost":
            self.arrives(process, len(process.pushes) - 1, heard=fate == "heard")

    @rule(worker=WORKERS, heard=st.booleans())
    def retry(self, worker: int, heard: bool) -> None:
        """As often as it takes: the same request again."""
        process = self.processes[f"w{worker}"]
        if process.unanswered:
            self.arrives(process, len(process.pushes) - 1, heard=heard)

    @rule(worker=WORKERS, data=st.data())
    def an_old_request_arrives_again(self, worker: int, data: st.DataObject) -> None:
        """Late or doubled on its way: nothing changes."""
        process = self.processes[f"w{worker}"]
        done = len(process.pushes) - process.unanswered
        if done:
            before = fingerprint(self.machine)
            self.arrives(process, data.draw(st.integers(0, done - 1)), heard=False)
            assert fingerprint(self.machine) == before

    @precondition(lambda self: self.former)
    @rule(data=st.data())
    def a_replaced_process_pushes(self, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from(self.former))
        if process.pushes:
            before = fingerprint(self.machine)
            self.arrives(process, len(process.pushes) - 1, heard=False)
            assert fingerprint(self.machine) == before

    def arrives(self, process: Process, number: int, *, heard: bool) -> None:
        request, ticket = process.pushes[number]
        name = (process.name, process.incarnation, request)
        values = torch.zeros(SIZE)
        values[process.column] = 1.0
        push = Push(self.tick(), process.name, process.incarnation, 0, request, ticket[1], ticket[0])
        try:
            result = self.machine.step(push, Gradient(values)).result
        except (NotAMember, Replaced, StaleRequest, TicketUnknown) as refusal:
            is_last = process.unanswered and number == len(process.pushes) - 1
            is_newest = self.processes[process.name] is process
            kept = is_last and is_newest and name in self.applied
            self.lost_results += kept and not isinstance(refusal, NotAMember)
            if heard:
                self.refused(process, refusal)
            return
        assert result is not None
        self.landed(process, name, result, heard=heard)

    def refused(self, process: Process, refusal: OrmoError) -> None:
        if isinstance(refusal, NotAMember):  # it joins again, and tries again
            self.machine.step(Join(self.tick(), process.name, process.incarnation, 1))
            self.settle()
            return
        process.unanswered = False
        process.ticket = None

    def landed(self, process: Process, name: tuple[str, int, int], result: PushResult, *, heard: bool) -> None:
        assert result.repeated == (name in self.applied)
        if not result.repeated:
            self.applied[name], self.positions[name] = result.iteration, self.journal.position
        assert self.applied[name] == result.iteration
        if heard:
            self.settle()
            self.heard[name] = result.iteration
            process.unanswered, process.ticket = False, None

    # What is always true

    @invariant()
    def what_was_heard_is_applied_and_where_it_was_said(self) -> None:
        assert all(self.applied.get(name) == iteration for name, iteration in self.heard.items())

    @invariant()
    def results_are_kept_until_their_process_asks_for_something_else(self) -> None:
        assert self.lost_results == 0

    @invariant()
    def parameters_hold_each_once(self) -> None:
        counts = [sum(name == f"w{column}" for name, _, _ in self.applied) for column in range(SIZE)]
        assert self.machine.state.params.tolist() == [-float(count) for count in counts]

    @invariant()
    def iterations_are_dense(self) -> None:
        assert sorted(self.applied.values()) == list(range(1, self.machine.state.iteration + 1))


ExactlyOnce.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestExactlyOnce = ExactlyOnce.TestCase
