"""The hot path over a real socket, spoken by a foreign client."""

from pathlib import Path

import pytest
import torch

from ormo_protos.limits import CHUNK_BYTES
from ormo_protos.manifest import BFLOAT16
from ormo_protos.v1 import parameter_server_pb2 as pb
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
    state_of,
    tensor_chunks,
)


def test_first_worker_gives_the_model_and_gets_it_back_with_its_buffers(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", start=2.0)
        welcome = worker.join()
        assert welcome.manifest.digest == SMALL.digest
        worker.pull(buffers=True)
        assert worker.params.tolist() == [2.0] * 9
        assert worker.float_buffers.tolist() == [2.0] * 3
        assert worker.int_buffers.tolist() == [2]


def test_one_stream_carries_many_exchanges_and_each_answer_is_the_state_after_its_gradient(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        stream = worker.open()
        stream.begin(None)
        stream.delivery()
        seen = []
        for _ in range(3):
            stream.begin(payload(SMALL, 1.0))
            result = stream.result()
            delivery = stream.delivery()
            assert delivery.iteration == result.iteration
            seen.append((result.iteration.number, result.delay, float(worker.params[0])))
        # SGD with momentum 0.5 and learning rate 1: steps of 1, 1.5, 1.75.
        assert seen == [(1, 0, -1.0), (2, 0, -2.5), (3, 0, -4.25)]


def test_parameters_come_with_the_learning_rate_that_is_in_force_for_workers_and_readers(tmp_path: Path) -> None:
    schedule = {"schedule": "milestones", "milestones": (2,), "milestone_factor": 0.5}
    with served(tmp_path, learning_rate=0.5, method="ormo-da", **schedule) as server, connected(server) as stub:
        worker, fresh = WireWorker(stub, "a"), WireWorker(stub, "b")
        worker.join()
        stream = worker.open()
        stream.begin(None)
        rates = [stream.delivery().learning_rate]
        for _ in range(3):
            stream.begin(payload(SMALL, 1.0))
            stream.result()
            rates.append(stream.delivery().learning_rate)
        assert rates == [0.5, 0.5, 0.5, 0.25]  # what came after two gradients is of the bucket before the milestone
        assert fresh.pull(ticket=False).learning_rate == 0.25


def test_last_gradient_may_come_without_a_wish_for_a_ticket(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        stream = worker.open()
        stream.begin(None)
        stream.delivery()
        stream.begin(payload(SMALL, 1.0), wants=False)
        assert stream.result().iteration.number == 1
        stream.finish()
        assert list(stream.call) == []


def test_unary_push_and_ticketed_pull_do_the_same(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        assert worker.push(payload(SMALL, 1.0)).iteration.number == 1
        delivery = worker.pull()
        assert worker.params.tolist() == [-1.0] * 9
        assert delivery.ticket.iteration == 1


def test_delay_and_lag_are_told_to_the_straggler(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        fast, slow = WireWorker(stub, "fast"), WireWorker(stub, "slow")
        for worker in (fast, slow):
            worker.join()
            worker.pull()
        for _ in range(4):
            fast.push(payload(SMALL, 1.0))
            fast.pull()
        result = slow.push(payload(SMALL, 1.0))
        # K = 2: after four gradients the newest applied bucket is ceil(3 / 2) = 2; the straggler's is 0.
        assert (result.delay, result.lag_buckets) == (4, 2)


def test_retry_on_a_new_stream_gets_the_result_again_and_a_new_ticket(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        first = worker.open()
        first.begin(None)
        first.delivery()
        gradient = payload(SMALL, 1.0)
        message = first.begin(gradient)
        applied, ticket = first.result(), first.delivery().ticket
        first.drop()
        again = worker.open()
        again.replay(message, gradient)
        repeated = again.result()
        assert repeated.repeated
        assert repeated.iteration == applied.iteration
        assert again.delivery().ticket.number > ticket.number
        assert state_of(server)[0] == 1


def test_gradient_that_stops_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE)
        worker.join()
        worker.pull()
        before = (server.host.engine.iteration(), server.host.engine.snapshot()[0].tensors["params"])
        stream = worker.open()
        gradient = payload(LARGE, 1.0)
        message = worker.exchange(gradient)
        stream.send(message)
        stream.send(pb.PushPullRequest(chunk=next(tensor_chunks(gradient))))
        eventually(lambda: received_bytes(server) > LARGE.sizes["parameters"] * 4)
        stream.drop()
        eventually(lambda: len(server.streams) == 0)
        assert server.host.engine.iteration() == before[0]
        assert torch.equal(server.host.engine.snapshot()[0].tensors["params"], before[1])
        # The ticket was not used up: the same request, whole, is applied.
        retry = worker.open()
        retry.replay(message, gradient)
        assert retry.result().iteration.number == 1


def test_worker_that_closes_its_side_in_the_middle_is_told(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE)
        worker.join()
        worker.pull()
        gradient = payload(LARGE, 1.0)
        push = pb.Push(requester=worker.requester(), gradient=worker.header(gradient))
        with pytest.raises(Refused, match=f"ended after {CHUNK_BYTES} of 12000000 bytes") as refused:
            worker.push_messages(push, iter([next(tensor_chunks(gradient))]))
        assert refused.value.reason == "BAD_PAYLOAD"
        assert server.host.engine.iteration()[1] == 0


def test_new_stream_of_a_slot_ends_the_old_one(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        old = worker.open()
        old.begin(None)
        old.delivery()
        new = worker.open()
        new.begin(None)
        new.delivery()
        with pytest.raises(Refused):
            old.receive()
        new.begin(payload(SMALL, 1.0))
        assert new.result().iteration.number == 1
        eventually(lambda: len(server.streams) == 1)


def test_non_finite_gradient_is_refused_counted_and_the_stream_goes_on(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        stream = worker.open()
        stream.begin(None)
        stream.delivery()
        before = state_of(server)[:4]
        stream.begin(payload(SMALL, float("nan")))
        result = stream.result()
        assert result.refusal == "NON_FINITE"
        assert "NaN or infinite" in result.refusal_message
        stream.delivery()
        assert state_of(server)[:4] == before
        assert stub.GetStatus(pb.GetStatusRequest()).refusals == {"NON_FINITE": 1}
        stream.begin(payload(SMALL, 1.0))
        assert stream.result().iteration.number == 1


def test_refused_gradient_leaves_its_ticket_to_another(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        before = state_of(server)
        with pytest.raises(Refused) as refused:
            worker.push(payload(SMALL, float("inf")))
        assert refused.value.reason == "NON_FINITE"
        assert state_of(server) == before
        assert worker.push(payload(SMALL, 1.0)).iteration.number == 1


def test_unknown_ticket_is_a_result_and_the_same_exchange_brings_a_new_one(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        stream = worker.open()
        stream.begin(None)
        stream.delivery()
        stream.begin(payload(SMALL, 1.0), ticket=pb.Ticket(epoch=1, number=77))
        assert stream.result().refusal == "TICKET_UNKNOWN"
        stream.delivery()
        stream.begin(payload(SMALL, 1.0))
        assert stream.result().iteration.number == 1
        assert server.host.engine.iteration()[1] == 1


def test_bfloat16_halves_the_bytes_both_ways(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull(dtype=BFLOAT16)
        assert worker.params.dtype == torch.bfloat16
        assert worker.push(payload(SMALL, 1.5, dtype=BFLOAT16)).iteration.number == 1
        assert worker.pull(dtype=BFLOAT16).payload_bytes == 24  # nine times two, padded to eight
        assert worker.params.tolist() == [-1.5] * 9
        assert server.host.engine.iteration()[1] == 1


def test_reader_gets_parameters_without_a_ticket_and_nothing_when_it_has_the_newest(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", start=1.0)
        worker.join()
        reader = WireWorker(stub, "reader")
        delivery = reader.pull(ticket=False, buffers=True)
        assert not delivery.HasField("ticket")
        assert reader.params.tolist() == [1.0] * 9
        assert reader.pull(ticket=False, newer_than=delivery.iteration).payload_bytes == 0
        other_epoch = pb.Iteration(epoch=delivery.iteration.epoch ^ 1, number=delivery.iteration.number)
        assert reader.pull(ticket=False, newer_than=other_epoch).payload_bytes > 0
        assert state_of(server)[4] == ()


def test_buffers_travel_with_the_push_and_are_averaged(tmp_path: Path) -> None:
    with served(tmp_path, bucket_size=4) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        worker.push(payload(SMALL, 8.0, buffers=True))
        worker.pull(ticket=False, buffers=True)
        assert worker.float_buffers.tolist() == [2.0] * 3  # 0 + (8 - 0) / 4
        assert worker.int_buffers.tolist() == [8]


def test_synchronous_round_waits_for_all_and_opens_for_all(tmp_path: Path) -> None:
    with served(tmp_path, method="ssgdm", min_workers=2) as server, connected(server) as stub:
        a, b = WireWorker(stub, "a"), WireWorker(stub, "b")
        streams = []
        for worker in (a, b):
            worker.join()
            streams.append(worker.open())
            streams[-1].begin(None)
        for stream in streams:
            stream.delivery()
        streams[0].begin(payload(SMALL, 1.0))
        assert streams[0].result().iteration.number == 1
        streams[1].begin(payload(SMALL, 2.0))
        assert streams[1].result().iteration.number == 2
        for worker, stream in zip((a, b), streams, strict=True):
            assert stream.delivery().iteration.number == 2
            assert worker.params.tolist() == [-3.0] * 9


def test_death_of_the_one_that_all_wait_for_opens_the_next_round(tmp_path: Path) -> None:
    with (
        served(tmp_path, method="ssgdm", min_workers=2, failure_timeout_seconds=0.4) as server,
        connected(server) as stub,
    ):
        a, b = WireWorker(stub, "a"), WireWorker(stub, "b")
        a.join()
        b.join()
        stream, dead = a.open(), b.open()
        stream.begin(None)
        dead.begin(None)
        stream.delivery()
        dead.delivery()
        stream.begin(payload(SMALL, 1.0))
        stream.result()

        def heartbeat() -> bool:
            stub.Heartbeat(pb.HeartbeatRequest(worker="a", incarnation=1))
            return len(stub.GetStatus(pb.GetStatusRequest()).workers) == 1

        eventually(heartbeat)
        assert stream.delivery().iteration.number == 1
        with pytest.raises(Refused):
            dead.receive()
        assert server.metrics.upkeep.expired_workers._value.get() == 1


def test_end_of_the_run_is_told_to_all_and_kept_results_are_still_repeated(tmp_path: Path) -> None:
    with served(tmp_path, stop_after_gradients=1) as server, connected(server) as stub:
        a, b = WireWorker(stub, "a"), WireWorker(stub, "b")
        for worker in (a, b):
            worker.join()
        stream, other = a.open(), b.open()
        stream.begin(None)
        stream.delivery()
        other.begin(None)
        other.delivery()
        gradient = payload(SMALL, 1.0)
        message = stream.begin(gradient)
        assert stream.result().iteration.number == 1
        assert stream.receive().finished.iteration.number == 1
        other.begin(payload(SMALL, 1.0))
        assert other.result().refusal == "FINISHED"
        assert other.receive().WhichOneof("part") == "finished"
        stream.replay(message, gradient)
        assert stream.result().repeated
        with pytest.raises(Refused) as refused:
            WireWorker(stub, "late").join()
        assert refused.value.reason == "FINISHED"
        assert stub.Heartbeat(pb.HeartbeatRequest(worker="a", incarnation=1)).finished
        assert WireWorker(stub, "reader").pull(ticket=False).iteration.number == 1
        assert server.host.engine.finished.is_set()
