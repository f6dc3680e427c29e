"""Parameters are sent while they are still being copied, and are nevertheless those of their ticket's iteration."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from ormo_protos.limits import CHUNK_BYTES
from ormo_protos.manifest import FLOAT32
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_server.core.rules.sgd import Sgd
from ormo_server.core.vectors import BLOCK_ELEMENTS
from ormo_server.metrics.noted import Distribution
from ormo_server.service.delivery import Copies
from service.wire import LARGE, Refused, WireWorker, connected, eventually, payload, served

BLOCK_BYTES = 4 * BLOCK_ELEMENTS


class Steps:
    """Writes ones, a part at a time, when it is told to."""

    def __init__(self) -> None:
        self._may_write = threading.Semaphore(0)
        self.parts: list[slice] = []

    def write(self, out: torch.Tensor, part: slice) -> None:
        assert self._may_write.acquire(timeout=30)
        self.parts.append(part)
        out[part] = 1.0

    def let(self, parts: int) -> None:
        self._may_write.release(parts)


@pytest.fixture
def copies() -> Iterator[Copies]:
    made = Copies(Distribution((1.0,)))
    yield made
    made.close()


def empty() -> Payload:
    made = Payload(PayloadLayout.of(LARGE, FLOAT32, with_buffers=False))
    made.parameters.zero_()
    return made


def in_thread(wait: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_first_bytes_are_there_before_the_last(copies: Copies) -> None:
    steps, target = Steps(), empty()
    copy = copies.begin(target, steps.write)
    steps.let(1)
    copy.wait_for(BLOCK_BYTES)
    assert target.parameters[:BLOCK_ELEMENTS].min() == 1.0
    assert len(steps.parts) == 1
    more = in_thread(lambda: copy.wait_for(BLOCK_BYTES + 1))
    more.join(0.05)
    assert more.is_alive()
    steps.let(100)
    copy.wait_for(target.layout.total_bytes)
    assert target.parameters.min() == 1.0
    more.join(30)
    assert not more.is_alive()


def test_finish_waits_for_all_that_were_begun(copies: Copies) -> None:
    first, second = Steps(), Steps()
    copies.begin(empty(), first.write)
    copies.begin(empty(), second.write)
    first.let(100)
    finish = in_thread(copies.finish)
    finish.join(0.05)
    assert finish.is_alive()
    second.let(100)
    finish.join(30)
    assert not finish.is_alive()
    assert copies.finish() == 0.0, "there is nothing left to wait for"


def test_copy_that_fails_is_over_and_tells_whoever_waits(copies: Copies) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("as scripted")

    copy = copies.begin(empty(), fail)
    with pytest.raises(MemoryError, match="as scripted"):
        copy.wait_for(1)
    copy.wait()
    copies.finish()


class SlowRule:
    """Lets `Sgd` copy block by block, when it is told to."""

    def __init__(self) -> None:
        self.blocks = threading.Semaphore(0)
        self._write = Sgd.write_delivery
        self.copied = 0

    def __enter__(self) -> "SlowRule":
        def write(
            rule: Sgd, params: torch.Tensor, out: torch.Tensor, sending: object, part: slice = slice(None)
        ) -> None:
            assert self.blocks.acquire(timeout=30)
            self._write(rule, params, out, sending, part)  # type: ignore[arg-type]
            self.copied += 1

        self._patch = mock.patch.object(Sgd, "write_delivery", write)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()
        self.blocks.release(10_000)


def test_next_gradient_waits_until_the_parameters_before_it_are_copied(tmp_path: Path) -> None:
    with served(tmp_path, method="asgd") as server, connected(server) as stub:
        a, b = WireWorker(stub, "a", LARGE), WireWorker(stub, "b", LARGE)
        for worker in (a, b):
            worker.join()
            worker.pull()
        first, second = a.open(), b.open()
        with SlowRule() as rule:
            first.begin(payload(LARGE, 1.0))
            assert first.result().iteration.number == 1
            rule.blocks.release()
            head = first.receive()
            assert head.delivery.iteration.number == 1
            assert len(first.receive().chunk.data) == CHUNK_BYTES, "the first piece comes before the rest is copied"
            assert rule.copied == 1
            second.begin(payload(LARGE, 10.0), wants=False)
            # It has come whole, and still is not counted.
            eventually(lambda: server.metrics.traffic.stage["check"].totals()[0][-1] == 2)
            assert server.host.engine.iteration()[1] == 1
            rule.blocks.release(10_000)
            assert second.result().iteration.number == 2
        rest = b"".join(first.receive().chunk.data for _ in range(-(-head.delivery.payload_bytes // CHUNK_BYTES) - 1))
        assert torch.frombuffer(bytearray(rest), dtype=torch.float32).unique().tolist() == [-1.0]


def test_stream_that_ends_in_the_middle_of_a_copy_keeps_its_buffer_until_the_copy_ends(tmp_path: Path) -> None:
    with served(tmp_path, method="asgd") as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE)
        worker.join()
        worker.pull()
        stream = worker.open()
        with SlowRule() as rule:
            stream.begin(payload(LARGE, 1.0))
            assert stream.result().iteration.number == 1
            rule.blocks.release()
            stream.receive()
            stream.drop()
            # Somebody else's buffer must not be the one that is still written to.
            assert len(server.streams) == 1
            rule.blocks.release(10_000)
            eventually(lambda: len(server.streams) == 0)
        assert worker.pull().iteration.number == 1
        assert worker.params.unique().tolist() == [-1.0]


def test_copy_that_fails_ends_the_call_and_nothing_else(tmp_path: Path) -> None:
    with served(tmp_path, method="asgd") as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE)
        worker.join()
        worker.pull()
        stream = worker.open()
        with mock.patch.object(Sgd, "write_delivery", side_effect=MemoryError("as scripted")):
            stream.begin(payload(LARGE, 1.0))
            assert stream.result().iteration.number == 1
            with pytest.raises(Refused) as refused:
                stream.delivery()
        assert refused.value.reason == "INTERNAL"
        assert worker.pull().iteration.number == 1
        assert worker.params.unique().tolist() == [-1.0]
