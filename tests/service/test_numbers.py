"""Every number of every request, at its extremes: refused or harmless, never a failure of the server."""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ormo_protos.manifest import FLOAT32, Manifest
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.core.vectors import all_finite
from ormo_server.service.server import SERVICE, Server
from service.wire import SMALL, Refused, WireWorker, connected, payload, served, tensor_chunks

Path_ = tuple[str | int, ...]
METHODS = {method.name: method for method in SERVICE.methods}
INT32, INT64 = [0, -1, 1, 7, 2**31 - 1, -(2**31)], [0, -1, 1, 7, 2**31, 2**62, 2**63 - 1, -(2**63)]
FLOATS = [0.0, -1.0, 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan]
EXTREMES: dict[int, list[Any]] = {
    FieldDescriptor.TYPE_INT32: INT32,
    FieldDescriptor.TYPE_ENUM: INT32,
    FieldDescriptor.TYPE_INT64: INT64,
    FieldDescriptor.TYPE_FIXED64: [0, 1, 2**63, 2**64 - 1],
    FieldDescriptor.TYPE_DOUBLE: FLOATS,
}
NOT_NUMBERS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_BOOL)
# What is said to be NaN where it is not finite, for an alert.
LOSSES = {"ormo_training_loss", "ormo_test_loss", "ormo_worker_training_loss"}
FAILURES = {"INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED"}
# With one tensor before the buffers: whatever its size is, nothing else contradicts it.
OFFERED = Manifest.laid_out(SMALL.tensors[1:])
GRADIENT = payload(SMALL, 1.0, buffers=True)


def numbers_of(kind: Descriptor) -> set[str]:
    """The full names of all numeric fields that a message may have in it."""
    found = set()
    for field in kind.fields:
        if field.message_type is not None:
            found |= numbers_of(field.message_type)
        elif field.type not in NOT_NUMBERS:
            found.add(field.full_name)
    return found


def paths(message: Message) -> Iterator[tuple[FieldDescriptor, Path_]]:
    """Where the numbers of a message are; of what is repeated, the first."""
    for field in message.DESCRIPTOR.fields:
        value, path = getattr(message, field.name), (field.name, 0) if field.is_repeated else (field.name,)
        if field.message_type is not None:
            inner = value[0] if field.is_repeated and value else value
            if value if field.is_repeated else message.HasField(field.name):
                yield from ((each, path + rest) for each, rest in paths(inner))
        elif field.type not in NOT_NUMBERS:
            yield field, path


def put(message: Any, path: Path_, value: object) -> None:
    for step in path[: -2 if path[-1] == 0 else -1]:
        message = message[step] if isinstance(step, int) else getattr(message, step)
    if path[-1] == 0:
        getattr(message, str(path[-2]))[0] = value
    else:
        setattr(message, str(path[-1]), value)


def gradient_messages(worker: WireWorker, name: str) -> list[Any]:
    header = worker.header(GRADIENT, loss=0.5, compute_seconds=0.25)
    chunks = list(tensor_chunks(GRADIENT))
    if name == "PushGradient":
        push = pb.Push(requester=worker.requester(), gradient=header)
        return [pb.PushGradientRequest(push=push), *(pb.PushGradientRequest(chunk=chunk) for chunk in chunks)]
    wanted = pb.DeliveryRequest(dtype=FLOAT32)
    exchange = pb.Exchange(requester=worker.requester(), gradient=header, next=wanted)
    return [pb.PushPullRequest(exchange=exchange), *(pb.PushPullRequest(chunk=chunk) for chunk in chunks)]


def offer_messages(worker: WireWorker, _: str) -> list[Any]:
    offer = pb.ModelOffer(worker=worker.name, incarnation=worker.incarnation, manifest=OFFERED.to_message())
    chunks = (pb.OfferModelRequest(chunk=chunk) for chunk in tensor_chunks(payload(OFFERED, 0.0, buffers=True)))
    return [pb.OfferModelRequest(offer=offer), *chunks]


def one_message(worker: WireWorker, name: str) -> list[Any]:
    me = {"worker": worker.name, "incarnation": worker.incarnation}
    where = pb.Iteration(epoch=worker.ticket.epoch if worker.ticket else 0)
    made: dict[str, Callable[[], Any]] = {
        "Join": lambda: pb.JoinRequest(protocol_version=1, slots=1, **me),
        "Heartbeat": lambda: pb.HeartbeatRequest(returned=[worker.ticket], **me),
        "Leave": lambda: pb.LeaveRequest(**me),
        "PullParams": lambda: pb.PullParamsRequest(
            requester=worker.requester(), delivery=pb.DeliveryRequest(dtype=FLOAT32), newer_than=where
        ),
        "ReportEvaluation": lambda: pb.ReportEvaluationRequest(
            evaluation=pb.Evaluation(iteration=where, loss=0.5, accuracy=0.5)
        ),
        "DescribeModel": pb.DescribeModelRequest,
        "GetStatus": pb.GetStatusRequest,
        "Control": lambda: pb.ControlRequest(set_learning_rate=pb.SetLearningRate(learning_rate=0.5)),
    }
    return [made[name]()]


GOOD: dict[str, Callable[[WireWorker, str], list[Any]]] = dict.fromkeys(METHODS, one_message) | {
    "PushGradient": gradient_messages,
    "PushPull": gradient_messages,
    "OfferModel": offer_messages,
}


def digest(manifest: pb.Manifest) -> None:
    """Make the digest that of what is said now: it must not be what an offer is refused for."""
    lines = (
        f"{t.name}\t{','.join(map(str, t.shape))}\t{t.dtype}\t{t.role}\t{t.offset}\t{t.alias_of}\n"
        for t in manifest.tensors
    )
    manifest.digest = hashlib.sha256("".join(lines).encode()).digest()


def call(stub: ParameterServerStub, name: str, messages: list[Any]) -> str:
    """What it ends with: a reason, or nothing."""
    method, made = METHODS[name], getattr(stub, name)
    try:
        answer = made(iter(messages) if method.client_streaming else messages[0], timeout=20)
        if method.server_streaming:
            list(answer)
    except grpc.RpcError as error:
        return Refused(error).reason or error.code().name
    return ""


def check_all_is_sound(server: Server, stub: ParameterServerStub) -> None:
    stub.GetStatus(pb.GetStatusRequest())
    for family in text_string_to_metric_families(generate_latest(server.metrics.registry).decode()):
        for sample in family.samples:
            fine = math.isfinite(sample.value) or (family.name in LOSSES and math.isnan(sample.value))
            assert fine, f"{sample.name} {sample.labels} is {sample.value}"
    if server.host.has_model:
        with server.host.engine.inspect() as machine:
            assert all_finite(machine.state.params)
            assert all_finite(machine.state.float_buffers)
            assert math.isfinite(machine.state.learning_rate)


def test_each_number_of_each_request_is_among_those_that_are_tried() -> None:
    worker = WireWorker(None, "a")  # type: ignore[arg-type]
    worker.ticket = pb.Ticket(epoch=1, number=1, iteration=1, bucket=1)
    for name, method in METHODS.items():
        tried = {field.full_name for message in GOOD[name](worker, name) for field, _ in paths(message)}
        assert tried == numbers_of(method.input_type), name


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"OfferModel"}))
def test_no_number_of_a_request_makes_the_server_fail_or_a_figure_infinite(tmp_path: Path, name: str) -> None:
    with served(tmp_path, max_workers=16) as server, connected(server) as stub:
        numbers = itertools.count()

        def newcomer() -> WireWorker:
            worker = WireWorker(stub, f"w{next(numbers)}")
            worker.join()
            worker.pull()
            return worker

        honest = newcomer()
        for position, message in enumerate(GOOD[name](honest, name)):
            for field, path in paths(message):
                for value in EXTREMES[field.type]:
                    worker = newcomer()
                    messages = GOOD[name](worker, name)
                    put(messages[position], path, value)
                    assert call(stub, name, messages) not in FAILURES, (path, value)
                    check_all_is_sound(server, stub)
                    call(stub, "Leave", one_message(worker, "Leave"))
        before = server.host.engine.iteration()[1]
        assert newcomer().push(payload(SMALL, 1.0)).iteration.number == before + 1


def test_no_number_of_an_offer_makes_the_server_fail(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        numbers = itertools.count()

        def fresh() -> tuple[Server, ParameterServerStub, WireWorker]:
            server = stack.enter_context(served(tmp_path / str(next(numbers))))
            stub = stack.enter_context(connected(server))
            worker = WireWorker(stub, "a")
            assert worker.ask_to_join().WhichOneof("answer") == "model_wanted"
            return server, stub, worker

        server, stub, worker = fresh()
        for position, message in enumerate(offer_messages(worker, "OfferModel")):
            for field, path in paths(message):
                for value in EXTREMES[field.type]:
                    messages = offer_messages(worker, "OfferModel")
                    put(messages[position], path, value)
                    digest(messages[0].offer.manifest)
                    worker.ask_to_join()
                    assert call(stub, "OfferModel", messages) not in FAILURES, (path, value)
                    check_all_is_sound(server, stub)
                    if server.host.has_model:  # it was no harm
                        server, stub, worker = fresh()


@pytest.mark.parametrize("value", [2e38, -2e38])
def test_a_model_that_nothing_can_be_added_to_is_not_taken(tmp_path: Path, value: float) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", start=value)
        worker.ask_to_join()
        with pytest.raises(Refused, match=r"the model has numbers above 8.51e\+37") as refused:
            worker.offer()
        assert refused.value.reason == "NON_FINITE"
        assert not server.host.has_model


def test_losses_whose_sum_is_infinite_have_a_mean(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        for name in "ab":
            worker = WireWorker(stub, name)
            worker.join()
            worker.pull()
            worker.push(payload(SMALL, 1.0), loss=1.5e308)
        assert stub.GetStatus(pb.GetStatusRequest()).loss == 1.5e308
        check_all_is_sound(server, stub)


@pytest.mark.parametrize("seconds", [1.1e9, 1e308])
def test_seconds_that_no_gradient_takes_are_refused(tmp_path: Path, seconds: float) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        with pytest.raises(Refused, match=r"expected 0 to 2147483647 samples and 0 to 1e\+09 seconds") as refused:
            worker.push(payload(SMALL, 1.0), compute_seconds=seconds)
        assert refused.value.reason == "BAD_REQUEST"
        check_all_is_sound(server, stub)


@pytest.mark.parametrize("method", ["ormo", "asgd", "asgdm", "shifted", "smega2", "dc-asgd", "ormo-vanilla", "ssgdm"])
@pytest.mark.parametrize("journal", [False, True])
def test_gradients_that_would_make_the_model_infinite_are_refused_and_training_goes_on(
    tmp_path: Path, method: str, journal: bool
) -> None:
    with served(tmp_path, method=method, journal=journal) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        for _ in range(5):
            with pytest.raises(
                Refused, match=r"the parameters might become infinite.* its ticket stays valid"
            ) as refused:
                worker.push(payload(SMALL, 3e38))
            assert refused.value.reason == "NORM_TOO_LARGE"
        assert worker.push(payload(SMALL, 1.0)).iteration.number == 1
        status = stub.GetStatus(pb.GetStatusRequest())
        assert dict(status.refusals) == {"NORM_TOO_LARGE": 5}
        worker.pull()
        assert torch.equal(worker.params, torch.full_like(worker.params, worker.params[0].item()))
        assert 1.0 <= -worker.params[0].item() <= 2.0
        assert server.host.checkpoint()
    with served(tmp_path, method=method, journal=journal) as server:
        assert server.host.engine.iteration()[1] == 1
