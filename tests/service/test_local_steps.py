"""A run of local steps through the real socket: who may take part, what a ticket says, what is counted and lost."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest

from ormo_protos.tensors import Payload
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.service.server import Server
from ormo_server.trace import read_trace
from service.crashing import crashing, everything
from service.wire import SMALL, Refused, WireWorker, connected, eventually, payload, served, settings, state_of

H = 16
Serving = tuple[Server, ParameterServerStub]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    with served(tmp_path / "run", local_steps=H) as server, connected(server) as stub:
        yield server, stub


def local(stub: ParameterServerStub, name: str = "a", incarnation: int = 1) -> WireWorker:
    return WireWorker(stub, name, incarnation=incarnation, local_steps=H)


def with_ticket(stub: ParameterServerStub, name: str = "a", incarnation: int = 1) -> WireWorker:
    worker = local(stub, name, incarnation)
    worker.join()
    worker.pull()
    return worker


def series(server: Server, name: str) -> float:
    lines = generate_latest(server.metrics.registry).decode().splitlines()
    (found,) = [line for line in lines if line.startswith(f"{name} ")]
    return float(found.split()[-1])


def lost(server: Server) -> float:
    return series(server, "ormo_lost_local_steps_total")


# Who may take part


@pytest.mark.parametrize("has_model", [False, True])
def test_a_worker_that_makes_no_local_steps_is_refused_in_a_sentence(serving: Serving, *, has_model: bool) -> None:
    """As every worker of an earlier version: it sends no such field."""
    _, stub = serving
    if has_model:
        local(stub).join()
    with pytest.raises(Refused) as refused:
        WireWorker(stub, "old").join()
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LOCAL_STEPS")
    assert refused.value.message == (
        "this run has local steps (--local-steps 16), and worker 'old' sends the gradient of each step: give it an "
        "optimizer of its own (inner=..., or --inner), which older versions do not know; or start the server without "
        "--local-steps"
    )
    assert [each.worker for each in stub.GetStatus(pb.GetStatusRequest()).workers] == ["a"] * has_model
    assert local(stub).join().settings.local_steps == H


def test_a_worker_of_local_steps_is_told_that_a_run_has_none(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = local(stub)
        assert worker.join().settings.local_steps == 0
        assert worker.pull().ticket.local_steps == 0


def streamed(worker: WireWorker, gradient: Payload, *, local_steps: int) -> pb.PushResult:
    stream = worker.open()
    stream.begin(gradient, local_steps=local_steps)
    return stream.result()


@pytest.mark.parametrize(
    ("most", "came", "sentence"),
    [
        (H, 0, "holds 0 local steps: this run takes 1 to 16, as the server has --local-steps 16"),
        (H, 17, "holds 17 local steps: this run takes 1 to 16"),
        (H, -1, "holds -1 local steps"),
        (0, 1, "holds 1 local steps: this run takes 0, a gradient"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_push_of_the_other_kind_is_refused_and_changes_nothing(
    tmp_path: Path, most: int, came: int, sentence: str, *, stream: bool
) -> None:
    with served(tmp_path, local_steps=most) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", local_steps=most)
        worker.join()
        worker.pull()
        before = state_of(server)
        attempt = streamed if stream else WireWorker.push
        with pytest.raises(Refused, match=sentence) as refused:
            attempt(worker, payload(SMALL, 1.0), local_steps=came)
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST")
        assert state_of(server) == before
        assert stub.GetStatus(pb.GetStatusRequest()).refusals == {"BAD_REQUEST": 1}
        assert worker.push(payload(SMALL, 1.0)).iteration.number == 1


def test_a_server_does_not_start_with_weight_decay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--weight-decay 0.1 with --local-steps: weights decay in the workers' own"):
        settings(tmp_path, local_steps=H, weight_decay=0.1)


# What a ticket says


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def exchange(worker: WireWorker, seconds: float, clock: Clock) -> int:
    """Push what took so long; returns for how many steps the next ticket is."""
    assert worker.ticket is not None
    clock.now += seconds
    stream = worker.open()
    stream.begin(payload(SMALL, 1.0), local_steps=worker.ticket.local_steps)
    stream.result()
    stream.delivery()
    stream.finish()
    return worker.ticket.local_steps


def test_each_ticket_says_how_many_steps_are_for_it_in_every_way_that_there_is(serving: Serving) -> None:
    _, stub = serving
    worker = local(stub)
    worker.join()
    assert worker.pull().ticket.local_steps == H
    stream = worker.open()
    stream.begin(payload(SMALL, 1.0))
    stream.result()
    assert stream.delivery().ticket.local_steps == H
    stream.finish()
    assert worker.pull(ticket=False).ticket.local_steps == 0, "readers make none"


def slowed(server: Server, stub: ParameterServerStub, clock: Clock) -> tuple[WireWorker, WireWorker]:
    """Two workers, the second one four times slower, after three pushes of each."""
    fast, slow = with_ticket(stub, "fast"), with_ticket(stub, "slow")
    for _ in range(3):
        # Both began at the same time, and the slow one is done last.
        assert fast.ticket is not None
        assert slow.ticket is not None
        quick, late = fast.ticket.local_steps * 1.0, slow.ticket.local_steps * 4.0
        exchange(fast, quick, clock)
        exchange(slow, late - quick, clock)
        fast.pull()  # else its ticket would be as old as the slow one's push
    return fast, slow


# The clock of these tests jumps by minutes, and upkeep looks at it at any moment: nobody may lose a lease for that.
BY_SPEED: dict[str, Any] = {"local_steps": H, "local_steps_by_speed": True, "failure_timeout_seconds": 3600.0}


def test_a_slower_worker_is_told_to_make_fewer_steps(tmp_path: Path) -> None:
    with served(tmp_path, **BY_SPEED) as server, connected(server) as stub:
        server.host.clock = clock = Clock()  # type: ignore[assignment]
        fast, slow = slowed(server, stub, clock)
        assert fast.ticket is not None
        assert slow.ticket is not None
        assert (fast.ticket.local_steps, slow.ticket.local_steps) == (H, H // 4)
        steps = {each.worker: each.local_steps for each in stub.GetStatus(pb.GetStatusRequest()).workers}
        assert steps == {"fast": H, "slow": H // 4}


def test_a_crash_keeps_what_is_known_of_speeds_and_what_tickets_say(tmp_path: Path) -> None:
    with crashing(tmp_path, **BY_SPEED) as server, connected(server) as stub:
        server.host.clock = clock = Clock()  # type: ignore[assignment]
        _, slow = slowed(server, stub, clock)
        before = everything(server)
    with crashing(tmp_path, **BY_SPEED) as again, connected(again) as stub:
        assert everything(again) == before
        slow.stub = stub
        assert slow.pull().ticket.local_steps == H // 4


@pytest.mark.parametrize("other", [H // 2, 2 * H])
def test_after_a_restart_with_other_local_steps_all_join_again_and_lose_their_push(tmp_path: Path, other: int) -> None:
    with served(tmp_path, local_steps=H) as server, connected(server) as stub:
        worker = with_ticket(stub)
        worker.push(payload(SMALL, 1.0))
        worker.pull()
        assert server.drain()
    with served(tmp_path, local_steps=other) as server, connected(server) as stub:
        worker.stub = stub
        with pytest.raises(Refused, match="join first, or again") as refused:
            worker.push(payload(SMALL, 1.0))
        assert refused.value.reason == "NOT_A_MEMBER"
        assert worker.join().settings.local_steps == other
        with pytest.raises(Refused, match="TICKET_UNKNOWN"):  # it need not give up: it has the new number
            worker.push(payload(SMALL, 1.0))
        assert lost(server) == H
        assert worker.pull().ticket.local_steps == other
        assert worker.push(payload(SMALL, 1.0), local_steps=other).iteration.number == 2


def test_a_restart_with_the_same_local_steps_keeps_tickets(tmp_path: Path) -> None:
    with served(tmp_path, local_steps=H) as server, connected(server) as stub:
        worker = with_ticket(stub)
        assert server.drain()
    with served(tmp_path, local_steps=H) as server, connected(server) as stub:
        worker.stub = stub
        assert worker.push(payload(SMALL, 1.0)).iteration.number == 1


# The record


def test_the_trace_says_how_many_steps_a_push_holds_and_which_settings_were_in_force(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with served(tmp_path / "run", trace=trace, **BY_SPEED) as server, connected(server) as stub:
        with_ticket(stub).push(payload(SMALL, 1.0), local_steps=5)
        expected = server.host.settings.run()
    start, *inputs = map(json.loads, trace.read_text().splitlines())
    assert [row.get("local_steps") for row in inputs] == [None, None, 5]
    assert [row["event"] for row in inputs] == ["joined", "requested", "pushed"]
    assert (start["settings"]["local_steps"], start["settings"]["bucket"]) == (H, "mean")
    (segment,) = read_trace(trace)
    assert segment.start.training().run() == expected


def test_a_run_of_gradients_leaves_files_without_a_word_of_local_steps(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with crashing(tmp_path / "run", trace=trace) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        worker.push(payload(SMALL, 1.0))
        server.host.checkpoint()
        worker.pull()
        worker.push(payload(SMALL, 1.0))
    files = [trace, *(tmp_path / "run").glob("checkpoint-*/checkpoint.json"), *(tmp_path / "run").glob("journal/*.log")]
    assert len(files) >= 4
    for file in files:
        assert b'"pushed"' in file.read_bytes() or file.suffix == ".json"
        assert b"local_steps" not in file.read_bytes(), file


# What is counted


def test_steps_in_applied_pushes_are_counted_and_shown(serving: Serving) -> None:
    server, stub = serving
    worker = with_ticket(stub)
    for steps in (H, 5):
        worker.push(payload(SMALL, 1.0), local_steps=steps)
        worker.pull()
    assert series(server, "ormo_gradient_local_steps_sum") == H + 5
    assert series(server, "ormo_gradient_local_steps_count") == 2
    assert series(server, 'ormo_gradient_local_steps_bucket{le="8.0"}') == 1
    assert series(server, 'ormo_worker_local_steps{worker="a"}') == 5
    status = stub.GetStatus(pb.GetStatusRequest())
    assert (status.settings.local_steps, status.workers[0].local_steps) == (H, 5)
    assert lost(server) == 0


def test_a_run_of_gradients_counts_none(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        worker.push(payload(SMALL, 1.0))
        assert series(server, "ormo_gradient_local_steps_count") == 0
        assert 'ormo_worker_local_steps{worker="a"}' not in generate_latest(server.metrics.registry).decode()


# What is lost


def test_steps_that_come_for_a_void_ticket_are_lost_and_counted_once(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    server, stub = serving
    worker = with_ticket(stub)
    before = worker.ticket
    worker.pull()
    for _ in range(2):  # its answer may be lost
        with pytest.raises(Refused, match="TICKET_UNKNOWN"):
            worker.push(payload(SMALL, 1.0), ticket=before, local_steps=5)
    assert lost(server) == 5
    told = [record for record in caplog.records if "local steps" in record.message]
    assert [record.message for record in told] == [
        "worker a has lost 5 local steps: their ticket is void, and they can't count under another one"
    ]
    assert [(record.levelno, record.__dict__["worker"]) for record in told] == [(logging.WARNING, "a")]
    assert worker.push(payload(SMALL, 1.0)).iteration.number == 1


def test_after_a_crash_without_a_journal_steps_under_way_are_lost(tmp_path: Path) -> None:
    with served(tmp_path, local_steps=H) as server, connected(server) as stub:
        worker = with_ticket(stub)
        assert server.host.checkpoint(anew=True)
    with served(tmp_path, local_steps=H) as server, connected(server) as stub:
        worker.stub = stub
        with pytest.raises(Refused, match="TICKET_UNKNOWN"):
            worker.push(payload(SMALL, 1.0), local_steps=7)
        assert lost(server) == 7


def test_a_worker_whose_lease_ends_has_lost_up_to_what_its_ticket_was_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with served(tmp_path, local_steps=H, failure_timeout_seconds=0.3) as server, connected(server) as stub:
        worker = with_ticket(stub)
        eventually(lambda: lost(server) == H)
        assert "worker a has lost up to 16 local steps" in caplog.text
        worker.join()  # it was only slow, and sends what it has for the ticket that it had
        with pytest.raises(Refused, match="TICKET_UNKNOWN"):
            worker.push(payload(SMALL, 1.0))
        assert lost(server) == H


def test_a_process_that_another_replaces_has_lost_its_steps(serving: Serving) -> None:
    server, stub = serving
    with_ticket(stub)
    assert lost(server) == 0
    with_ticket(stub, incarnation=2)
    assert lost(server) == H


def test_a_ticket_that_was_out_for_too_long_has_lost_its_steps(tmp_path: Path) -> None:
    settings = {"local_steps": H, "ticket_timeout_seconds": 0.1, "failure_timeout_seconds": 0.5}
    with served(tmp_path, **settings) as server, connected(server) as stub:
        worker = with_ticket(stub)

        def is_void() -> bool:
            stub.Heartbeat(pb.HeartbeatRequest(worker=worker.name, incarnation=worker.incarnation))
            return lost(server) == H

        eventually(is_void)


def test_who_leaves_with_a_ticket_has_pushed_what_it_had(serving: Serving) -> None:
    server, stub = serving
    with_ticket(stub)
    stub.Leave(pb.LeaveRequest(worker="a", incarnation=1))
    assert lost(server) == 0


# Weights of a bucket


TEAM: dict[str, Any] = {"local_steps": H, "method": "local-sgd", "learning_rate": 1.0, "max_workers": 8}


def moved(server: Server) -> float:
    """By how much the model has moved, each of whose pseudo-gradients is 1."""
    with server.host.engine.inspect() as machine:
        (where,) = machine.state.params.unique().tolist()
    return -where


def team_of(stub: ParameterServerStub) -> list[WireWorker]:
    return [local(stub, f"w{number}") for number in range(8)]


def test_workers_that_push_their_last_and_leave_move_the_model_by_one_mean_together(tmp_path: Path) -> None:
    """Each by 1/K at hand-out, however few are left: the bucket's mean, not the harmonic sum."""
    with served(tmp_path, **TEAM) as server, connected(server) as stub:
        team = team_of(stub)
        for worker in team:
            worker.join()
        for worker in team:
            worker.pull()
        for worker in team:
            worker.push(payload(SMALL, 1.0), local_steps=3)
            stub.Leave(pb.LeaveRequest(worker=worker.name, incarnation=1))
        assert moved(server) == 1.0


def test_workers_that_came_one_after_the_other_move_the_model_by_one_mean_together(tmp_path: Path) -> None:
    """Each by 1/K at application: at hand-out the first was alone."""
    with served(tmp_path, **TEAM) as server, connected(server) as stub:
        team = team_of(stub)
        for worker in team:
            worker.join()
            worker.pull()
        for worker in team:
            worker.push(payload(SMALL, 1.0))
        assert moved(server) == 1.0


def test_in_a_round_a_worker_that_dies_counts_as_one_that_has_not_moved(tmp_path: Path) -> None:
    changes = TEAM | {"method": "diloco", "momentum": 0.0, "min_workers": 4, "slots_per_worker": 1}
    with served(tmp_path, **changes) as server, connected(server) as stub:
        team = team_of(stub)[:4]
        for worker in team:
            worker.join()
        for worker in team:
            worker.pull()
        *others, lost_one = team
        for worker in others:
            worker.push(payload(SMALL, 1.0))
        with_new_process = local(stub, lost_one.name, incarnation=2)
        with_new_process.join()
        assert moved(server) == 3 / 4
        assert lost(server) == H


def test_without_a_word_a_run_of_local_steps_takes_means_at_the_outer_rate(tmp_path: Path) -> None:
    given = settings(tmp_path, local_steps=H).model_dump(exclude={"learning_rate", "momentum"})
    made = type(settings(tmp_path))(**given)
    assert (made.run().method.bucket, made.learning_rate, made.momentum) == ("mean", 0.4, 0.9)


@pytest.mark.parametrize("choice", [{"method": "fadas"}, {"update_rule": "fadas"}])
def test_a_rule_with_second_moments_has_the_rate_of_gradients(tmp_path: Path, choice: dict[str, str]) -> None:
    given = settings(tmp_path, local_steps=H, **choice).model_dump(exclude={"learning_rate"})
    assert type(settings(tmp_path))(**given).learning_rate == 0.01
