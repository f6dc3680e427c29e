"""Small payloads in one message, large ones begun in it: against servers that know of it, that do not, and that lie."""

from collections.abc import Callable
from typing import Any

import pytest

from ormo_protos.limits import CHUNK_BYTES, MAX_CHUNK_BYTES
from ormo_protos.refusals import Reason
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker.errors import ProtocolBroken
from worker.client.test_client import Worker, value_of
from worker.fake_server import LOST, FakeServer, refuse

SIZES = {"one message": 5, "a full chunk": CHUNK_BYTES // 4, "three chunks": 2 * CHUNK_BYTES // 4 + 3}


@pytest.fixture(params=[False, True], ids=["chunks only", "takes data"])
def either(server: FakeServer, request: pytest.FixtureRequest) -> FakeServer:
    server.takes_data = request.param
    return server


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_same_steps_are_made_with_and_without_data(either: FakeServer, size: int) -> None:
    worker = Worker(either, size)
    with worker.client:
        worker.client.join()
        values = [value_of(worker.slot.exchange(None))]
        for _ in range(3):
            outcome = worker.push()
            assert outcome.result is not None
            assert outcome.result.iteration.number == len(values)
            values.append(value_of(outcome))
        last = worker.push(wants_next=False)
        assert last.result is not None
        assert last.delivered is None
    assert values == [1.0, 0.5, 0.0, -0.5]
    assert (either.iteration, either.with_data) == (4, 4 if either.takes_data else 0)


@pytest.mark.parametrize("size", [SIZES["one message"], SIZES["three chunks"]])
def test_gradient_that_is_refused_is_told_and_the_next_ticket_comes_with_it(either: FakeServer, size: int) -> None:
    worker = Worker(either, size)
    with worker.client:
        worker.client.join()
        worker.slot.exchange(None)
        outcome = worker.push(float("nan"))
        assert outcome.refusal is not None
        assert outcome.refusal.refusal == Reason.NON_FINITE
        assert value_of(outcome) == 1.0
        assert value_of(worker.push()) == 0.5


def test_end_of_the_run_is_told_with_the_last_result(either: FakeServer) -> None:
    either.stop_after = 2
    worker = Worker(either)
    with worker.client:
        worker.client.join()
        worker.slot.exchange(None)
        assert not worker.push().finished
        last = worker.push()
        assert last.finished
        assert last.result is not None
        assert last.result.iteration.number == 2


@pytest.mark.parametrize("point", ["exchange", "received", "result", "delivery"])
@pytest.mark.parametrize("size", [SIZES["one message"], SIZES["three chunks"]])
@pytest.mark.parametrize("fault", [LOST, refuse("ABORTED", Reason.SUPERSEDED)], ids=["lost", "superseded"])
def test_stream_that_breaks_anywhere_counts_the_gradient_once(
    either: FakeServer, size: int, point: str, fault: Callable[[Any], None]
) -> None:
    worker = Worker(either, size)
    with worker.client:
        worker.client.join()
        worker.slot.exchange(None)
        either.told((point, fault))
        outcome = worker.push()
        assert not either.faults
        assert outcome.result is not None
        # Where the result has a message of its own, it comes before the stream breaks.
        seen = point == "delivery" and not either.takes_data
        assert outcome.result.repeated == (point in ("result", "delivery") and not seen)
        assert (either.iteration, value_of(outcome)) == (1, 0.5)
        assert value_of(worker.push()) == 0.0


def test_server_that_takes_data_after_its_restart_gets_it(server: FakeServer) -> None:
    """What a server takes is told at each join."""
    worker = Worker(server)
    with worker.client:
        worker.client.join()
        worker.slot.exchange(None)
        worker.push()
        assert server.with_data == 0
        server.takes_data = True
        server.told(("exchange", server.forget_workers))
        worker.push()
        worker.slot.exchange(None)
        worker.push()
        assert server.with_data > 0
        server.takes_data = False
        server.told(("exchange", server.forget_workers))
        worker.push()
        worker.slot.exchange(None)
        before = server.with_data
        worker.push()
        assert server.with_data == before


# Servers that send what is none of the protocol.

WHOLE = b"\0" * 8
CHUNK = pb.PushPullResponse(chunk=pb.TensorChunk(data=WHOLE)).SerializeToString()


def instead(encoded: bytes) -> Callable[[Any], bytes]:
    return lambda answer: encoded


def with_data(data: bytes) -> Callable[[Any], bytes]:
    def write(answer: Any) -> bytes:
        if answer.WhichOneof("part") == "delivery":
            answer.data = data
        return bytes(answer.SerializeToString())

    return write


LIES = {
    "can't be understood": instead(b"\x0a\x05a"),
    "can't be understood: received a chunk together with data": instead(CHUNK + b"\x2a\x01a"),
    "without announcing any": instead(CHUNK),
    "what the protocol does not allow there": instead(b""),
    "expected 1 to 8 bytes": with_data(WHOLE + b"x"),
    "received a chunk for offset 0 where offset 4": with_data(
        WHOLE[:4]
    ),  # the chunks then come as if there were no data
    "received a chunk of 4194305 bytes": with_data(bytes(MAX_CHUNK_BYTES + 1)),
}


@pytest.mark.parametrize("sentence", LIES)
def test_answers_that_are_no_messages_or_out_of_place_are_told(server: FakeServer, sentence: str) -> None:
    worker = Worker(server)
    with worker.client:
        worker.client.join()
        server.written = LIES[sentence]
        with pytest.raises(ProtocolBroken, match=sentence):
            worker.slot.exchange(None)


def test_parameters_without_a_ticket_that_are_no_messages_are_told(server: FakeServer) -> None:
    worker = Worker(server)
    with worker.client:
        worker.client.join()
        server.written = instead(b"\x0a\x05a")
        with pytest.raises(
            ProtocolBroken, match="can't be understood: received 3 bytes that are not a PullParamsResponse"
        ):
            worker.client.pull()
