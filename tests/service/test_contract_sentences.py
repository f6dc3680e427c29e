"""What the contract says in sentences, and the server does."""

import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2

from ormo_protos.manifest import FLOAT32
from ormo_protos.refusals import Reason
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.settings import ServerSettings
from service.wire import SMALL, Exchanges, Refused, WireWorker, connected, payload, refusals, served, state_of

PROTO = Path(__file__).parents[2] / "protos/ormo_protos/v1/parameter_server.proto"
NAN = float("nan")
UNSOUND: dict[str, tuple[dict[str, Any], float]] = {
    "NON_FINITE": ({}, NAN),
    "NORM_TOO_LARGE": ({"max_gradient_norm": 1.0, "over_norm": "refuse"}, 7.0),
}


def with_ticket(worker: WireWorker) -> Exchanges:
    worker.join()
    stream = worker.open()
    stream.begin(None)
    stream.delivery()
    return stream


# PushResult


@pytest.mark.parametrize("reason", UNSOUND)
def test_the_ticket_of_a_refused_gradient_stays_valid_where_no_other_was_asked_for(reason: str, tmp_path: Path) -> None:
    settings, value = UNSOUND[reason]
    with served(tmp_path, **settings) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        stream = with_ticket(worker)
        stream.begin(payload(SMALL, value), wants=False)
        refused = stream.result()
        assert (refused.refusal, refused.HasField("iteration")) == (reason, False)
        assert "its ticket stays valid, unless the exchange asked for the next one" in refused.refusal_message
        stream.begin(payload(SMALL, 0.1), wants=False)
        assert stream.result().iteration.number == 1
        stream.finish()


@pytest.mark.parametrize("reason", UNSOUND)
def test_the_ticket_of_a_refused_gradient_is_void_where_the_next_was_asked_for(reason: str, tmp_path: Path) -> None:
    settings, value = UNSOUND[reason]
    with served(tmp_path, **settings) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        stream = with_ticket(worker)
        old = worker.ticket
        stream.begin(payload(SMALL, value))
        assert stream.result().refusal == reason
        assert stream.delivery().ticket != old
        stream.begin(payload(SMALL, 0.1), wants=False, ticket=old)
        assert stream.result().refusal == "TICKET_UNKNOWN"
        stream.begin(payload(SMALL, 0.1), wants=False)
        assert stream.result().iteration.number == 1
        stream.finish()


def test_the_delay_in_a_round_counts_those_that_came_first_and_makes_no_gradient_late(tmp_path: Path) -> None:
    late = {"method": "ssgd", "step_scale": "inverse", "discard_delay": 1, "learning_rate": 0.5, "min_workers": 3}
    with served(tmp_path, **late) as server, connected(server) as stub:
        workers = [WireWorker(stub, name) for name in "abc"]
        for worker in workers:
            worker.join()
        for worker in workers:
            worker.pull()
        results = [worker.push(payload(SMALL, 1.0)) for worker in workers]
    assert [result.delay for result in results] == [0, 1, 2]
    assert [(result.discarded, result.learning_rate) for result in results] == [(False, 0.5)] * 3


# Lengths


@pytest.mark.parametrize("announced", [0, 39, 41, 48, -1, 2**62])
@pytest.mark.parametrize("method", ["PushPull", "PushGradient"])
def test_a_length_that_is_not_the_payloads_is_a_bad_payload(method: str, announced: int, tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        stream = with_ticket(worker)
        before = state_of(server)
        gradient = payload(SMALL, 1.0)
        if method == "PushPull":
            stream.begin(gradient, payload_bytes=announced)
        answer = {"PushPull": stream.receive, "PushGradient": lambda: worker.push(gradient, payload_bytes=announced)}
        with pytest.raises(Refused, match=f"a gradient of {announced} bytes was announced") as refused:
            answer[method]()
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_PAYLOAD")
        assert state_of(server) == before
        stream.drop()


@pytest.mark.parametrize("dtype", [0, 3])
def test_parameters_in_a_dtype_that_is_not_served_are_a_bad_payload(dtype: int, tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        WireWorker(stub, "a").join()
        with pytest.raises(Refused, match=f"payload dtype {dtype} is not served") as refused:
            WireWorker(stub, "reader").pull(ticket=False, dtype=dtype)
        assert refused.value.reason == "BAD_PAYLOAD"


# Fields that are not set


def test_status_has_no_iteration_and_nothing_of_parameters_before_there_is_a_model(tmp_path: Path) -> None:
    with served(tmp_path, learning_rate=0.25) as server, connected(server) as stub:
        before = stub.GetStatus(pb.GetStatusRequest())
        WireWorker(stub, "a").join()
        after = stub.GetStatus(pb.GetStatusRequest())
    assert before.phase == pb.GetStatusResponse.PHASE_WAITING_FOR_MODEL
    there = {field.name for field, _ in before.ListFields()}
    assert there - {"resident_bytes"} == {
        *("phase", "method", "settings", "uptime_seconds"),
        *("update_rule", "step_scale", "scheduler", "version"),
    }
    assert before.settings.learning_rate == after.learning_rate == 0.25
    assert after.HasField("iteration")
    assert after.iteration.epoch
    assert (after.bucket_size, after.model_parameters, len(after.workers)) == (1, 9, 1)


def test_an_action_before_there_is_a_model_has_no_iteration(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        answer = stub.Control(pb.ControlRequest(drain=pb.Drain()))
    assert not answer.HasField("iteration")


def test_a_delivery_without_parameters_says_nothing_of_their_layout(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        WireWorker(stub, "a").join()
        reader = WireWorker(stub, "reader")
        newest = reader.pull(ticket=False)
        assert (newest.dtype, newest.payload_bytes, newest.manifest_digest) == (FLOAT32, 40, SMALL.digest)
        nothing = reader.pull(ticket=False, newer_than=newest.iteration)
    assert {field.name for field, _ in nothing.ListFields()} == {"iteration"}


def test_the_loss_shown_is_that_of_applied_gradients_and_stays_when_the_last_worker_leaves(tmp_path: Path) -> None:
    with served(tmp_path, max_gradient_norm=1.0, over_norm="refuse") as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        stream = with_ticket(worker)
        assert not stub.GetStatus(pb.GetStatusRequest()).HasField("loss")
        stream.begin(payload(SMALL, 0.1), loss=2.0)
        stream.result()
        stream.delivery()
        stream.begin(payload(SMALL, 7.0), loss=9.0, wants=False)
        assert stream.result().refusal == "NORM_TOO_LARGE"
        (seen,) = stub.GetStatus(pb.GetStatusRequest()).workers
        assert seen.last_loss == 2.0
        stream.finish()
        stub.Leave(pb.LeaveRequest(worker="a", incarnation=1))
        left = stub.GetStatus(pb.GetStatusRequest())
    assert (left.loss, len(left.workers)) == (2.0, 0)


# Joining


def test_a_member_is_welcomed_again_when_the_run_is_over_and_a_newcomer_is_not(tmp_path: Path) -> None:
    with served(tmp_path, stop_after_gradients=1) as server, connected(server) as stub:
        member = WireWorker(stub, "a")
        first = member.join()
        member.pull()
        member.push(payload(SMALL, 1.0))
        again = member.join()
        with pytest.raises(Refused) as refused:
            WireWorker(stub, "b").join()
    assert (again.rank, again.data_seed) == (first.rank, first.data_seed)
    assert refused.value.reason == "FINISHED"


@pytest.mark.parametrize("limit", [1, 2, 16])
def test_a_worker_may_have_as_many_slots_as_slots_per_worker_and_no_more(limit: int, tmp_path: Path) -> None:
    with served(tmp_path, slots_per_worker=limit) as server, connected(server) as stub:
        with refusals():
            assert WireWorker(stub, "a").join(slots=1)
            assert WireWorker(stub, "b").join(slots=limit)
        with pytest.raises(Refused, match=f"{limit + 1} slots were asked for, and slots_per_worker is {limit}") as more:
            WireWorker(stub, "c").join(slots=limit + 1)
    assert (more.value.code, more.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST")


def test_slots_per_worker_is_what_the_contract_says_and_a_synchronous_run_serves_one(tmp_path: Path) -> None:
    field = ServerSettings.model_fields["slots_per_worker"]
    assert (field.default, [limit.le for limit in field.metadata if hasattr(limit, "le")]) == (2, [16])
    with served(tmp_path, method="ssgd") as server, connected(server) as stub:
        WireWorker(stub, "a").join(slots=1)
        with pytest.raises(Refused) as two:
            WireWorker(stub, "b").join(slots=2)
    assert two.value.reason == "BAD_REQUEST"


def test_who_sends_no_version_is_told_the_field_and_what_to_send(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        with pytest.raises(Refused) as refused:
            WireWorker(stub, "a").ask_to_join(version=0)
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROTOCOL_VERSION")
        assert (
            refused.value.message
            == "the request has no protocol_version: set it to 1, the version that this server speaks"
        )


# Streams


def test_an_exchange_that_gives_and_wants_nothing_is_refused(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        stream = with_ticket(WireWorker(stub, "a"))
        stream.begin(None, wants=False)
        with pytest.raises(
            Refused, match="received an exchange with neither a gradient nor a request for the next ticket"
        ) as refused:
            stream.receive()
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST")


@pytest.mark.parametrize("method", ["PullParams", "PushGradient"])
def test_another_call_of_the_slot_ends_its_open_stream(method: str, tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        stream = with_ticket(worker)
        if method == "PullParams":
            worker.pull()
        else:
            worker.push(payload(SMALL, 1.0))
        with pytest.raises(Refused) as refused:
            stream.receive()
    assert refused.value.code == grpc.StatusCode.CANCELLED


# Waiting


def test_waiting_for_a_ticket_keeps_no_lease(tmp_path: Path) -> None:
    with served(tmp_path, min_workers=2, failure_timeout_seconds=0.5) as server, connected(server) as stub:
        alone = WireWorker(stub, "a")
        alone.join()
        stream = alone.open()
        stream.begin(None)
        with pytest.raises(Refused, match="its lease ran out: join again") as refused:
            stream.receive()
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_A_MEMBER")
        alone.join()


def test_a_process_that_was_sent_away_may_not_pull_either(tmp_path: Path) -> None:
    with served(tmp_path, max_refused_share=0.01) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        stream = with_ticket(worker)
        stream.begin(payload(SMALL, NAN), wants=False)
        assert stream.result().refusal == "NON_FINITE"
        with pytest.raises(Refused) as refused:
            worker.pull()
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "UNSOUND_WORKER")


# All of them


def test_each_reason_is_listed_beside_the_status_that_it_comes_with() -> None:
    comments = re.sub(r"\n\s*//\s{8,}", " ", PROTO.read_text())  # lists' lines go on further in
    listed = re.findall(r"//   ([A-Z_]{6,}) +(.*)", comments)
    reasons = {reason.value: code_pb2.Code.Value(reason.status) for reason in Reason}
    pairs = {(code, word) for code, text in listed for word in re.findall(r"[A-Z_]{6,}", text) if word in reasons}
    assert {reason for _, reason in pairs} == set(reasons)
    assert [(code, reason) for code, reason in pairs if reasons[reason] != code_pb2.Code.Value(code)] == []
