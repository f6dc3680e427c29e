"""A run over gRPC and its replay in the simulator end in the same bits, whatever the method."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.settings import UsageError
from ormo_runtime.workload import Computed, Model
from ormo_server.core.effects import Redeemed
from ormo_server.core.inputs import Input, Join, Leave, Push, Request
from ormo_server.core.method import PRESETS
from ormo_server.sim.cli import main
from ormo_server.sim.plan import Plan, Result
from ormo_server.sim.record import read_run
from ormo_server.sim.settings import SimSettings
from ormo_server.trace import Recorded, Refused, Start, read_trace
from ormo_server.trace.rows import line_of
from service.wire import WireWorker, connected, eventually, served, tensor_chunks
from sim.by_ticket import SIZE, ByTicket, gradient_of, start

LINE = Manifest.laid_out([TensorSpec("line", (SIZE,), FLOAT32, PARAMETER)])
WORKERS, GRADIENTS = 4, 80

METHODS: dict[str, dict[str, Any]] = {name: {"method": name} for name in PRESETS} | {
    "bounded staleness": {"scheduler": "bounded-staleness", "staleness_bound": 5},
    "many products": {
        "update_rule": "smega2",
        "step_scale": "rescaled",
        "scheduler": "bounded-staleness",
        "staleness_bound": 2,
        "discard_delay": 2,
    },
}


def payload(values: torch.Tensor) -> Payload:
    made = Payload(PayloadLayout.of(LINE, FLOAT32, with_buffers=False))
    made.parameters.copy_(values)
    return made


class Worker:
    """Pushes gradients that are a function of parameters and ticket, at a pace of its own, until the run is over."""

    def __init__(self, stub: Any, number: int) -> None:
        self.wire = WireWorker(stub, f"w{number}", LINE)
        self.seconds = 0.001 if number else 0.006  # number 0 is slow, so that its gradients come late
        self.joins_again_after = 5 if number == 2 else 10**9

    def run(self) -> None:
        while self.train():
            wire = self.wire
            wire.stub.Leave(pb.LeaveRequest(worker=wire.name, incarnation=wire.incarnation))
            self.wire = WireWorker(wire.stub, wire.name, LINE, incarnation=2)
            self.joins_again_after = 10**9
            if self.wire.ask_to_join().WhichOneof("answer") != "welcome":
                return  # the run is over

    def train(self) -> bool:
        """Returns whether it wants to leave and come back."""
        stream = self.wire.open()
        stream.begin(None)
        stream.delivery()
        pushed = 0
        while True:
            time.sleep(self.seconds)
            assert self.wire.ticket is not None
            stream.begin(payload(gradient_of(self.wire.params, self.wire.ticket.number)))
            stream.result()
            pushed += 1
            message = stream.receive()
            if message.WhichOneof("part") == "finished":
                stream.finish()
                return False
            self.wire.receive(message.delivery, (stream.receive().chunk for _ in range(100)))
            if pushed == self.joins_again_after:
                stream.drop()
                return True


def record(trace: Path, directory: Path, settings: dict[str, Any]) -> torch.Tensor:
    """Train over gRPC; returns the parameters at the end."""
    training = {"learning_rate": 0.02, "momentum": 0.9, "stop_after_gradients": GRADIENTS, "min_workers": WORKERS}
    with served(directory, trace=trace, **(training | settings)) as server, connected(server) as stub:
        workers = [Worker(stub, number) for number in range(WORKERS)]
        first = workers[0].wire
        assert first.ask_to_join().WhichOneof("answer") == "model_wanted"
        first.offer(tensor_chunks(payload(start())))
        for worker in workers:
            worker.wire.join()
        with ThreadPoolExecutor(WORKERS) as pool:
            running = [pool.submit(worker.run) for worker in workers]
            eventually(lambda: server.host.engine.iteration()[1] > GRADIENTS // 4)
            stub.Control(pb.ControlRequest(set_learning_rate=pb.SetLearningRate(learning_rate=0.01)))
            for each in running:
                each.result()
        with server.host.engine.inspect() as machine:
            assert machine.state.iteration == GRADIENTS
            return machine.state.params.clone()


def replay(trace: Path, **settings: Any) -> Result:
    return Plan(
        SimSettings(trace=trace, workload="sim.by_ticket:workload", evaluate_every_gradients=1000, **settings)
    ).run()


@pytest.mark.parametrize("method", METHODS)
def test_a_real_run_and_its_replay_end_in_the_same_bits(method: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    served_params = record(trace, tmp_path / "run", METHODS[method])
    result = replay(trace)
    assert torch.equal(result.training.machine.state.params, served_params)
    assert result.summary["gradients"] == GRADIENTS
    assert not torch.equal(served_params, start())


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recorded")
    record(directory / "trace.jsonl", directory / "run", {"method": "ormo"})
    return directory / "trace.jsonl"


def test_another_rule_may_be_tried_on_the_recorded_order(trace: Path) -> None:
    as_recorded, other = replay(trace), replay(trace, method="asgd")
    assert other.summary["delay"] == as_recorded.summary["delay"]
    assert not torch.equal(other.training.machine.state.params, as_recorded.training.machine.state.params)


def test_the_command_follows_a_trace_and_shows_what_came_of_it(trace: Path, tmp_path: Path) -> None:
    into = tmp_path / "followed"
    flags = ["--workload", "sim.by_ticket:workload", "--evaluate-every-gradients", "1000", "--directory", str(into)]
    assert main(["--trace", str(trace), *flags]) == 0
    run = read_run(into)
    assert run.summary.digest == replay(trace).summary["digest"]
    assert list(run.path.glob("*.png"))


def test_another_scheduler_does_not_fit_the_recorded_order_and_the_refusal_says_what_to_do(trace: Path) -> None:
    with pytest.raises(UsageError, match=r"input \d+ of the trace does not fit .* --compute-seconds trace:FILE"):
        replay(trace, method="ssgdm")


def test_the_compute_times_of_a_trace_go_with_any_scheduler_and_number_of_workers(trace: Path) -> None:
    settings = SimSettings(
        method="ssgdm",
        workers=8,
        compute_seconds=f"trace:{trace}",
        workload="sim.by_ticket:workload",
        stop_after_gradients=16,
        evaluate_every_gradients=1000,
    )
    result = Plan(settings).run()
    # Two rounds, each as long as the slowest worker's time: it slept for 6 ms.
    assert result.summary["gradients"] == 16
    assert 2 * 0.006 < result.summary["virtual_seconds"] < 10


def test_a_trace_of_a_server_that_was_restarted_is_not_followed(trace: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.jsonl"
    twice.write_text(trace.read_text() + trace.read_text())
    with pytest.raises(UsageError, match=r"twice\.jsonl contains 1 server restart, which voids tickets"):
        replay(twice)


def test_a_trace_that_begins_with_a_restored_server_is_not_followed(trace: Path, tmp_path: Path) -> None:
    restored = tmp_path / "restored.jsonl"
    restored.write_text(trace.read_text().replace('"fresh":true', '"fresh":false'))
    with pytest.raises(UsageError, match=r"starts with a restored server"):
        replay(restored)


# Processes that come back


EPOCH = 9
ASKED = (Join(1.0, "a", 1, 1), Request(1.0, "a", 1, 0, 1))
LEFT_AND_BACK = (Leave(2.0, "a", 1), Join(3.0, "a", 1, 1))


def refused(request: int, ticket: int = 1, slot: int = 0, seconds: float = 4.0) -> Refused:
    return Refused(
        seconds=seconds,
        worker="a",
        incarnation=1,
        slot=slot,
        request=request,
        ticket=ticket,
        ticket_epoch=EPOCH,
        reason="TICKET_UNKNOWN",
    )


def pushed(request: int, ticket: int = 1, slot: int = 0, seconds: float = 4.0) -> Recorded:
    redeemed = Redeemed(0, 0, 1.0, 0, 0, 0.01, discarded=False, iteration_after=1)
    return Recorded(Push(seconds, "a", 1, slot, request, ticket, EPOCH, 4), redeemed)


class Buffered(ByTicket):
    """A worker's one buffer counts what it computed.

    What was done is in `tickets`, with 0 for buffers that were taken and -1 for those of which some may be.
    """

    def initial(self, seed: int) -> Model:
        return replace(super().initial(seed), float_buffers=torch.zeros(1))

    def gradient(self, ticket: int, params: torch.Tensor, out: torch.Tensor) -> Computed:
        return replace(super().gradient(ticket, params, out), float_buffers=torch.ones(1))

    def take_buffers(self, model: Model) -> None:
        self.tickets.append(0)

    def mend(self, model: Model) -> None:
        self.tickets.append(-1)


def buffered(**_: object) -> Buffered:
    """As `--workload sim.test_replay:buffered` makes it."""
    return Buffered()


def follow(path: Path, *entries: Any, refusals: bool = True, workload: str = "sim.by_ticket:workload") -> list[int]:
    """Returns the tickets whose gradients were computed."""
    start = Start.model_validate(
        {"event": "start", "format": 1, "epoch": EPOCH, "iteration": 0, "fresh": True, "settings": {}, "time": 0.0}
        | {"model": {"parameters": SIZE}, "refusals": refusals}
    )
    path.write_bytes(
        b"".join(line_of(Recorded(each) if isinstance(each, Input) else each) for each in (start, *entries))
    )
    plan = Plan(SimSettings(trace=path, workload=workload, evaluate_every_gradients=1000))
    made: Any = plan._workload
    made.tickets.clear()  # plans share it
    plan.run()
    return made.tickets


def test_a_process_that_joins_again_is_the_same_worker_and_has_computed_what_was_refused(tmp_path: Path) -> None:
    entries = (*ASKED, *LEFT_AND_BACK, refused(2), Request(4.0, "a", 1, 0, 2))
    assert follow(tmp_path / "t", *entries) == [1]


def test_a_retry_of_a_refused_gradient_is_not_computed_again(tmp_path: Path) -> None:
    entries = (*ASKED, *LEFT_AND_BACK, refused(2), Request(4.0, "a", 1, 0, 2), *LEFT_AND_BACK, refused(2))
    assert follow(tmp_path / "t", *entries) == [1]


def test_buffers_are_taken_with_the_first_delivery_after_each_join_and_looked_at_with_that_of_each_other_slot(
    tmp_path: Path,
) -> None:
    def asked(slot: int, request: int) -> Request:
        return Request(1.0, "a", 1, slot, request)

    def pushes(slot: int, request: int, ticket: int) -> Recorded:
        return pushed(request, ticket, slot, seconds=1.0)

    def lost(slot: int, request: int, ticket: int) -> Refused:
        return refused(request, ticket, slot, seconds=1.0)

    entries = (
        *(Join(1.0, "a", 1, 2), asked(0, 1), asked(1, 1)),
        *(pushes(0, 2, 1), asked(0, 2), pushes(1, 2, 2), pushes(0, 3, 3), asked(0, 3)),
        *(Leave(2.0, "a", 1), Join(3.0, "a", 1, 2)),
        *(lost(0, 4, 4), asked(0, 4), pushes(0, 5, 5), asked(0, 5), pushes(0, 6, 6)),
    )
    assert follow(tmp_path / "t", *entries, workload="sim.test_replay:buffered") == [0, 1, -1, 2, 3, 4, 0, 5, 6]


def test_that_several_slots_may_have_pushed_in_another_order_than_they_computed_in_is_warned_of(tmp_path: Path) -> None:
    follow(tmp_path / "t", Join(1.0, "b", 1, 1), Join(1.0, "a", 1, 2))
    warning = Plan(SimSettings(trace=tmp_path / "t", workload="sim.by_ticket:workload")).warning()
    assert "worker a joined with 2 slots in line 3" in warning


def test_that_a_run_began_from_another_model_is_warned_of(trace: Path, tmp_path: Path) -> None:
    assert Plan(SimSettings(trace=trace, workload="sim.by_ticket:workload")).warning() == ""
    other = tmp_path / "other.jsonl"
    digest = read_trace(trace)[0].start.model.digest
    other.write_text(trace.read_text().replace(digest, digest[::-1]))
    warning = Plan(SimSettings(trace=other, workload="sim.by_ticket:workload")).warning()
    assert "did not begin from the model that task digits makes with seed 0" in warning


NOT_TOLD = {
    "of a ticket that was not the last": (
        (*ASKED, refused(2, ticket=7)),
        3,
        "refused for ticket 7, which is not the last",
    ),
    "that is taken at a second try": ((*ASKED, refused(2), pushed(2)), 4, "pushed a refused gradient again"),
    "of a process with other slots": (
        (*ASKED, Leave(2.0, "a", 1), Join(3.0, "a", 1, 2)),
        4,
        "rejoins with 2 slots instead of 1",
    ),
}


@pytest.mark.parametrize("case", NOT_TOLD)
def test_where_it_cannot_be_known_what_was_computed_a_sentence_names_the_line(case: str, tmp_path: Path) -> None:
    entries, number, why = NOT_TOLD[case]
    with pytest.raises(UsageError, match=rf"^input {number} of the trace, in line {number + 1}, can't be .*{why}"):
        follow(tmp_path / "t", *entries)


def test_a_trace_of_an_earlier_version_in_which_a_process_joins_again_is_not_followed(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"in line 5, can't be followed \(worker a rejoined, and the trace does not record"
    ):
        follow(tmp_path / "t", *ASKED, *LEFT_AND_BACK, refusals=False)


@pytest.mark.parametrize("refusals", [True, False])
def test_that_a_trace_is_of_a_version_that_did_not_record_refusals_is_warned_of(tmp_path: Path, refusals: bool) -> None:
    follow(tmp_path / "t", *ASKED, refusals=refusals)
    warning = Plan(SimSettings(trace=tmp_path / "t", workload="sim.by_ticket:workload")).warning()
    assert warning.startswith("this trace was written by a version that did not record refused gradients") != refusals
