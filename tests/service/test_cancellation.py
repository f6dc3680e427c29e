"""A call that is given up between any two messages: its gradient counted once or not at all, its buffers given back."""

import contextlib
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ormo_protos.limits import CHUNK_BYTES
from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Payload
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.service.server import Server
from ormo_server.service.transfers import BufferPool
from service.wire import (
    Exchanges,
    WireWorker,
    connected,
    eventually,
    payload,
    received_bytes,
    served,
    tensor_chunks,
)

CHUNKS = 3
MODEL = Manifest.laid_out([TensorSpec("weight", (CHUNKS * CHUNK_BYTES // 4,), FLOAT32, PARAMETER)])
# Requests of an exchange: its header and the chunks; or the header with the first of them.
REQUESTS = {False: 1 + CHUNKS, True: CHUNKS}
# Answers: the result, the delivery and its chunks; or a delivery that has the result and the first chunk.
ANSWERS = {False: 2 + CHUNKS, True: CHUNKS}


@dataclass
class Scene:
    """A server of which the worker holds a ticket; the parameters are all 0."""

    server: Server
    worker: WireWorker
    pools: list[BufferPool]

    def params(self) -> tuple[int, float, float]:
        """The iteration, and the one value that all parameters, and all momenta, have."""
        with self.server.host.engine.inspect() as machine:
            (vector,) = machine.state.rule.vectors.values()
            numbers = [machine.state.params.unique(), vector.unique()]
            assert [one.numel() for one in numbers] == [1, 1], "a gradient was applied in part"
            return machine.state.iteration, *(float(one) for one in numbers)

    def is_over(self) -> None:
        """Wait for the end of all calls, and of their loans."""
        eventually(lambda: len(self.server.streams) == 0)
        eventually(lambda: all(not pool._lent for pool in self.pools))


# One gradient of 1 moves SGD with momentum 0.5 and learning rate 1 by 1.
UNTOUCHED, APPLIED = (0, 0.0, 0.0), (1, -1.0, 1.0)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with scenery(tmp_path, monkeypatch) as scene:
        scene.worker.join()
        scene.worker.pull()
        assert scene.params() == UNTOUCHED
        yield scene


@contextlib.contextmanager
def scenery(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    pools: list[BufferPool] = []

    class Watched(BufferPool):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            pools.append(self)

    monkeypatch.setattr("ormo_server.service.transfers.BufferPool", Watched)
    with served(folder) as server, connected(server) as stub:
        assert len(pools) == 1
        yield Scene(server, WireWorker(stub, "a", MODEL), pools)


def requests(worker: WireWorker, gradient: Payload, *, together: bool) -> list[pb.PushPullRequest]:
    """The messages of an exchange; `together`: with `data`, both ways."""
    head, chunks = worker.exchange(gradient), list(tensor_chunks(gradient))
    if together:
        head.exchange.next.takes_data = True
        head.data = chunks.pop(0).data
    return [head, *(pb.PushPullRequest(chunk=chunk) for chunk in chunks)]


def arrived(scene: Scene, before: int, sent: list[pb.PushPullRequest]) -> bool:
    """Whether the server has taken these."""
    streams = scene.server.streams._snapshot()
    begun = any(stream.requester is not None for stream in streams) or not sent
    return begun and received_bytes(scene.server) - before == sum(len(one.data) + len(one.chunk.data) for one in sent)


def retried(scene: Scene, sent: list[pb.PushPullRequest], *, repeated: bool) -> None:
    """The same exchange once more, whole: at its end the gradient has been counted once."""
    stream = scene.worker.open()
    for message in sent:
        stream.send(message)
    first = stream.receive()
    result = first.delivery.result if sent[0].data else first.result
    assert (result.iteration.number, result.repeated, result.refusal) == (1, repeated, "")
    assert scene.params() == APPLIED
    stream.finish()
    assert len(list(stream.call)) == ANSWERS[bool(sent[0].data)] - 1
    scene.is_over()


@pytest.mark.parametrize(("together", "sent"), [(way, count) for way in REQUESTS for count in range(REQUESTS[way])])
def test_exchange_given_up_before_it_is_whole_never_was(scene: Scene, together: bool, sent: int) -> None:
    messages = requests(scene.worker, payload(MODEL, 1.0), together=together)
    before, stream = received_bytes(scene.server), scene.worker.open()
    for message in messages[:sent]:
        stream.send(message)
    eventually(lambda: arrived(scene, before, messages[:sent]))
    stream.drop()
    scene.is_over()
    assert scene.params() == UNTOUCHED
    retried(scene, messages, repeated=False)


@pytest.mark.parametrize(("together", "got"), [(way, count) for way in ANSWERS for count in range(1, ANSWERS[way] + 1)])
def test_exchange_given_up_while_its_answers_come_counts_once(scene: Scene, together: bool, got: int) -> None:
    messages = requests(scene.worker, payload(MODEL, 1.0), together=together)
    stream = scene.worker.open()
    for message in messages:
        stream.send(message)
    for _ in range(got):
        stream.receive()
    stream.drop()
    scene.is_over()
    assert scene.params() == APPLIED
    retried(scene, messages, repeated=True)


@pytest.mark.parametrize("together", REQUESTS)
@pytest.mark.parametrize("sent", range(1 + CHUNKS))
def test_exchange_given_up_at_once_counts_once_or_not_at_all(scene: Scene, together: bool, sent: int) -> None:
    """Without waiting until the server has what was sent: it may be anywhere."""
    messages = requests(scene.worker, payload(MODEL, 1.0), together=together)
    stream = scene.worker.open()
    for message in messages[: 1 + sent]:
        stream.send(message)
    stream.drop()
    scene.is_over()
    state = scene.params()
    assert state in (UNTOUCHED, APPLIED)
    retried(scene, messages, repeated=state == APPLIED)


@pytest.mark.parametrize("sent", range(1 + CHUNKS))
def test_gradient_pushed_by_itself_and_given_up_never_was(scene: Scene, sent: int) -> None:
    gradient = payload(MODEL, 1.0)
    push = pb.Push(requester=scene.worker.requester(), gradient=scene.worker.header(gradient))
    messages = [pb.PushGradientRequest(push=push)]
    messages.extend(pb.PushGradientRequest(chunk=chunk) for chunk in tensor_chunks(gradient))
    before = received_bytes(scene.server)
    stream = Sending(scene.worker.stub.PushGradient.future)
    for message in messages[:sent]:
        stream.send(message)
    eventually(lambda: received_bytes(scene.server) - before == max(0, sent - 1) * CHUNK_BYTES)
    stream.drop()
    scene.is_over()
    assert scene.params() == UNTOUCHED
    assert scene.worker.push_messages(push, tensor_chunks(gradient)).iteration.number == 1
    assert scene.params() == APPLIED


@pytest.mark.parametrize("sent", range(1 + CHUNKS))
def test_model_given_up_never_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int) -> None:
    with scenery(tmp_path, monkeypatch) as scene:
        worker = scene.worker
        assert worker.ask_to_join().WhichOneof("answer") == "model_wanted"
        offer = pb.ModelOffer(worker="a", incarnation=1, manifest=MODEL.to_message())
        messages = [pb.OfferModelRequest(offer=offer)]
        messages.extend(pb.OfferModelRequest(chunk=chunk) for chunk in tensor_chunks(payload(MODEL, 5.0)))
        stream = Sending(worker.stub.OfferModel.future)
        for message in messages[:sent]:
            stream.send(message)
        eventually(lambda: received_bytes(scene.server) == max(0, sent - 1) * CHUNK_BYTES)
        stream.drop()
        scene.is_over()
        assert not scene.server.host.has_model
        worker.join()
        assert scene.params() == UNTOUCHED


@pytest.mark.parametrize("ticket", [False, True])
@pytest.mark.parametrize("got", range(2 + CHUNKS))
def test_pull_given_up_changes_nothing_and_gives_its_buffer_back(scene: Scene, ticket: bool, got: int) -> None:
    requester = scene.worker.requester() if ticket else None
    delivery = pb.DeliveryRequest(dtype=FLOAT32)
    call = scene.worker.stub.PullParams(pb.PullParamsRequest(requester=requester, delivery=delivery))
    for _ in range(min(got, 1 + CHUNKS)):
        next(call)
    call.cancel()
    scene.is_over()
    assert scene.params() == UNTOUCHED
    scene.worker.pull()
    assert scene.worker.push(payload(MODEL, 1.0)).iteration.number == 1
    assert scene.params() == APPLIED


class Sending(Exchanges):
    """One call with a stream of requests and one answer."""

    def __init__(self, method: Any) -> None:
        self._outbox = queue.Queue()
        self.call = method(iter(self._outbox.get, self._END))
