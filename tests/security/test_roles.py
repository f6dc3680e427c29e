"""Every method, by every role, through the real socket; and every message that names a worker."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from ormo_protos.manifest import FLOAT32
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_runtime.channels import Dialer
from ormo_server.security import ALLOWED, SERVICE, Role
from ormo_server.service.server import Server
from security.authority import Authority, dialled, guarded
from service.wire import SMALL, Refused, WireWorker, connected, payload, refusals, served, state_of, tensor_chunks

WHO = {Role.WORKER: "gpu-1", Role.READER: "evaluator", Role.ADMIN: "operator"}
WORKERS, READERS, ADMINS = {Role.WORKER}, set(Role), {Role.ADMIN}
# As docs/security.md and the contract say it; kept apart from the table that the server goes by.
MAY = {
    "Join": WORKERS,
    "OfferModel": WORKERS,
    "DescribeModel": READERS,
    "PullParams": READERS,
    "PushGradient": WORKERS,
    "PushPull": WORKERS,
    "Heartbeat": WORKERS,
    "Leave": WORKERS,
    "ReportEvaluation": READERS,
    "GetStatus": READERS,
    "Control": ADMINS,
}


def test_every_method_that_a_server_can_have_is_for_somebody() -> None:
    services = [
        SERVICE,
        health_pb2.DESCRIPTOR.services_by_name["Health"],
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
    ]
    served_methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert served_methods <= set(ALLOWED)
    assert set(ALLOWED) - served_methods <= {"/grpc.health.v1.Health/List"}, "which older releases do not have"
    assert set(MAY) == {method.name for method in SERVICE.methods}


@pytest.fixture
def server(tmp_path: Path, authority: Authority) -> Iterator[Server]:
    """With a model, and a worker that holds a ticket."""
    with guarded(tmp_path, authority) as made, dialled(made, authority.credentials("gpu-1")) as stub:
        worker = WireWorker(stub, "gpu-1")
        worker.join()
        worker.pull()
        yield made


def called(stub: ParameterServerStub, name: str) -> str:
    """The status of a call with an empty message: whoever may call it is told what it lacks, or served."""
    method = SERVICE.methods_by_name[name]
    empty = getattr(pb, method.input_type.name)()
    try:
        with refusals():
            answer = getattr(stub, name)(iter([empty]) if method.client_streaming else empty, timeout=5)
            for _ in answer if method.server_streaming else ():
                pass
    except Refused as refused:
        return refused.reason
    return "OK"


@pytest.mark.parametrize("role", list(Role))
def test_a_role_may_call_what_the_contract_says_and_nothing_else(
    role: Role, server: Server, authority: Authority
) -> None:
    before = state_of(server)
    with dialled(server, authority.credentials(WHO[role])) as stub:
        for name, roles in MAY.items():
            came = called(stub, name)
            assert (came == "PERMISSION_DENIED") == (role not in roles), (name, came)
            assert came != "UNAUTHENTICATED"
    assert state_of(server) == before


def test_who_is_not_on_the_list_may_call_nothing(server: Server, authority: Authority) -> None:
    before = state_of(server)
    with dialled(server, authority.credentials("stranger")) as stub:
        assert {called(stub, name) for name in MAY} == {"UNAUTHENTICATED"}
    assert state_of(server) == before
    counted = server.metrics.traffic.refused()
    assert counted["UNAUTHENTICATED"] == len(MAY)


def test_health_is_for_all_who_are_known(server: Server, authority: Authority) -> None:
    check = health_pb2.HealthCheckRequest()
    for name, code in {"evaluator": None, "stranger": grpc.StatusCode.UNAUTHENTICATED}.items():
        with Dialer(server.address, authority.credentials(name)).dial() as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            if code is None:
                assert stub.Check(check, timeout=5).status == health_pb2.HealthCheckResponse.SERVING
                continue
            with pytest.raises(grpc.RpcError) as refused:
                stub.Check(check, timeout=5)
            assert refused.value.code() == code


def test_no_offer_can_name_a_worker_that_is_not_the_callers(tmp_path: Path, authority: Authority) -> None:
    with guarded(tmp_path, authority) as server, dialled(server, authority.credentials("gpu-1")) as asked:
        assert WireWorker(asked, "gpu-1").ask_to_join().WhichOneof("answer") == "model_wanted"
        with dialled(server, authority.credentials("gpu-2")) as thief:
            offer = in_the_name_of("gpu-1", 1, None, thief)["OfferModel"]
            with pytest.raises(Refused, match="'gpu-2' may not use the worker id 'gpu-1', only") as refused, refusals():
                offer()
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
        assert not server.host.has_model


def test_a_denial_is_logged_with_who_and_why(
    server: Server, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), dialled(server, authority.credentials("evaluator")) as stub:
        called(stub, "Control")
    (record,) = [record for record in caplog.records if record.name == "ormo_server.denied"]
    assert record.__dict__["reason"] == "PERMISSION_DENIED"
    assert record.__dict__["peer"].startswith("ipv4:127.0.0.1:")
    assert "'evaluator' has the role reader, but /ormo.v1.ParameterServer/Control is for admin" in record.message


# The identity binds the worker id


def in_the_name_of(
    worker: str, incarnation: int, ticket: pb.Ticket | None, stub: ParameterServerStub
) -> dict[str, Any]:
    """A call of each method whose messages name a worker, in somebody's name, with all that this worker knows."""
    one = WireWorker(stub, worker, incarnation=incarnation)
    one.ticket, one.request = ticket, 1
    gradient = payload(SMALL, 1.0)

    def push_pull() -> None:
        stream = one.open()
        try:
            stream.begin(gradient)
            stream.receive()
        finally:
            stream.drop()

    return {
        "Join": one.ask_to_join,
        "OfferModel": lambda: one.offer(tensor_chunks(payload(SMALL, 0.0, buffers=True))),
        "PullParams": one.pull,
        "PushGradient": lambda: one.push(gradient),
        "PushPull": push_pull,
        "Heartbeat": lambda: stub.Heartbeat(
            pb.HeartbeatRequest(worker=worker, incarnation=incarnation, returned=[ticket] if ticket else [])
        ),
        "Leave": lambda: stub.Leave(pb.LeaveRequest(worker=worker, incarnation=incarnation)),
    }


def names_a_worker(message: Any, depth: int = 0) -> bool:
    """Whether a message has a worker's id somewhere."""
    fields = message.fields_by_name
    return "worker" in fields or any(
        field.message_type is not None and depth < 4 and names_a_worker(field.message_type, depth + 1)
        for field in message.fields
    )


def test_no_message_can_name_a_worker_that_is_not_the_callers(server: Server, authority: Authority) -> None:
    """`gpu-2` is a sound worker, and has stolen `gpu-1`'s incarnation and ticket."""
    with server.host.engine.inspect() as machine:
        (ticket,) = machine.state.tickets.values()
    stolen = pb.Ticket(epoch=ticket.epoch, number=ticket.number)
    before = state_of(server)
    with dialled(server, authority.credentials("gpu-2")) as thief:
        calls = in_the_name_of("gpu-1", 1, stolen, thief)
        naming = {method.name for method in SERVICE.methods if names_a_worker(method.input_type)}
        assert set(calls) == naming
        with pytest.raises(Refused, match="MODEL_EXISTS"), refusals():  # whoever offers one: it is not even read
            calls.pop("OfferModel")()
        for name, call in calls.items():
            with pytest.raises(Refused, match="'gpu-2' may not use the worker id 'gpu-1', only") as refused, refusals():
                call()
            assert (refused.value.code, refused.value.reason) == (
                grpc.StatusCode.PERMISSION_DENIED,
                "PERMISSION_DENIED",
            ), name
        assert state_of(server) == before
        own = WireWorker(thief, "gpu-2")
        own.join()
        own.pull()
        own.ticket = stolen
        with pytest.raises(Refused, match="is not in flight") as used:
            own.push(payload(SMALL, 1.0))
        assert used.value.reason == "TICKET_UNKNOWN"
    with server.host.engine.inspect() as machine:
        assert ticket.key in machine.state.tickets, "its owner still has it"
        assert machine.state.iteration == 0


def test_a_star_in_a_certificate_is_no_pattern(tmp_path: Path, authority: Authority) -> None:
    """A wildcard certificate is on the list like any of its domain; that makes it the owner of no other's id."""
    access = '[[allow]]\nrole = "worker"\ncertificate = "*.example"'
    with guarded(tmp_path, authority, access) as server:
        with dialled(server, authority.credentials("gpu-1.example")) as stub:
            WireWorker(stub, "gpu-1.example").join()
        with (
            dialled(server, authority.credentials("*.example")) as stub,
            pytest.raises(Refused, match=r"'\*\.example' may not use the worker id 'gpu-1\.example'"),
        ):
            WireWorker(stub, "gpu-1.example", incarnation=2).join()


def test_a_stream_can_not_change_whom_it_serves(server: Server, authority: Authority) -> None:
    with dialled(server, authority.credentials("pool.example")) as stub:
        one, other = WireWorker(stub, "pool-1"), WireWorker(stub, "gpu-1")
        one.join()
        stream = one.open()
        stream.begin(None)
        stream.delivery()
        before = state_of(server)
        stream.send(other.exchange(None))
        with pytest.raises(Refused, match=r"'pool\.example' may not use the worker id 'gpu-1', only 'pool-\*'"):
            stream.receive()
        assert state_of(server)[:2] == before[:2]


def test_a_reader_gets_parameters_and_no_ticket(server: Server, authority: Authority) -> None:
    with dialled(server, authority.credentials("evaluator")) as stub:
        reader = WireWorker(stub, "evaluator")
        assert reader.pull(ticket=False).payload_bytes > 0
        before = state_of(server)
        with pytest.raises(Refused, match="'evaluator' does not have the role worker, but called as worker") as refused:
            reader.pull()
        assert refused.value.code == grpc.StatusCode.PERMISSION_DENIED
        assert state_of(server) == before


def test_without_a_list_anyone_on_this_machine_may_do_all(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        WireWorker(stub, "w").join()
        assert "PERMISSION_DENIED" not in {called(stub, name) for name in MAY}
        delivery = pb.DeliveryRequest(dtype=FLOAT32)
        assert next(stub.PullParams(pb.PullParamsRequest(delivery=delivery))).delivery.payload_bytes


def test_without_a_list_others_may_do_all_but_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ormo_server.security.host_of", lambda peer: "10.0.0.7")
    with served(tmp_path) as server, connected(server) as stub:
        WireWorker(stub, "w").join()
        denied = {name for name in MAY if called(stub, name) == "PERMISSION_DENIED"}
        assert denied == {"Control"}


def test_a_refusal_is_logged_with_the_callers_name_also_where_it_is_an_answer_on_a_stream(
    server: Server, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with dialled(server, authority.credentials("gpu-2")) as stub, caplog.at_level(logging.INFO):
        worker = WireWorker(stub, "gpu-2")
        with pytest.raises(Refused):
            worker.pull()
        worker.join()
        stream = worker.open()
        worker.ticket = pb.Ticket(epoch=1, number=1)
        stream.begin(payload(SMALL, 1.0))
        assert stream.result().refusal == "TICKET_UNKNOWN"
    told = {record.__dict__.get("reason"): record for record in caplog.records if record.name == "ormo_server.refused"}
    assert {told[reason].__dict__["caller"] for reason in ("NOT_A_MEMBER", "TICKET_UNKNOWN")} == {"gpu-2"}


def test_nobody_can_report_an_evaluation_of_what_has_not_been_trained_yet(server: Server, authority: Authority) -> None:
    epoch = server.host.engine.iteration()[0]
    with dialled(server, authority.credentials("evaluator")) as stub:
        report = pb.Evaluation(iteration=pb.Iteration(epoch=epoch, number=2**62), loss=0.0, accuracy=0.5)
        with (
            pytest.raises(Refused, match="and the run is at 0: report an iteration that was pulled") as refused,
            refusals(),
        ):
            stub.ReportEvaluation(pb.ReportEvaluationRequest(evaluation=report))
        assert refused.value.reason == "BAD_REQUEST"
        assert not stub.GetStatus(pb.GetStatusRequest()).HasField("evaluation")
