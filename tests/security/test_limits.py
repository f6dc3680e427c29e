"""The table of limits: each is reached through the real socket; the refusal says what to do; nothing has changed."""

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ormo_protos.limits import MAX_CHUNK_BYTES
from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.core.errors import MemoryLimit, TooMuchInFlight
from ormo_server.service.resources import calls_per_connection
from ormo_server.service.server import Server
from ormo_server.service.transfers import BytesInFlight
from security.authority import Authority, dialled, guarded
from service.wire import (
    LARGE,
    SMALL,
    Refused,
    WireWorker,
    connected,
    eventually,
    kept_files,
    payload,
    received_bytes,
    refusals,
    served,
    state_of,
)
from system.hostile import DATA, END_STREAM, frame, message, opening

# 300,000 bytes: 64 + 18 chunks.
MIDDLE = Manifest.laid_out([TensorSpec("weight", (75_000,), FLOAT32, PARAMETER)])
FLOATS = pb.DeliveryRequest(dtype=FLOAT32)
SETTINGS = {"max_workers": 2, "slots_per_worker": 2, "max_readers": 2, "max_bytes_in_flight": 700_000}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with served(tmp_path, **SETTINGS) as made:
        yield made


@pytest.fixture
def stub(server: Server) -> Iterator[ParameterServerStub]:
    with connected(server) as made:
        yield made


@pytest.fixture
def worker(stub: ParameterServerStub) -> WireWorker:
    """A member with a ticket, next to another one: no more are allowed."""
    made = WireWorker(stub, "w", MIDDLE)
    made.join()
    WireWorker(stub, "second", MIDDLE).join()
    made.pull()
    return made


def crumbs(size: int) -> Iterator[pb.TensorChunk]:
    whole = bytes(MIDDLE.sizes["parameters"] * 4)
    return (pb.TensorChunk(offset=at, data=whole[at : at + size]) for at in range(0, len(whole), size))


def a_message_that_is_too_large(worker: WireWorker) -> None:
    worker.stub.Leave(pb.LeaveRequest(worker="x" * (MAX_CHUNK_BYTES + (65 << 10))))


def a_chunk_that_is_too_large(worker: WireWorker) -> None:
    large = pb.TensorChunk(offset=0, data=bytes(MAX_CHUNK_BYTES + 1))
    worker.push_messages(pb.Push(requester=worker.requester(), gradient=worker.header(payload(MIDDLE, 1.0))), [large])


def too_many_chunks(worker: WireWorker) -> None:
    push = pb.Push(requester=worker.requester(), gradient=worker.header(payload(MIDDLE, 1.0)))
    worker.push_messages(push, crumbs(3000))


def a_worker_id_that_is_too_long(worker: WireWorker) -> None:
    WireWorker(worker.stub, "x" * 129).ask_to_join()


def too_many_slots(worker: WireWorker) -> None:
    WireWorker(worker.stub, "other", MIDDLE).ask_to_join(slots=3)


def too_many_workers(worker: WireWorker) -> None:
    WireWorker(worker.stub, "third", MIDDLE).ask_to_join()


def too_many_returned_tickets(worker: WireWorker) -> None:
    assert worker.ticket is not None
    beat = pb.HeartbeatRequest(worker="w", incarnation=1, returned=[worker.ticket] * 65)
    worker.stub.Heartbeat(beat)


def a_request_that_is_too_long(worker: WireWorker) -> None:
    worker.stub.Leave(pb.LeaveRequest(worker="x" * (16 << 10)))


def too_many_samples(worker: WireWorker) -> None:
    worker.push(payload(MIDDLE, 1.0), samples=2**31)


def too_much_metadata(worker: WireWorker) -> None:
    worker.stub.GetStatus(pb.GetStatusRequest(), metadata=[("authorization", "x" * (64 << 10))], timeout=5)


REFUSED: dict[Callable[[WireWorker], None], tuple[grpc.StatusCode, str, str]] = {
    a_message_that_is_too_large: (grpc.StatusCode.RESOURCE_EXHAUSTED, "", "larger than max"),
    a_chunk_that_is_too_large: (grpc.StatusCode.INVALID_ARGUMENT, "BAD_PAYLOAD", "expected 1 to 300000 bytes"),
    too_many_chunks: (grpc.StatusCode.INVALID_ARGUMENT, "BAD_PAYLOAD", "246000 of 300000 bytes arrived in 82 chunks"),
    a_worker_id_that_is_too_long: (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST", "expected 1 to 128 of the char"),
    too_many_slots: (
        grpc.StatusCode.INVALID_ARGUMENT,
        "BAD_REQUEST",
        "slots_per_worker is 2: raise it or ask for less",
    ),
    too_many_workers: (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WORKERS", "max_workers is 2: raise it or wait"),
    too_many_returned_tickets: (
        grpc.StatusCode.INVALID_ARGUMENT,
        "BAD_REQUEST",
        "HeartbeatRequest.returned appears more",
    ),
    a_request_that_is_too_long: (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST", "at most 16,384 were expected"),
    too_many_samples: (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REQUEST", "expected 0 to 2147483647 samples"),
    too_much_metadata: (grpc.StatusCode.RESOURCE_EXHAUSTED, "", "metadata size"),
}


@pytest.mark.parametrize("beyond", REFUSED, ids=lambda beyond: beyond.__name__)
def test_what_is_beyond_a_limit_is_refused_and_changes_nothing(
    beyond: Callable[[WireWorker], None], server: Server, worker: WireWorker
) -> None:
    before, ticket = state_of(server), worker.ticket
    with pytest.raises(Refused) as refused, refusals():
        beyond(worker)
    code, reason, sentence = REFUSED[beyond]
    assert (refused.value.code, refused.value.reason) == (code, reason)
    assert sentence in refused.value.message
    assert state_of(server) == before
    worker.ticket = ticket
    assert worker.push(payload(MIDDLE, 1.0)).iteration.number == 1


def test_chunks_up_to_the_limit_are_taken(worker: WireWorker) -> None:
    push = pb.Push(requester=worker.requester(), gradient=worker.header(payload(MIDDLE, 1.0)))
    assert worker.push_messages(push, crumbs(3660)).iteration.number == 1  # 82 of them


def test_a_model_that_needs_more_memory_than_there_may_be_is_refused_and_nothing_is_kept_of_it(tmp_path: Path) -> None:
    """Parameters and momentum, a copy of both in a checkpoint, and four slots: eight times 300,000 bytes."""
    for limit, taken in ((2_399_999, False), (2_400_000, True)):
        directory = tmp_path / str(limit)
        with served(directory, **SETTINGS, memory_limit_bytes=limit) as server, connected(server) as stub:
            worker = WireWorker(stub, "w", MIDDLE)
            if taken:
                worker.join()
                assert server.host.has_model
                continue
            with pytest.raises(
                Refused, match=r"needs up to 2,400,000 .* memory_limit_bytes is 2,399,999: raise"
            ) as refused:
                worker.join()
            code, reason = refused.value.code, refused.value.reason
            assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MEMORY_LIMIT")
            assert not server.host.has_model
            assert kept_files(directory) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda manifest: manifest.tensors.extend([manifest.tensors[0]] * 100_000), "100,000"),
        (lambda manifest: setattr(manifest.tensors[0], "name", "x" * 513), "512"),
        (lambda manifest: manifest.tensors[0].shape.extend([1] * 16), "16"),
    ],
    ids=["tensors", "name", "dimensions"],
)
def test_a_model_beyond_a_limit_is_refused_and_a_sound_one_is_still_wanted(
    change: Callable[[pb.Manifest], None], sentence: str, tmp_path: Path
) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "w")
        worker.ask_to_join()
        message = SMALL.to_message()
        change(message)
        offer = pb.OfferModelRequest(offer=pb.ModelOffer(worker="w", incarnation=1, manifest=message))
        with pytest.raises(Refused) as refused, refusals():
            stub.OfferModel(iter([offer]))
        assert refused.value.reason == "BAD_MANIFEST"
        assert sentence in refused.value.message.replace("100000", "100,000")
        assert not server.host.has_model
        assert kept_files(tmp_path) == []
        worker.join()
        assert server.host.has_model


def test_streams_that_say_nothing_can_not_take_more_places_than_there_are(server: Server, worker: WireWorker) -> None:
    """There are 8 places, and half of them are enough for all slots of all workers."""
    silence = threading.Event()
    silent = [worker.stub.PushPull(iter(silence.wait, True)) for _ in range(4)]
    eventually(lambda: server.streams.count(reader=False) == 4)
    before = state_of(server)
    with pytest.raises(
        Refused, match=r"4 streams of '127\.0\.0\.1' are open that have not said which worker"
    ) as refused:
        worker.push(payload(MIDDLE, 1.0))
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
    assert refused.value.retry_seconds == 1.0
    assert state_of(server) == before
    assert worker.pull(ticket=False).payload_bytes, "readers have places of their own"
    silence.set()
    for call in silent:
        call.cancel()
    eventually(lambda: server.streams.count(reader=False) == 0)


@pytest.mark.parametrize("method", ["PushPull", "PushGradient"])
def test_a_stream_that_says_nothing_ends_after_the_failure_timeout_and_changes_nothing(
    method: str, tmp_path: Path
) -> None:
    """As no worker's: a stream that has said whose it is ends with that worker's lease."""
    with served(tmp_path, failure_timeout_seconds=2.0) as server, connected(server) as stub:
        worker = WireWorker(stub, "w")
        worker.join()
        worker.pull()
        eventually(lambda: not len(server.streams))
        before, silence, call = state_of(server), threading.Event(), getattr(stub, method)
        silent = (call if method == "PushPull" else call.future)(iter(silence.wait, True))
        eventually(lambda: len(server.streams) == 1)
        alive = pb.HeartbeatRequest(worker="w", incarnation=1)
        try:
            eventually(lambda: stub.Heartbeat(alive) and not len(server.streams), seconds=20)
        finally:
            silence.set()
        assert silent.code() == grpc.StatusCode.CANCELLED
        assert state_of(server) == before
        assert worker.push(payload(SMALL, 1.0)).iteration.number == 1


def test_watchers_of_health_hold_no_thread(server: Server, worker: WireWorker) -> None:
    """The server has 42 threads; a watcher waits for ever."""
    calls = server.metrics.registry.get_sample_value
    watch = {"grpc_type": "server_stream", "grpc_service": "grpc.health.v1.Health", "grpc_method": "Watch"}
    with contextlib.ExitStack() as stack:
        # There is room for 36 in a connection.
        own = [("grpc.use_local_subchannel_pool", 1)]
        channels = [stack.enter_context(grpc.insecure_channel(server.address, own)) for _ in range(10)]
        stubs = [health_pb2_grpc.HealthStub(channel) for channel in channels]
        watching = []
        for health in stubs * 10:
            watching.append(health.Watch(health_pb2.HealthCheckRequest()))
            assert next(watching[-1]).status == health_pb2.HealthCheckResponse.SERVING
        assert worker.push(payload(MIDDLE, 1.0)).iteration.number == 1
        server._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert {next(call).status for call in watching} == {health_pb2.HealthCheckResponse.NOT_SERVING}
        assert calls("grpc_server_started_total", watch) == 100
    eventually(lambda: calls("grpc_server_handled_total", watch | {"grpc_code": "CANCELLED"}) == 100)


@pytest.mark.parametrize("changes", [False, True], ids=["while all is well", "when the server stops"])
def test_a_watcher_of_health_that_does_not_read_keeps_nobody_waiting(
    server: Server, worker: WireWorker, changes: bool
) -> None:
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as peer, connected(server) as stub:
        began = calls_of_watch(server)
        peer.sendall(opening("/grpc.health.v1.Health/Watch", window=0) + frame(DATA, END_STREAM, 1, message(b"")))
        eventually(lambda: calls_of_watch(server) == began + 1)
        with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            good = health.Watch(health_pb2.HealthCheckRequest())
            assert next(good).status == health_pb2.HealthCheckResponse.SERVING
            if changes:
                server._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
            good.cancel()  # its end is seen to by the thread that serves all calls
            expected = health_pb2.HealthCheckResponse.NOT_SERVING if changes else health_pb2.HealthCheckResponse.SERVING
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == expected
        assert stub.GetStatus(pb.GetStatusRequest(), timeout=10)
        assert worker.push(payload(MIDDLE, 1.0)).iteration.number == 1


def calls_of_watch(server: Server) -> float:
    labels = {"grpc_type": "server_stream", "grpc_service": "grpc.health.v1.Health", "grpc_method": "Watch"}
    return server.metrics.registry.get_sample_value("grpc_server_started_total", labels) or 0.0


def test_calls_beyond_those_of_a_connection_wait_for_one_to_end(server: Server, worker: WireWorker) -> None:
    before = state_of(server)
    with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        health, status = health_pb2_grpc.HealthStub(channel), ParameterServerStub(channel).GetStatus
        watching = []
        for _ in range(calls_per_connection(server.settings)):
            watching.append(health.Watch(health_pb2.HealthCheckRequest()))
            next(watching[-1])
        with pytest.raises(grpc.RpcError) as waited:
            status(pb.GetStatusRequest(), timeout=1.0)
        assert waited.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert worker.stub.GetStatus(pb.GetStatusRequest(), timeout=5.0), "another connection is served"
        assert state_of(server) == before
        watching[0].cancel()
        assert status(pb.GetStatusRequest(), timeout=5.0)


def test_one_identity_can_not_have_all_memory_whatever_it_calls_its_workers(
    tmp_path: Path, authority: Authority
) -> None:
    with (
        guarded(tmp_path, authority, max_bytes_in_flight=700_000) as server,
        dialled(server, authority.credentials("pool.example")) as pool,
        dialled(server, authority.credentials("gpu-1")) as other,
    ):
        greedy = [WireWorker(pool, f"pool-{number}", MIDDLE) for number in range(3)]
        modest = WireWorker(other, "gpu-1", MIDDLE)
        for worker in [*greedy, modest]:
            worker.join()
            worker.pull()
        eventually(lambda: not len(server.streams))
        streams, begun = [], received_bytes(server)
        for worker in greedy[:2]:  # each begins with a gradient, and takes its time
            stream, rest = worker.open(), crumbs(10_000)
            stream.send(worker.exchange(payload(MIDDLE, 1.0)))
            stream.send(pb.PushPullRequest(chunk=next(rest)))
            streams.append((stream, rest))
        eventually(lambda: received_bytes(server) == begun + 2 * 10_000)
        before = state_of(server)
        with pytest.raises(Refused, match="has 600,000 bytes under way and wants 300,000 more") as refused:
            greedy[2].push(payload(MIDDLE, 1.0))
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MUCH_IN_FLIGHT")
        assert refused.value.retry_seconds == 1.0
        assert state_of(server) == before
        assert modest.push(payload(MIDDLE, 1.0)).iteration.number == 1
        for stream, rest in streams:
            for chunk in rest:
                stream.send(pb.PushPullRequest(chunk=chunk))
            stream.result()
            stream.delivery()
            stream.finish()
        eventually(lambda: not len(server.streams))
        assert greedy[2].push(payload(MIDDLE, 1.0)).iteration.number == 4


def in_an_exchange(worker: WireWorker) -> None:
    stream = worker.open()
    stream.begin(None)
    stream.delivery()


PULLS: dict[str, Callable[[WireWorker], object]] = {
    "as a reader": lambda worker: worker.pull(ticket=False),
    "with a ticket": WireWorker.pull,
    "in an exchange": in_an_exchange,
}


@pytest.mark.parametrize("how", PULLS)
def test_what_is_pulled_counts_among_the_bytes_of_a_caller(how: str, tmp_path: Path) -> None:
    with served(tmp_path, max_bytes_in_flight=25_000_000) as server, connected(server) as stub:
        worker = WireWorker(stub, "w", LARGE)
        worker.join()
        worker.pull()
        eventually(lambda: not len(server.streams))
        before, ticket = state_of(server), worker.ticket
        unread = [stub.PullParams(pb.PullParamsRequest(delivery=FLOATS)) for _ in range(2)]
        for call in unread:
            next(call)  # the header, and no more
        with pytest.raises(Refused, match=r"'127\.0\.0\.1' has 24,000,000 bytes under way and wants 12,0") as refused:
            PULLS[how](worker)
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MUCH_IN_FLIGHT")
        assert refused.value.retry_seconds == 1.0
        assert state_of(server) == before
        for call in unread:
            call.cancel()
        eventually(lambda: not len(server.streams))
        worker.ticket = ticket
        assert worker.push(payload(LARGE, 1.0)).iteration.number == 1


def test_what_is_offered_counts_among_the_bytes_of_a_caller(tmp_path: Path) -> None:
    """A worker that was asked for the model begins to send it again and again."""
    with served(tmp_path, max_bytes_in_flight=700_000) as server, connected(server) as stub:
        worker, silence = WireWorker(stub, "w", MIDDLE), threading.Event()
        worker.ask_to_join()
        offer = pb.OfferModelRequest(offer=pb.ModelOffer(worker="w", incarnation=1, manifest=MIDDLE.to_message()))
        begun = [offer, pb.OfferModelRequest(chunk=next(crumbs(8000)))]
        calls = [stub.OfferModel.future(itertools.chain(begun, iter(silence.wait, True))) for _ in range(2)]
        eventually(lambda: received_bytes(server) == 2 * 8000)
        with pytest.raises(Refused, match=r"'127\.0\.0\.1' has 600,000 bytes under way and wants 300,000") as refused:
            worker.offer()
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MUCH_IN_FLIGHT")
        assert refused.value.retry_seconds == 1.0
        assert not server.host.has_model
        assert kept_files(tmp_path) == []
        for call in calls:
            call.cancel()
        silence.set()
        eventually(lambda: not len(server.streams))
        worker.join()
        assert server.host.has_model


def test_a_bound_on_bytes_that_no_exchange_keeps_within_is_refused_with_the_model(tmp_path: Path) -> None:
    with served(tmp_path, max_bytes_in_flight=599_999) as server, connected(server) as stub:
        worker = WireWorker(stub, "w", MIDDLE)
        worker.ask_to_join()
        with pytest.raises(Refused, match="may have 600,000 bytes under way, and max_bytes_in_flight is 599,999"):
            worker.offer()
        assert not server.host.has_model
        assert kept_files(tmp_path) == []
    assert MemoryLimit.reason == "MEMORY_LIMIT"


def test_bytes_that_have_arrived_are_no_longer_counted() -> None:
    counted = BytesInFlight(100)
    with counted.during("a", 60):
        counted.begin("b", 100)
        with pytest.raises(TooMuchInFlight):
            counted.begin("a", 41)
        counted.begin("a", 40)
        counted.end("a", 40)
    counted.begin("a", 100)
    BytesInFlight(None).begin("a", 10**15)
