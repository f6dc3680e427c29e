"""How long the server holds a message whose bytes it has put in their place: each would be a megabyte for each slot."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from ormo_protos.framing import Framing
from ormo_protos.limits import CHUNK_BYTES
from ormo_protos.tensors import Payload
from ormo_protos.v1 import parameter_server_pb2 as pb
from service.wire import LARGE, WireWorker, connected, eventually, payload, received_bytes, served


class Held(bytes):
    """A message that counts the bytes of all that are still referred to."""

    total = 0

    @override
    def __new__(cls, encoded: bytes) -> "Held":
        Held.total += len(encoded)
        return super().__new__(cls, encoded)

    def __del__(self) -> None:
        Held.total -= len(self)


@pytest.fixture(autouse=True)
def _watched_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Framing.decode

    def watched(framing: Framing[Any], encoded: bytes) -> Any:
        return decode(framing, Held(encoded))

    monkeypatch.setattr(Framing, "decode", watched)


def messages(worker: WireWorker, gradient: Payload) -> Iterator[pb.PushPullRequest]:
    """An exchange whose head has the first chunk in it, as workers send it."""
    head, chunks = worker.exchange(gradient), gradient.chunks()
    head.data = bytes(next(chunks).data)
    yield head
    for chunk in chunks:
        yield pb.PushPullRequest(chunk=pb.TensorChunk(offset=chunk.offset, data=bytes(chunk.data)))


def test_no_message_is_held_while_the_next_one_is_waited_for_or_the_answer_is_sent(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE)
        worker.join()
        stream = worker.open()
        stream.begin(None)
        stream.delivery()
        before = received_bytes(server)
        head, second, *rest = messages(worker, payload(LARGE, 1.0))
        for number, message in enumerate([head, second], 1):
            stream.send(message)
            eventually(lambda number=number: received_bytes(server) - before == number * CHUNK_BYTES)  # type: ignore[misc]
            eventually(lambda: Held.total == 0)
        for message in rest:
            stream.send(message)
        stream.result()
        eventually(lambda: Held.total == 0)  # with the parameters unread, so that the exchange goes on
        stream.delivery()
        assert float(worker.params[0]) == -1.0
