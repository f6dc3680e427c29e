"""What a server refuses, through the real socket: status, reason, one clear sentence, and an untouched state."""

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from ormo_protos.manifest import BFLOAT16, FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.service.server import Server
from service.wire import (
    LARGE,
    SMALL,
    Refused,
    WireWorker,
    connected,
    eventually,
    kept_files,
    payload,
    refusals,
    served,
    state_of,
    tensor_chunks,
)

Serving = tuple[Server, ParameterServerStub, WireWorker]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    """A server with one worker that holds a ticket."""
    with served(tmp_path, max_workers=2) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        yield server, stub, worker


FLOATS = pb.DeliveryRequest(dtype=FLOAT32)


def chunk(offset: int, size: int) -> pb.TensorChunk:
    return pb.TensorChunk(offset=offset, data=bytes(size))


BAD_CHUNKS = {
    "ended after 0 of 40 bytes": [],
    "offset 8 where offset 0": [chunk(8, 32)],
    "offset 0 where offset 16": [chunk(0, 16), chunk(0, 16)],
    "1 to 24 bytes": [chunk(0, 16), chunk(16, 32)],
    "chunk of 0 bytes": [chunk(0, 0)],
    "ended after 16 of 40 bytes": [chunk(0, 16)],
}


@pytest.mark.parametrize("sentence", BAD_CHUNKS)
def test_payload_of_wrong_length_or_order_is_refused(serving: Serving, sentence: str) -> None:
    server, _, worker = serving
    before = state_of(server)
    push = pb.Push(requester=worker.requester(), gradient=worker.header(payload(SMALL, 1.0)))
    with pytest.raises(Refused, match=sentence) as refused:
        worker.push_messages(push, iter(BAD_CHUNKS[sentence]))
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_PAYLOAD")
    assert state_of(server) == before
    assert worker.push(payload(SMALL, 1.0)).iteration.number == 1


BAD_HEADERS = [
    ({"manifest_digest": b"x" * 32}, "MANIFEST_DIGEST", "ask DescribeModel"),
    ({"manifest_digest": b""}, "MANIFEST_DIGEST", "digest none"),
    ({"dtype": 3}, "BAD_PAYLOAD", "DTYPE_FLOAT32"),
    ({"dtype": 0}, "BAD_PAYLOAD", "dtype 0"),
    ({"dtype": BFLOAT16}, "BAD_PAYLOAD", "makes 24 bytes"),
    ({"payload_bytes": 41}, "BAD_PAYLOAD", "41 bytes was announced"),
    ({"samples": -1}, "BAD_REQUEST", "samples -1"),
    ({"compute_seconds": float("nan")}, "BAD_REQUEST", "compute seconds nan"),
]


@pytest.mark.parametrize(("change", "reason", "sentence"), BAD_HEADERS)
def test_gradient_with_a_wrong_header_is_refused(
    serving: Serving, change: dict[str, object], reason: str, sentence: str
) -> None:
    server, _, worker = serving
    before = state_of(server)
    with pytest.raises(Refused, match=sentence) as refused:
        worker.push(payload(SMALL, 1.0), **change)
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert state_of(server) == before
    counted = serving[1].GetStatus(pb.GetStatusRequest()).refusals
    assert counted == {reason: 1}


# Each prepares what it needs and returns the call that is refused.
Attempt = Callable[[], object]


def _stranger(worker: WireWorker) -> Attempt:
    return WireWorker(worker.stub, "stranger").pull


def _old_incarnation(worker: WireWorker) -> Attempt:
    WireWorker(worker.stub, "a", incarnation=2).join()
    return worker.pull


def _old_request(worker: WireWorker) -> Attempt:
    worker.request = 5
    worker.pull()
    worker.request = 2
    return lambda: worker.push(payload(SMALL, 1.0))


def _unknown_ticket(worker: WireWorker) -> Attempt:
    return lambda: worker.push(payload(SMALL, 1.0), ticket=pb.Ticket(epoch=1, number=9))


def _missing_slot(worker: WireWorker) -> Attempt:
    request = pb.PullParamsRequest(requester=worker.requester(slot=1), delivery=FLOATS)
    return lambda: next(worker.stub.PullParams(request))


def _malformed_id(worker: WireWorker) -> Attempt:
    return WireWorker(worker.stub, "no spaces").join


def _other_version(worker: WireWorker) -> Attempt:
    return lambda: worker.ask_to_join(version=2)


def _too_many_slots(worker: WireWorker) -> Attempt:
    return lambda: WireWorker(worker.stub, "b").join(slots=3)


def _other_slots(worker: WireWorker) -> Attempt:
    return lambda: worker.join(slots=2)


def _no_slots(worker: WireWorker) -> Attempt:
    return lambda: WireWorker(worker.stub, "b").join(slots=0)


def _third_worker(worker: WireWorker) -> Attempt:
    WireWorker(worker.stub, "b").join()
    return WireWorker(worker.stub, "c").join


def _second_model(worker: WireWorker) -> Attempt:
    return worker.offer


def _heartbeat_of_a_stranger(worker: WireWorker) -> Attempt:
    return lambda: worker.stub.Heartbeat(pb.HeartbeatRequest(worker="stranger", incarnation=1))


def _chunk_without_exchange(worker: WireWorker) -> Attempt:
    stream = worker.open()
    stream.send(pb.PushPullRequest(chunk=chunk(0, 8)))
    return stream.receive


def _stream_of_two_slots(worker: WireWorker) -> Attempt:
    other = WireWorker(worker.stub, "b")
    other.join()
    stream = worker.open()
    stream.begin(None)
    stream.delivery()

    def go_on_as_another() -> None:
        stream.send(other.exchange(None))
        stream.receive()

    return go_on_as_another


PRECONDITION, ARGUMENT = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT
REFUSED = [
    (_stranger, PRECONDITION, "NOT_A_MEMBER", "join first"),
    (_old_incarnation, PRECONDITION, "REPLACED", "different worker ids"),
    (_old_request, PRECONDITION, "STALE_REQUEST", "request numbers only rise"),
    (_unknown_ticket, PRECONDITION, "TICKET_UNKNOWN", "pull again"),
    (_missing_slot, ARGUMENT, "BAD_REQUEST", "joined with 1 slots"),
    (_malformed_id, ARGUMENT, "BAD_REQUEST", "1 to 128 of the characters"),
    (_other_version, PRECONDITION, "PROTOCOL_VERSION", "same version"),
    (_too_many_slots, ARGUMENT, "BAD_REQUEST", "slots_per_worker is 2"),
    (_other_slots, ARGUMENT, "BAD_REQUEST", "joined with 1 slots and now asks for 2"),
    (_no_slots, ARGUMENT, "BAD_REQUEST", "serves 1 to"),
    (_third_worker, grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WORKERS", "max_workers is 2"),
    (_second_model, grpc.StatusCode.ALREADY_EXISTS, "MODEL_EXISTS", "join again"),
    (_heartbeat_of_a_stranger, PRECONDITION, "NOT_A_MEMBER", "join first"),
    (_chunk_without_exchange, ARGUMENT, "BAD_REQUEST", "received a message with 'chunk' where 'exchange'"),
    (_stream_of_two_slots, ARGUMENT, "BAD_REQUEST", "open a stream for each slot"),
]


@pytest.mark.parametrize(("prepared", "code", "reason", "sentence"), REFUSED)
def test_wrong_caller_is_refused_with_a_reason_and_changes_nothing(
    serving: Serving, prepared: Callable[[WireWorker], Attempt], code: grpc.StatusCode, reason: str, sentence: str
) -> None:
    server, _, worker = serving
    attempt = prepared(worker)
    before = state_of(server)
    with pytest.raises(Refused) as refused, refusals():
        attempt()
    assert (refused.value.code, refused.value.reason) == (code, reason)
    assert sentence in refused.value.message
    assert state_of(server) == before


def _exchange(worker: WireWorker) -> object:
    stream = worker.open()
    stream.begin(None)
    return stream.receive()


@pytest.mark.parametrize(
    "attempt",
    [
        _exchange,
        lambda worker: worker.pull(),
        lambda worker: worker.stub.Heartbeat(pb.HeartbeatRequest(worker="a", incarnation=1)),
    ],
    ids=["PushPull", "PullParams", "Heartbeat"],
)
def test_a_worker_of_a_server_that_has_lost_its_model_is_told_to_join(
    tmp_path: Path, attempt: Callable[[WireWorker], object]
) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        with pytest.raises(Refused, match="no model yet") as refused, refusals():
            attempt(worker)
        assert (refused.value.code, refused.value.reason) == (PRECONDITION, "NOT_A_MEMBER")
        worker.join()
        worker.pull()


def test_calls_before_there_is_a_model_are_told_to_come_back(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        with pytest.raises(Refused, match="no model yet") as refused:
            WireWorker(stub, "reader").pull(ticket=False)
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
        assert refused.value.retry_seconds is not None
        assert stub.GetStatus(pb.GetStatusRequest()).phase == pb.GetStatusResponse.PHASE_WAITING_FOR_MODEL


def test_one_worker_at_a_time_is_asked_for_the_model(tmp_path: Path) -> None:
    with served(tmp_path, failure_timeout_seconds=0.3) as server, connected(server) as stub:
        a, b = WireWorker(stub, "a"), WireWorker(stub, "b")
        assert a.ask_to_join().WhichOneof("answer") == "model_wanted"
        assert b.ask_to_join().wait.retry_seconds > 0
        with pytest.raises(Refused) as refused:
            b.offer()
        assert refused.value.reason == "NOT_WANTED"
        eventually(lambda: b.ask_to_join().WhichOneof("answer") == "model_wanted")
        with pytest.raises(Refused):
            a.offer()
        b.offer()
        assert a.ask_to_join().WhichOneof("answer") == "welcome"
        assert server.host.has_model


def test_offer_that_stops_in_the_middle_makes_room_for_the_next(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        a, b = WireWorker(stub, "a", LARGE), WireWorker(stub, "b", LARGE)
        a.ask_to_join()
        with pytest.raises(Refused, match="send it whole"):
            a.offer(iter([next(tensor_chunks(payload(LARGE, 0.0)))]))
        assert not server.host.has_model
        b.join()
        assert server.host.has_model


def test_offered_model_must_be_finite_and_fit(tmp_path: Path) -> None:
    with served(tmp_path / "a") as server, connected(server) as stub:
        worker = WireWorker(stub, "a", start=float("nan"))
        with pytest.raises(Refused, match="NaN") as refused:
            worker.join()
        assert refused.value.reason == "NON_FINITE"
        assert not server.host.has_model
    with served(tmp_path / "b", memory_limit_bytes=1_000_000) as server, connected(server) as stub:
        with pytest.raises(Refused, match="memory_limit_bytes") as refused:
            WireWorker(stub, "a", LARGE).join()
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MEMORY_LIMIT")
        assert not server.host.has_model
        assert kept_files(tmp_path / "b") == []


def test_manifest_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.ask_to_join()
        manifest = SMALL.to_message()
        manifest.tensors[0].shape[0] = 7
        offer = pb.ModelOffer(worker="a", incarnation=1, manifest=manifest)
        with pytest.raises(grpc.RpcError) as raised:
            stub.OfferModel(iter([pb.OfferModelRequest(offer=offer)]))
        assert Refused(raised.value).reason == "BAD_MANIFEST"
        assert not server.host.has_model


def test_streams_beyond_the_threads_are_refused_at_once_and_others_are_still_served(tmp_path: Path) -> None:
    with served(tmp_path, max_workers=2, slots_per_worker=1) as server, connected(server) as stub:
        worker, other = WireWorker(stub, "a"), WireWorker(stub, "b")
        silent = []
        for each in (worker, other):
            each.join()
            silent.append(each.open())
            silent[-1].begin(None)
            silent[-1].delivery()
        silent += [worker.open() for _ in range(2)]
        eventually(lambda: len(server.streams) == 4)
        with pytest.raises(Refused, match="slots_per_worker") as refused:
            worker.pull()
        assert (refused.value.code, refused.value.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "TOO_MANY_STREAMS",
        )
        assert refused.value.retry_seconds is not None
        WireWorker(stub, "reader").pull(ticket=False)
        for stream in silent:
            stream.drop()
        eventually(lambda: len(server.streams) == 0)
        worker.pull()


@pytest.mark.parametrize("reason", ["MODEL_EXISTS", "NOT_WANTED"])
def test_a_manifest_is_read_only_if_it_is_this_worker_s_model_that_is_waited_for(reason: str, tmp_path: Path) -> None:
    """A large one takes a second, and anybody may send it. This one would be refused as BAD_MANIFEST."""
    with served(tmp_path) as server, connected(server) as stub:
        asked = WireWorker(stub, "asked")
        asked.ask_to_join()
        if reason == "MODEL_EXISTS":
            asked.offer()
        offer = pb.ModelOffer(worker="other", incarnation=1, manifest=pb.Manifest(digest=b"none"))
        with pytest.raises(Refused) as refused, refusals():
            stub.OfferModel(iter([pb.OfferModelRequest(offer=offer)]))
        assert refused.value.reason == reason
        asked.join()
        assert server.host.has_model


ODD_NAMES = ["two\x1b[31mlines", "bidi\u202e", "zero\u200bwidth", "bell\x07", "__metadata__", "nul\x00", "line\u2028"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_model_with_a_name_that_a_file_or_a_terminal_can_not_hold_is_refused(name: str, tmp_path: Path) -> None:
    odd = Manifest.laid_out([TensorSpec(name, (3,), FLOAT32, PARAMETER)])
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", odd)
        worker.ask_to_join()
        with pytest.raises(Refused) as refused:
            worker.offer()
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_MANIFEST")
        assert f"tensor name {name!r}" in refused.value.message
        assert refused.value.message.isprintable()
        assert not server.host.has_model
        assert kept_files(tmp_path) == []
        WireWorker(stub, "a").join()
        assert server.host.has_model


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if name != "__metadata__"])
def test_a_run_that_has_begun_with_such_a_name_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions took them, and their files hold all but the one."""
    odd = Manifest.laid_out([TensorSpec(name, (3,), FLOAT32, PARAMETER)])
    with monkeypatch.context() as patched:
        patched.setattr(Manifest, "check_names", lambda _: None)
        with served(tmp_path) as server, connected(server) as stub:
            WireWorker(stub, "a", odd, start=2.0).join()
            assert server.drain()
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", odd)
        assert worker.join().manifest.tensors[0].name == name
        worker.pull()
        assert worker.params.tolist() == [2.0] * 3
        assert worker.push(payload(odd, 1.0)).iteration.number == 1


def test_a_sentence_that_quotes_much_is_cut(tmp_path: Path) -> None:
    """It travels in headers, of which clients take so much and no more."""
    with served(tmp_path) as server, connected(server) as stub:
        WireWorker(stub, "a").ask_to_join()
        spec = pb.TensorSpec(name="\x01" * 500, alias_of="\x02" * 500, dtype=FLOAT32, role=PARAMETER)
        offer = pb.ModelOffer(worker="a", incarnation=1, manifest=pb.Manifest(tensors=[spec]))
        with pytest.raises(Refused) as refused, refusals():
            stub.OfferModel(iter([pb.OfferModelRequest(offer=offer)]))
        assert refused.value.reason == "BAD_MANIFEST"
        assert refused.value.message.endswith(r"\x01…")
        assert len(refused.value.message) == 1001
