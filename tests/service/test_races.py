"""Streams that cross each other, peers that go away in every phase, and ends that come in the middle."""

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import save_file

from ormo_protos.limits import CHUNK_BYTES
from ormo_protos.manifest import FLOAT32
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.cli import _run_until_told
from ormo_server.service.server import Server
from service.wire import (
    LARGE,
    SMALL,
    Refused,
    WireWorker,
    connected,
    eventually,
    payload,
    received_bytes,
    served,
    settings,
    state_of,
    tensor_chunks,
)

FLOATS = pb.DeliveryRequest(dtype=FLOAT32)


def refused_times(server: Server, reason: str) -> int:
    return int(server.metrics.traffic.refusals.labels(reason)._value.get())


def servicer_buffers(server: Server) -> int:
    """Idle buffers in the pool; all that were ever lent, when no stream is open."""
    (handler,) = [h for h in server._grpc._state.generic_handlers if "ormo" in h.service_name()]
    servicer = next(iter(handler._method_handlers.values())).unary_unary.__wrapped__.__self__  # Join comes first
    return len(servicer._transfers._buffers._idle)


class Held:
    """A request stream that sends what it is told, and stays open."""

    def __init__(self) -> None:
        self._outbox: queue.Queue[object] = queue.Queue()
        self.messages = iter(self._outbox.get, None)
        self.send = self._outbox.put

    def end(self) -> None:
        self.send(None)


# A client that goes away, in each phase


def _before_the_first_message(worker: WireWorker) -> Callable[[], None]:
    return worker.open().drop


def _in_the_middle_of_a_push(worker: WireWorker) -> Callable[[], None]:
    stream, gradient = worker.open(), payload(LARGE, 1.0)
    stream.send(worker.exchange(gradient))
    stream.send(pb.PushPullRequest(chunk=next(tensor_chunks(gradient))))
    return stream.drop


def _in_the_middle_of_a_delivery(worker: WireWorker) -> Callable[[], None]:
    stream = worker.open()
    stream.begin(None)
    assert stream.receive().WhichOneof("part") == "delivery"
    return stream.drop


def _between_two_exchanges(worker: WireWorker) -> Callable[[], None]:
    stream = worker.open()
    stream.begin(None)
    stream.delivery()
    return stream.drop


def _in_the_middle_of_a_unary_push(worker: WireWorker) -> Callable[[], None]:
    held, gradient = Held(), payload(LARGE, 1.0)
    call = worker.stub.PushGradient.future(held.messages)
    held.send(pb.PushGradientRequest(push=pb.Push(requester=worker.requester(), gradient=worker.header(gradient))))
    held.send(pb.PushGradientRequest(chunk=next(tensor_chunks(gradient))))

    def drop() -> None:
        call.cancel()
        held.end()

    return drop


def _in_the_middle_of_a_reader_s_pull(worker: WireWorker) -> Callable[[], None]:
    call = worker.stub.PullParams(pb.PullParamsRequest(delivery=FLOATS))
    next(call)
    return call.cancel


PHASES = [
    _before_the_first_message,
    _in_the_middle_of_a_push,
    _in_the_middle_of_a_delivery,
    _between_two_exchanges,
    _in_the_middle_of_a_unary_push,
    _in_the_middle_of_a_reader_s_pull,
]


@pytest.mark.parametrize("phase", PHASES)
def test_client_that_goes_away_leaves_no_stream_no_waiter_and_no_lost_buffer(
    tmp_path: Path, phase: Callable[[WireWorker], Callable[[], None]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE)
        worker.join()
        if "push" in phase.__name__:  # which needs a ticket
            worker.pull()
            eventually(lambda: len(server.streams) == 0)  # the buffer is given back a moment after the last byte
        before = received_bytes(server)
        drop = phase(worker)
        eventually(lambda: len(server.streams) == 1)
        if "push" in phase.__name__:
            eventually(lambda: received_bytes(server) == before + CHUNK_BYTES)
        drop()
        eventually(lambda: len(server.streams) == 0)
        assert not server.host.engine._waiting._waiters
        assert servicer_buffers(server) == (0 if phase is _before_the_first_message else 1)
        worker.pull()
        eventually(lambda: len(server.streams) == 0)  # as above
        assert worker.push(payload(LARGE, 1.0)).iteration.number == 1
        assert servicer_buffers(server) == 1
    assert [record.message for record in caplog.records] == []


def test_worker_that_goes_while_it_waits_leaves_the_line_and_is_not_counted_as_a_drain(tmp_path: Path) -> None:
    with served(tmp_path, min_workers=2) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        stream = worker.open()
        stream.begin(None)
        eventually(lambda: len(server.host.engine._waiting._waiters) == 1)
        stream.drop()
        eventually(lambda: len(server.streams) == 0)
        with server.host.engine.inspect() as machine:
            assert not machine.state.waiting
        assert not server.host.engine._waiting._waiters
        assert refused_times(server, "DRAINING") == 0


def test_worker_that_leaves_while_it_waits_is_told_that_it_is_no_member(tmp_path: Path) -> None:
    with served(tmp_path, min_workers=2) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        stream = worker.open()
        stream.begin(None)
        eventually(lambda: len(server.host.engine._waiting._waiters) == 1)
        stub.Leave(pb.LeaveRequest(worker="a", incarnation=1))
        with pytest.raises(Refused) as refused:
            stream.receive()
        assert refused.value.reason == "NOT_A_MEMBER" or refused.value.code == grpc.StatusCode.CANCELLED
        eventually(lambda: len(server.streams) == 0)
        assert not server.host.engine._waiting._waiters
        assert not server.host.engine.broken.is_set()


# Two streams of one slot


def test_old_stream_in_the_middle_of_a_push_applies_nothing_after_the_new_one(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE)
        worker.join()
        worker.pull()
        before = received_bytes(server)
        old, gradient = worker.open(), payload(LARGE, 1.0)
        message = worker.exchange(gradient)
        old.send(message)
        chunks = list(tensor_chunks(gradient))
        old.send(pb.PushPullRequest(chunk=chunks[0]))
        eventually(lambda: received_bytes(server) == before + CHUNK_BYTES)
        new = worker.open()
        new.replay(message, gradient)
        assert new.result().iteration.number == 1
        for chunk in chunks[1:]:
            old.send(pb.PushPullRequest(chunk=chunk))
        with pytest.raises(Refused) as refused:
            old.receive()
        assert refused.value.code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED)
        new.delivery()
        assert server.host.engine.iteration()[1] == 1
        assert len(server.streams) == 1
        assert servicer_buffers(server) <= 2


def test_new_stream_takes_over_the_wait_of_the_old_one(tmp_path: Path) -> None:
    with served(tmp_path, min_workers=2) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        old, new = worker.open(), worker.open()
        message = old.begin(None)
        eventually(lambda: len(server.host.engine._waiting._waiters) == 1)
        new.replay(message, None)
        with pytest.raises(Refused) as refused:
            old.receive()
        assert refused.value.reason == "SUPERSEDED"
        WireWorker(stub, "b").join()
        assert new.delivery().ticket.number == 1
        assert not server.host.engine._waiting._waiters


def test_request_that_is_refused_as_stale_does_not_end_the_stream_of_its_slot(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        late = worker.requester()  # sent long ago, and held up on its way
        stream = worker.open()
        stream.begin(None)
        stream.delivery()
        with pytest.raises(grpc.RpcError) as raised:
            next(stub.PullParams(pb.PullParamsRequest(delivery=FLOATS, requester=late)))
        assert Refused(raised.value).reason == "STALE_REQUEST"
        stream.begin(payload(SMALL, 1.0))
        assert stream.result().iteration.number == 1


def test_streams_of_a_replaced_process_are_ended(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        old = WireWorker(stub, "a")
        old.join(slots=2)
        stream = old.open()
        stream.send(old.exchange(None, slot=1))
        stream.delivery()
        WireWorker(stub, "a", incarnation=2).join()
        eventually(lambda: len(server.streams) == 0, seconds=1.0)


# Offers of the first model


def test_offer_that_came_too_late_does_not_take_the_lease_of_the_one_that_is_asked_now(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        a, b, c = (WireWorker(stub, name, LARGE) for name in "abc")
        patience, server.host.offers.lease_seconds = server.host.offers.lease_seconds, 0.0
        assert a.ask_to_join().WhichOneof("answer") == "model_wanted"
        held, chunks = Held(), list(tensor_chunks(payload(LARGE, 0.0, buffers=True)))
        call = stub.OfferModel.future(held.messages)
        offer = pb.ModelOffer(worker="a", incarnation=1, manifest=LARGE.to_message())
        held.send(pb.OfferModelRequest(offer=offer))
        held.send(pb.OfferModelRequest(chunk=chunks[0]))
        eventually(lambda: received_bytes(server) == CHUNK_BYTES)
        server.host.offers.lease_seconds = patience
        assert b.ask_to_join().WhichOneof("answer") == "model_wanted"
        held.send(pb.OfferModelRequest(chunk=chunks[1]))
        held.end()
        assert Refused(call.exception()).reason == "NOT_WANTED"
        assert c.ask_to_join().WhichOneof("answer") == "wait"
        b.offer()
        assert server.host.has_model


def test_worker_with_another_model_than_the_server_s_file_is_told_what_differs(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    with served(tmp_path / "run", model=tmp_path / "other.safetensors") as server, connected(server) as stub:
        with pytest.raises(Refused, match="not the model that is to be trained") as refused:
            WireWorker(stub, "a").join()
        assert refused.value.code == grpc.StatusCode.INVALID_ARGUMENT
        assert not server.host.has_model


def test_model_that_can_not_be_stored_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no room")

    with served(tmp_path) as server, connected(server) as stub:
        with monkeypatch.context() as disk:
            disk.setattr("ormo_server.store.checkpoints.write_files", full)
            with pytest.raises(Refused, match="no room") as refused:
                WireWorker(stub, "a").join()
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
        WireWorker(stub, "b").join()
        assert server.host.files.last_checkpoint is not None


# Streams that say or take nothing


def test_offer_is_not_ended_while_the_server_takes_long_to_store_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path, failure_timeout_seconds=0.2) as server, connected(server) as stub:
        store, write = server.host.files.store, server.host.files.store.write

        def slowly(checkpoint: object) -> Path:
            threading.Event().wait(1.0)
            return write(checkpoint)  # type: ignore[arg-type]

        monkeypatch.setattr(store, "write", slowly)
        worker = WireWorker(stub, "a")
        assert worker.ask_to_join().WhichOneof("answer") == "model_wanted"
        assert worker.offer().iteration.number == 0


@pytest.mark.parametrize("method", ["PushGradient", "OfferModel"])
def test_upload_that_says_nothing_does_not_keep_its_thread(tmp_path: Path, method: str) -> None:
    with served(tmp_path, failure_timeout_seconds=0.2) as server, connected(server) as stub:
        held = Held()
        call = getattr(stub, method).future(held.messages)
        eventually(lambda: len(server.streams) == 1)
        try:
            eventually(lambda: len(server.streams) == 0, seconds=2.0)
        finally:
            call.cancel()
            held.end()


def test_upload_that_says_nothing_does_not_hold_up_the_drain(tmp_path: Path) -> None:
    with served(tmp_path, drain_seconds=2.0) as server, connected(server) as stub:
        WireWorker(stub, "a").join()
        held = Held()
        call = stub.PushGradient.future(held.messages)
        eventually(lambda: len(server.streams) == 1)
        try:
            assert server.streams.drain(2.0)
        finally:
            call.cancel()
            held.end()


def test_readers_that_do_not_read_leave_the_workers_their_streams(tmp_path: Path) -> None:
    with served(tmp_path, max_workers=1, slots_per_worker=1, max_readers=1) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE)
        worker.join()
        reader = stub.PullParams(pb.PullParamsRequest(delivery=FLOATS))
        next(reader)  # the header, and no more
        before = state_of(server)
        try:
            for _ in range(2):
                with pytest.raises(Refused, match=r"1 streams of readers are open.*, or raise max_readers") as refused:
                    WireWorker(stub, "reader", LARGE).pull(ticket=False)
                code, reason = refused.value.code, refused.value.reason
                assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
                assert refused.value.retry_seconds == 1.0
            assert state_of(server) == before
            worker.pull()
        finally:
            reader.cancel()
        eventually(lambda: not server.streams.count(reader=True))
        WireWorker(stub, "reader", LARGE).pull(ticket=False)


# Ends


@pytest.mark.parametrize("task", ["expiry", "checkpoints"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_background_thread_outlives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    with served(tmp_path, failure_timeout_seconds=0.2, checkpoint_seconds=0.05) as server, connected(server) as stub:
        WireWorker(stub, "a").join()
        failed = threading.Event()

        def fail(*_: object) -> None:
            failed.set()
            raise RuntimeError("allocator: can't allocate memory")

        monkeypatch.setattr(server.streams, "end_silent", fail)
        monkeypatch.setattr(server.host.engine, "snapshot", fail)
        server.host.files.last_checkpoint = None
        assert failed.wait(2.0)
        thread = server._upkeep if task == "expiry" else server._checkpoints
        eventually(lambda: server.metrics.upkeep.failures.labels(task)._value.get() >= 2)
        assert thread.is_alive()


def test_counter_that_no_message_can_hold_is_refused_before_it_spoils_every_delivery(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        for _ in range(2):
            worker.pull()
            with pytest.raises(Refused) as refused:
                worker.push(payload(SMALL, 1.0), samples=2**63 - 1)
            assert refused.value.reason == "BAD_REQUEST"
        assert WireWorker(stub, "reader").pull(ticket=False).payload_bytes > 0
        stub.GetStatus(pb.GetStatusRequest())


def test_end_of_the_run_wakes_all_who_wait_and_the_server_exits_when_they_have_left(tmp_path: Path) -> None:
    changes = {"method": "ssgd", "min_workers": 3, "stop_after_gradients": 2, "exit_when_finished": True}
    server = Server(settings(tmp_path, **changes))
    server.start()
    code: list[int] = []
    main = threading.Thread(target=lambda: code.append(_run_until_told(server, threading.Event())), daemon=True)
    main.start()
    with connected(server) as stub:
        a, b, c = (WireWorker(stub, name) for name in "abc")
        for worker in (a, b, c):
            worker.join()
        for worker in (a, b, c):
            worker.pull()
        waiting = c.open()
        waiting.begin(payload(SMALL, 1.0))
        assert waiting.result().iteration.number == 1
        eventually(lambda: len(server.host.engine._waiting._waiters) == 1)  # for the next round
        assert a.push(payload(SMALL, 1.0)).iteration.number == 2
        assert waiting.receive().WhichOneof("part") == "finished"
        with pytest.raises(Refused) as refused:
            b.push(payload(SMALL, 1.0))
        assert refused.value.reason == "FINISHED"
        assert main.is_alive()
        for worker in (a, b, c):
            stub.Leave(pb.LeaveRequest(worker=worker.name, incarnation=1))
        main.join(10.0)
    assert code == [0]


def test_drain_keeps_every_result_that_was_told_and_applies_nothing_after_its_checkpoint(tmp_path: Path) -> None:
    told: dict[str, int] = {}
    with served(tmp_path, momentum=0.0) as server, connected(server) as stub:
        WireWorker(stub, "w0").join()

        def work(name: str) -> None:
            worker = WireWorker(stub, name)
            worker.join()
            stream = worker.open()
            told[name] = 0
            try:
                stream.begin(None)
                while True:
                    stream.delivery()
                    stream.begin(payload(SMALL, 1.0))
                    assert not stream.result().repeated
                    told[name] += 1
            except Refused:
                stream.finish()

        threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(told) == 4 and server.host.engine.iteration()[1] > 50, 30.0)
        assert server.drain()
        for thread in threads:
            thread.join()
        after = server.host.engine.iteration()[1]
    with served(tmp_path, momentum=0.0) as server:
        state = server.host.engine.snapshot()[0]
        assert state.fields["iteration"] == after
        assert state.tensors["params"].tolist() == [-float(after)] * 9
        # At most one result of each worker may have got lost with its stream, and it is kept for the retry.
        assert sum(told.values()) <= after <= sum(told.values()) + 4


def test_push_that_the_drain_cut_off_is_not_applied_after_its_checkpoint(tmp_path: Path) -> None:
    with served(tmp_path, drain_seconds=0.2) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE)
        worker.join()
        worker.pull()
        before = received_bytes(server)
        stream, gradient = worker.open(), payload(LARGE, 1.0)
        message = worker.exchange(gradient)
        stream.send(message)
        chunks = list(tensor_chunks(gradient))
        stream.send(pb.PushPullRequest(chunk=chunks[0]))
        eventually(lambda: received_bytes(server) == before + CHUNK_BYTES)
        assert server.drain()
        for chunk in chunks[1:]:
            stream.send(pb.PushPullRequest(chunk=chunk))
        with pytest.raises(Refused):
            stream.receive()
        eventually(lambda: len(server.streams) == 0)
        assert server.host.engine.iteration()[1] == 0
    with served(tmp_path) as server, connected(server) as stub:
        worker.stub = stub
        retry = worker.open()
        retry.replay(message, gradient)
        assert retry.result().iteration.number == 1


def test_worker_that_expires_in_the_middle_of_a_push_changes_nothing_and_may_join_again(tmp_path: Path) -> None:
    with served(tmp_path, failure_timeout_seconds=0.5) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE)
        worker.join()
        worker.pull()
        stream, gradient = worker.open(), payload(LARGE, 1.0)
        message = worker.exchange(gradient)
        stream.send(message)
        stream.send(pb.PushPullRequest(chunk=next(tensor_chunks(gradient))))
        with pytest.raises(Refused) as refused:
            stream.receive()
        assert refused.value.code == grpc.StatusCode.CANCELLED
        eventually(lambda: len(server.streams) == 0)
        worker.join()
        again = worker.open()
        again.replay(message, gradient)
        assert again.result().refusal == "TICKET_UNKNOWN"
        again.delivery()
        again.begin(gradient)
        assert again.result().iteration.number == 1


def test_worker_that_expires_before_it_hears_of_its_push_joins_again_and_has_the_result_repeated(
    tmp_path: Path,
) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", SMALL)
        worker.join()
        worker.pull()
        stream, gradient = worker.open(), payload(SMALL, 1.0)
        message = stream.begin(gradient)
        first = stream.result()
        server.host.engine.leave("a", 1)  # as when its lease runs out
        worker.join()
        again = worker.open()
        again.replay(message, gradient)
        repeated = again.result()
        assert repeated.repeated
        assert (repeated.iteration, repeated.delay) == (first.iteration, first.delay)
        assert server.host.engine.iteration()[1] == 1
