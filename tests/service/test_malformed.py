"""Bytes that are no message, and messages that are out of place: refused over a real socket, the state untouched."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ormo_protos import parsing
from ormo_protos.limits import LONGEST_LISTS, MAX_CHUNK_BYTES, SMALL_MESSAGE_BYTES
from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Payload
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.service.server import SERVICE, Server
from protos.test_limits import lists, with_elements
from service.wire import SMALL, Refused, WireWorker, payload, refusals, served, state_of

METHODS = {method.name: method for method in SERVICE.methods}
STREAMING = [name for name, method in METHODS.items() if method.client_streaming]
OTHERS = [name for name in METHODS if name != "OfferModel"]  # which nobody reads once there is a model
GRADIENT = bytes(payload(SMALL, 1.0).memory)  # 40 bytes
MALFORMED = {
    "cut": b"\x0a\x05a",
    "a group that is not closed": b"\x4b",
    "a length of 2^63": b"\x0a" + b"\x80" * 9 + b"\x01",
    "a tag without end": b"\xff" * 20,
}


@dataclass
class Raw:
    """A server with one worker that holds a ticket, spoken to in bytes."""

    server: Server
    channel: grpc.Channel
    worker: WireWorker

    def call(self, name: str, requests: Iterable[bytes]) -> list[bytes]:
        """All answers of a method to such bytes."""
        method = METHODS[name]
        words = ("unary", "stream")
        kind = f"{words[method.client_streaming]}_{words[method.server_streaming]}"
        made = getattr(self.channel, kind)(f"/{SERVICE.full_name}/{name}")
        sent = list(requests)
        answer = made(iter(sent) if method.client_streaming else sent[0], timeout=20)
        return list(answer) if method.server_streaming else [answer]

    def refused(self, name: str, requests: Iterable[bytes], reason: str = "BAD_REQUEST") -> str:
        """Check that the call ends so, and changes nothing; returns the sentence."""
        before = state_of(self.server)
        with pytest.raises(Refused) as refused, refusals():
            self.call(name, requests)
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
        assert state_of(self.server) == before
        return refused.value.message

    def goes_on(self) -> None:
        """Check that the worker's ticket still is good."""
        before = state_of(self.server)[0]
        assert self.worker.push(payload(self.worker.manifest, 1.0)).iteration.number == before + 1


@contextlib.contextmanager
def serving(folder: Path, model: Manifest) -> Iterator[Raw]:
    with served(folder) as server, grpc.insecure_channel(server.address) as channel:
        worker = WireWorker(ParameterServerStub(channel), "a", model)
        worker.join()
        worker.pull()
        yield Raw(server, channel, worker)


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[Raw]:
    with serving(tmp_path, SMALL) as raw:
        yield raw


def header(worker: WireWorker, gradient: Payload, name: str) -> bytes:
    """The first message of a method's stream, which announces this gradient, or a model of its size."""
    push = pb.Push(requester=worker.requester(), gradient=worker.header(gradient))
    offer = pb.ModelOffer(worker=worker.name, incarnation=worker.incarnation, manifest=worker.manifest.to_message())
    made: dict[str, Any] = {
        "PushGradient": pb.PushGradientRequest(push=push),
        "OfferModel": pb.OfferModelRequest(offer=offer),
    }
    return bytes((made[name] if name in made else worker.exchange(gradient)).SerializeToString())


def chunk(offset: int, data: bytes) -> bytes:
    """In each method's messages the chunk has the number 2."""
    return pb.PushPullRequest(chunk=pb.TensorChunk(offset=offset, data=data)).SerializeToString()


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_message_is_refused_by_each_method(raw: Raw, name: str, case: str) -> None:
    sentence = raw.refused(name, [MALFORMED[case]])
    assert sentence.startswith(
        f"received {len(MALFORMED[case])} bytes that are not a {METHODS[name].input_type.name}: "
    )
    raw.goes_on()


def refused_before_a_model(folder: Path, name: str, request: bytes, reason: str = "BAD_REQUEST") -> str:
    """Check that the call ends so, and that the run can begin afterwards; returns the sentence."""
    with served(folder) as server, grpc.insecure_channel(server.address) as channel:
        worker = WireWorker(ParameterServerStub(channel), "a")
        with pytest.raises(Refused) as refused, refusals():
            Raw(server, channel, worker).call(name, [request])
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
        assert not server.host.has_model
        worker.join()
    return refused.value.message


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_message_is_refused_before_there_is_a_model(tmp_path: Path, name: str) -> None:
    sentence = refused_before_a_model(tmp_path, name, MALFORMED["cut"])
    assert sentence.startswith(f"received 3 bytes that are not a {METHODS[name].input_type.name}: ")


def test_a_model_that_is_offered_where_there_is_one_is_refused_before_it_is_read(
    raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parsing, "_count", None)  # whoever reads its lists fails
    manifest = raw.worker.manifest.to_message()
    offer = pb.OfferModelRequest(offer=pb.ModelOffer(worker="b", manifest=manifest))
    with pytest.raises(Refused, match="has a model already"), refusals():
        raw.call("OfferModel", [offer.SerializeToString()])


def test_a_message_that_takes_long_to_read_keeps_nobody_from_being_served(
    raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC has one thread for all calls: what is sent is read in the call's own."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(*_: Any) -> None:
        begun.set()
        assert go_on.wait(20)

    monkeypatch.setattr(parsing, "_beyond", slow)
    with futures.ThreadPoolExecutor(1) as other:
        refused = other.submit(raw.refused, "PushGradient", [bytes(2 * SMALL_MESSAGE_BYTES)])
        assert begun.wait(20)
        assert raw.call("GetStatus", [b""])
        go_on.set()
        assert "not a PushGradientRequest" in refused.result()


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("chunks", [0, 1])
@pytest.mark.parametrize("name", ["PushPull", "PushGradient"])
def test_what_is_no_message_is_refused_in_the_middle_of_a_gradient(raw: Raw, name: str, chunks: int, case: str) -> None:
    gradient = payload(SMALL, 1.0)
    begun = [header(raw.worker, gradient, name), chunk(0, bytes(gradient.memory[:16]))][: 1 + chunks]
    raw.refused(name, [*begun, MALFORMED[case]])
    raw.goes_on()


@pytest.mark.parametrize("chunks", [0, 1])
def test_what_is_no_message_is_refused_in_the_middle_of_a_model(tmp_path: Path, chunks: int) -> None:
    with served(tmp_path) as server, grpc.insecure_channel(server.address) as channel:
        worker = WireWorker(ParameterServerStub(channel), "a")
        assert worker.ask_to_join().WhichOneof("answer") == "model_wanted"
        begun = [header(worker, payload(SMALL, 1.0), "OfferModel"), chunk(0, bytes(16))][: 1 + chunks]
        with pytest.raises(Refused) as refused, refusals():
            Raw(server, channel, worker).call("OfferModel", [*begun, MALFORMED["cut"]])
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST")
        assert not server.host.has_model
        worker.join()


def test_what_is_no_message_is_refused_after_a_whole_exchange_which_stands(raw: Raw) -> None:
    whole = [header(raw.worker, payload(SMALL, 1.0), "PushPull"), chunk(0, GRADIENT)]
    with pytest.raises(Refused) as refused, refusals():
        raw.call("PushPull", [*whole, MALFORMED["cut"]])
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST")
    assert state_of(raw.server)[0] == 1


# Well formed, and with more elements than anybody needs.

BEYOND = [(name, path) for name in OTHERS for path in lists(METHODS[name].input_type)]
OF_A_MODEL = list(lists(METHODS["OfferModel"].input_type))


@pytest.mark.parametrize(
    ("name", "path"), BEYOND, ids=[".".join([name, *(each.name for each in path)]) for name, path in BEYOND]
)
def test_a_list_that_is_too_long_is_refused_by_each_method_that_has_one(
    raw: Raw, name: str, path: tuple[FieldDescriptor, ...]
) -> None:
    most = LONGEST_LISTS[path[-1].full_name]
    sentence = raw.refused(name, [with_elements(path, most + 1)])
    assert f"appears more than {most:,} times in one message" in sentence
    raw.goes_on()


@pytest.mark.parametrize("path", OF_A_MODEL, ids=[path[-1].full_name for path in OF_A_MODEL])
def test_a_list_that_is_too_long_is_refused_in_an_offered_model(
    tmp_path: Path, path: tuple[FieldDescriptor, ...]
) -> None:
    most = LONGEST_LISTS[path[-1].full_name]
    sentence = refused_before_a_model(tmp_path, "OfferModel", with_elements(path, most + 1), "BAD_MANIFEST")
    assert f"appears more than {most:,} times in one message" in sentence


@pytest.mark.parametrize("name", [name for name in METHODS if name not in STREAMING])
def test_a_request_that_is_alone_is_refused_if_it_is_longer_than_any_needs_to_be(raw: Raw, name: str) -> None:
    unknown = pb.PushPullResponse(data=bytes(SMALL_MESSAGE_BYTES)).SerializeToString()  # number 5
    assert raw.refused(name, [unknown]).endswith("bytes: at most 16,384 were expected")
    raw.goes_on()


def test_health_is_not_asked_about_services_with_endless_names(raw: Raw) -> None:
    """A watcher's would be kept for as long as it watches."""
    health = health_pb2_grpc.HealthStub(raw.channel)
    endless = health_pb2.HealthCheckRequest(service="x" * 20_000)
    for call in (health.Check, lambda request: next(health.Watch(request))):
        with pytest.raises(grpc.RpcError, match="received a request of 20,004 bytes"):
            call(endless)


# Well formed, and out of place.

WANTED = {"PushPull": "exchange", "PushGradient": "push", "OfferModel": "offer"}


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize(("came", "encoded"), [("chunk", chunk(0, bytes(8))), ("nothing", b"")])
def test_anything_else_is_refused_where_a_header_is_wanted(
    tmp_path: Path, name: str, came: str, encoded: bytes
) -> None:
    sentence = refused_before_a_model(tmp_path, name, encoded)
    assert sentence == f"received a message with '{came}' where '{WANTED[name]}' was expected"


@pytest.mark.parametrize("name", ["PushPull", "PushGradient"])
@pytest.mark.parametrize("second", ["header", "nothing"])
def test_another_header_is_refused_where_a_chunk_is_wanted(raw: Raw, name: str, second: str) -> None:
    first = header(raw.worker, payload(SMALL, 1.0), name)
    sentence = raw.refused(name, [first, first if second == "header" else b""])
    said = WANTED[name] if second == "header" else "nothing"
    assert sentence == f"received a message with '{said}' where 'chunk' was expected"
    raw.goes_on()


AFTER_THE_END = {
    "chunk": (chunk(0, GRADIENT), "BAD_PAYLOAD", "offset 0 where offset 40"),
    "chunk where it would go on": (chunk(40, b"x"), "BAD_PAYLOAD", "after all 40 bytes of the payload"),
    "empty chunk": (chunk(40, b""), "BAD_PAYLOAD", "after all 40 bytes of the payload"),
    "nothing": (b"", "BAD_REQUEST", "received a message with 'nothing' where 'chunk' was expected"),
    "no message": (MALFORMED["cut"], "BAD_REQUEST", "bytes that are not a PushGradientRequest"),
}


@pytest.mark.parametrize("case", AFTER_THE_END)
def test_what_comes_after_a_gradient_by_pushgradient_is_refused_and_the_gradient_not_applied(
    raw: Raw, case: str
) -> None:
    more, reason, sentence = AFTER_THE_END[case]
    whole = [header(raw.worker, payload(SMALL, 1.0), "PushGradient"), chunk(0, GRADIENT)]
    assert sentence in raw.refused("PushGradient", [*whole, more], reason)
    raw.goes_on()


def test_another_gradient_in_a_stream_of_pushgradient_is_refused_with_the_first(raw: Raw) -> None:
    whole = [header(raw.worker, payload(SMALL, 1.0), "PushGradient"), chunk(0, GRADIENT)]
    assert "received a message with 'push' where 'chunk' was expected" in raw.refused("PushGradient", whole * 2)
    raw.goes_on()


@pytest.mark.parametrize("more", ["chunk", "offer"])
def test_what_comes_after_a_model_is_refused_and_the_model_not_taken(tmp_path: Path, more: str) -> None:
    with served(tmp_path) as server, grpc.insecure_channel(server.address) as channel:
        worker = WireWorker(ParameterServerStub(channel), "a")
        assert worker.ask_to_join().WhichOneof("answer") == "model_wanted"
        model = bytes(payload(SMALL, 1.0, buffers=True).memory)
        first = header(worker, payload(SMALL, 1.0), "OfferModel")
        after = chunk(0, b"x") if more == "chunk" else first
        with pytest.raises(Refused, match=f"offset {len(model)}|message with 'offer' where") as refused, refusals():
            Raw(server, channel, worker).call("OfferModel", [first, chunk(0, model), after])
        assert refused.value.code == grpc.StatusCode.INVALID_ARGUMENT
        assert not server.host.has_model
        worker.join()


# `data`, which only PushPull has.


def beginning(worker: WireWorker, gradient: Payload | None, data: bytes) -> bytes:
    message = worker.exchange(gradient)
    message.data = data
    return message.SerializeToString()


def test_data_without_a_gradient_is_refused(raw: Raw) -> None:
    sentence = raw.refused("PushPull", [beginning(raw.worker, None, b"abc")])
    assert sentence == "received 3 bytes of data with an exchange that has no gradient"
    raw.goes_on()


def test_data_without_an_exchange_is_refused(raw: Raw) -> None:
    sentence = raw.refused("PushPull", [pb.PushPullRequest(data=b"abc").SerializeToString()])
    assert sentence == "received a message with 'nothing' where 'exchange' was expected"


@pytest.mark.parametrize("order", ["chunk first", "data first"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_chunk_with_data_beside_it_is_refused(raw: Raw, order: str, begun: bool) -> None:
    parts = [chunk(0, bytes(8)), pb.PushPullRequest(data=b"abc").SerializeToString()]
    both = b"".join(parts if order == "chunk first" else reversed(parts))
    first = [header(raw.worker, payload(SMALL, 1.0), "PushPull")] if begun else []
    assert raw.refused("PushPull", [*first, both]).startswith("received a chunk together with data")
    raw.goes_on()


BAD_DATA = {
    "ended after 16 of 40 bytes": (GRADIENT[:16], []),
    "received a chunk of 41 bytes at offset 0": (GRADIENT + b"x", []),  # longer than the payload
    "offset 0 where offset 16": (GRADIENT[:16], [(0, GRADIENT)]),  # a chunk over the data
    "offset 8 where offset 16": (GRADIENT[:16], [(8, GRADIENT[8:])]),
    "offset 24 where offset 16": (GRADIENT[:16], [(24, GRADIENT[24:])]),  # a gap
    "received a chunk of 25 bytes at offset 16": (GRADIENT[:16], [(16, GRADIENT[16:] + b"x")]),
}


@pytest.mark.parametrize("sentence", BAD_DATA)
def test_data_and_chunks_that_do_not_make_a_payload_are_refused(raw: Raw, sentence: str) -> None:
    data, chunks = BAD_DATA[sentence]
    requests = [beginning(raw.worker, payload(SMALL, 1.0), data), *(chunk(*piece) for piece in chunks)]
    assert sentence in raw.refused("PushPull", requests, "BAD_PAYLOAD")
    raw.goes_on()


def test_a_chunk_after_data_that_was_all_is_refused_and_the_gradient_stands(raw: Raw) -> None:
    requests = [beginning(raw.worker, payload(SMALL, 1.0), GRADIENT), chunk(0, GRADIENT)]
    with (
        pytest.raises(Refused, match="received a message with 'chunk' where 'exchange' was expected") as refused,
        refusals(),
    ):
        raw.call("PushPull", requests)
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST")
    assert state_of(raw.server)[0] == 1


def test_data_beside_the_headers_of_other_methods_is_an_unknown_field(raw: Raw) -> None:
    """A later version may give it a meaning there; this one goes by the chunks."""
    first = (
        header(raw.worker, payload(SMALL, 1.0), "PushGradient") + pb.PushPullRequest(data=b"abc").SerializeToString()
    )
    (answer,) = raw.call("PushGradient", [first, chunk(0, GRADIENT)])
    assert pb.PushGradientResponse.FromString(answer).result.iteration.number == 1


TOO_MUCH = {
    1: (grpc.StatusCode.INVALID_ARGUMENT, "BAD_PAYLOAD", f"1 to {MAX_CHUNK_BYTES} bytes"),
    1 << 20: (grpc.StatusCode.RESOURCE_EXHAUSTED, "", "larger than max"),
}


@pytest.mark.parametrize("more", TOO_MUCH)
def test_data_above_four_mebibytes_is_refused_even_where_it_fits(tmp_path: Path, more: int) -> None:
    """By gRPC itself, without a reason, where the message is longer than any that may be sent."""
    model = Manifest.laid_out([TensorSpec("weight", (MAX_CHUNK_BYTES // 2,), FLOAT32, PARAMETER)])
    with serving(tmp_path, model) as raw:
        gradient = payload(model, 1.0)
        before = state_of(raw.server)[0]
        data = gradient.memory[: MAX_CHUNK_BYTES + more]
        with pytest.raises(Refused) as refused, refusals():
            raw.call("PushPull", [beginning(raw.worker, gradient, bytes(data))])
        code, reason, sentence = TOO_MUCH[more]
        assert (refused.value.code, refused.value.reason) == (code, reason)
        assert sentence in refused.value.message
        assert state_of(raw.server)[0] == before
        whole = [beginning(raw.worker, gradient, bytes(gradient.memory[:MAX_CHUNK_BYTES]))]
        whole.append(chunk(MAX_CHUNK_BYTES, bytes(gradient.memory[MAX_CHUNK_BYTES:])))
        result, *_ = raw.call("PushPull", whole)
        assert pb.PushPullResponse.FromString(result).result.iteration.number == 1
