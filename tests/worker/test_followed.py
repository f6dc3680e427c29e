"""What real workers did is followed by its trace to the same bits, also where gradients were lost on the way."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.core import snapshot
from ormo_server.core.machine import StateMachine
from ormo_server.service.server import Server
from ormo_server.sim.plan import Plan
from ormo_server.sim.settings import SimSettings
from ormo_server.trace import Refused, read_trace
from ormo_worker import training
from ormo_worker.settings import RunSettings
from service.wire import connected, eventually, served
from worker.interrupted import Interrupted

BATCH = 4
GRADIENTS = 60
INTERRUPTED, HOLED = "worker.interrupted:Interrupted", "worker.interrupted:Holed"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(machine: StateMachine) -> dict[str, bytes]:
    """But for those that a rule keeps of members, for the served ones have left."""
    taken = snapshot.take(machine).tensors
    return {name: tensor.numpy().tobytes() for name, tensor in taken.items() if "/" not in name}


class Losses:
    """What real workers lose in the midst of gradients.

    Args:
        stub: of the server, whose lease and ticket timeouts are played by the calls with the same effect.
        server: for what only it knows.
        planned: the number of a gradient of a worker's, from 0, and what is lost then: "lease" or "ticket".
    """

    def __init__(self, stub: ParameterServerStub, server: Server, planned: dict[tuple[str, int], str]) -> None:
        self._stub = stub
        self._server = server
        self._planned = planned
        self._computed: Counter[str] = Counter()
        self._lost = 0

    def on_gradient(self) -> None:
        """Called in the worker's thread, which has its name."""
        worker = threading.current_thread().name
        # Or the others would end the run before who lost something is back.
        eventually(lambda: self._refused() == self._lost, 30.0)
        what = self._planned.get((worker, self._computed[worker]))
        self._computed[worker] += 1
        if what is not None:
            self._lose(worker, what)

    def _refused(self) -> int:
        return self._stub.GetStatus(pb.GetStatusRequest()).refusals["TICKET_UNKNOWN"]

    def _lose(self, worker: str, what: str) -> None:
        with self._server.host.engine.inspect() as machine:
            incarnation = machine.state.members[worker].incarnation
            mine = [ticket for ticket in machine.state.tickets.values() if ticket.slot[0] == worker]
        self._lost += 1
        if what == "lease":
            self._stub.Leave(pb.LeaveRequest(worker=worker, incarnation=incarnation))
        else:
            returned = [pb.Ticket(epoch=ticket.epoch, number=ticket.number) for ticket in mine]
            self._stub.Heartbeat(pb.HeartbeatRequest(worker=worker, incarnation=incarnation, returned=returned))


def train(
    trace: Path, directory: Path, task: str, losses: dict[tuple[str, int], str], **settings: Any
) -> dict[str, bytes]:
    """With two real workers, `a` and `b`; returns the tensors at the end."""
    usual = {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.01, "stop_after_gradients": GRADIENTS}
    with (
        served(directory, trace=trace, min_workers=2, **usual | settings) as server,
        connected(server) as stub,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(Interrupted, "on_gradient", Losses(stub, server, losses).on_gradient)
        common = {
            "server": server.address,
            "task": task,
            "batch_size": BATCH,
            "device": "cpu",
            "connect_timeout_seconds": 10.0,
        }
        workers = []
        for name in "ab":
            told = RunSettings(worker_id=name, **common)
            workers.append(threading.Thread(target=training.run, args=(told,), name=name))
            workers[-1].start()
            eventually(lambda name=name: name in members(server), 30.0)  # what makes models draws from one generator
        for worker in workers:
            worker.join(60.0)
        with server.host.engine.inspect() as machine:
            assert machine.state.finished
            return tensors(machine)


def members(server: Server) -> list[str]:
    if not server.host.has_model:
        return []
    with server.host.engine.inspect() as machine:
        return list(machine.state.members)


def followed(trace: Path, task: str) -> dict[str, bytes]:
    settings = SimSettings(trace=trace, task=task, batch_size=BATCH, evaluate_every_gradients=1000)
    return tensors(Plan(settings).run().training.machine)


def refusals(trace: Path) -> Counter[str]:
    (segment,) = read_trace(trace)
    return Counter(taken.reason for taken in segment.inputs if isinstance(taken, Refused))


LOSSES: dict[str, dict[tuple[str, int], str]] = {
    "nothing": {},
    "a lease": {("a", 5): "lease"},
    "leases again and again": {("a", 5): "lease", ("a", 6): "lease", ("b", 8): "lease", ("a", 11): "lease"},
    "tickets": {("a", 3): "ticket", ("b", 3): "ticket", ("b", 4): "ticket"},
    "a ticket, then the lease": {("a", 3): "ticket", ("a", 4): "lease"},
}


@pytest.mark.parametrize("method", ["ormo", "dc-asgd", "ssgdm"])
@pytest.mark.parametrize("lost", LOSSES)
def test_workers_that_lost_leases_and_tickets_are_followed_to_the_same_bits(
    lost: str, method: str, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    served_tensors = train(trace, tmp_path / "run", INTERRUPTED, LOSSES[lost], method=method)
    assert refusals(trace) == Counter({"TICKET_UNKNOWN": len(LOSSES[lost])})
    assert followed(trace, INTERRUPTED) == served_tensors


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "not finite": (HOLED, {}, "NON_FINITE"),
    "too long": (HOLED, {"max_gradient_norm": 3.0, "over_norm": "refuse"}, "NORM_TOO_LARGE"),
    "clipped": (INTERRUPTED, {"max_gradient_norm": 0.5}, ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_gradients_that_were_refused_or_clipped_are_followed_to_the_same_bits(case: str, tmp_path: Path) -> None:
    task, settings, reason = REFUSED[case]
    trace = tmp_path / "trace.jsonl"
    served_tensors = train(trace, tmp_path / "run", task, {}, **settings)
    assert followed(trace, task) == served_tensors
    assert bool(refusals(trace)[reason]) == bool(reason)
