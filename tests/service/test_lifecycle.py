"""A server's life: ports, health, checkpoints, restore and drain, in one process."""

import socket
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.core import deadlines
from ormo_server.core.errors import SettingsError
from ormo_server.service.server import LIVENESS_NAME, SERVICE_NAME, AddressInUseError, Server
from service.wire import (
    LARGE,
    SMALL,
    Refused,
    WireWorker,
    connected,
    eventually,
    payload,
    served,
    settings,
    tensor_chunks,
)

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def health(server: Server, name: str, timeout: float = 1.0) -> int:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=timeout).status)


def test_health_and_heartbeats_answer_within_a_second_with_a_stream_open_for_each_slot(tmp_path: Path) -> None:
    with served(tmp_path, max_workers=15, slots_per_worker=2, max_readers=4) as server, connected(server) as stub:
        WireWorker(stub, "w0").join()
        streams = [WireWorker(stub, "w0").open() for _ in range(30)]
        eventually(lambda: len(server.streams) == 30)
        started = time.monotonic()
        assert health(server, "") == SERVING
        stub.Heartbeat(pb.HeartbeatRequest(worker="w0", incarnation=1), timeout=1.0)
        stub.GetStatus(pb.GetStatusRequest(), timeout=1.0)
        WireWorker(stub, "w1").join()
        assert time.monotonic() - started < 1.0
        for stream in streams:
            stream.drop()


def test_health_names_are_registered_and_readiness_ends_with_the_drain(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        assert [health(server, name) for name in ("", SERVICE_NAME, LIVENESS_NAME)] == [SERVING] * 3
        server._health.set(SERVICE_NAME, NOT_SERVING)
        assert health(server, SERVICE_NAME) == NOT_SERVING


def test_port_in_use_is_said_in_one_sentence(tmp_path: Path) -> None:
    with served(tmp_path / "a") as first:
        second = Server(settings(tmp_path / "b", listen=first.address))
        with pytest.raises(AddressInUseError, match=rf"can't listen on {first.address}.*choose another --listen"):
            second.start()
        second.close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        third = Server(settings(tmp_path / "c", metrics_listen=address))
        with pytest.raises(AddressInUseError, match="can't serve metrics on"):
            third.start()
        third.close()


def test_metrics_are_served_over_http(tmp_path: Path) -> None:
    with served(tmp_path, metrics_listen="127.0.0.1:0") as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        worker.push(payload(SMALL, 1.0))
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as page:
            text = page.read().decode()
    for line in (
        'ormo_pushes_total{outcome="applied",reason=""} 1.0',
        'ormo_pulls_total{outcome="ticket",reason=""} 1.0',
        'ormo_refusals_total{reason="NON_FINITE"} 0.0',
        "ormo_iteration 1.0",
        "ormo_live_workers 1.0",
        "ormo_bucket_size 1.0",
        "ormo_samples_total 4.0",
        'ormo_gradient_delay_iterations_bucket{le="0.0"} 1.0',
        'ormo_exchange_stage_seconds_count{stage="apply"} 1.0',
        'ormo_received_bytes_total{method="OfferModel"} 64.0',  # the model with its buffers (40 + 16 + 8)
        'ormo_received_bytes_total{method="PushGradient"} 40.0',
        'ormo_sent_bytes_total{method="PullParams"} 40.0',
    ):
        assert line in text.splitlines(), line
    assert "ormo_lock_wait_seconds_count" in text


def test_drain_keeps_tickets_so_that_a_gradient_under_way_counts_after_the_restart(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        stream = worker.open()
        stream.begin(None)
        stream.delivery()
        stream.begin(payload(SMALL, 1.0))
        stream.result()
        ticket = stream.delivery().ticket
        before = server.host.engine.snapshot()[0].tensors
        assert server.drain()
        with pytest.raises(Refused) as refused:
            stream.receive()
        assert refused.value.code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
    with served(tmp_path) as server, connected(server) as stub:
        after = server.host.engine.snapshot()[0].tensors
        assert all(torch.equal(before[name], after[name]) for name in before)
        worker.stub, worker.ticket = stub, ticket
        result = worker.push(payload(SMALL, 1.0))
        assert result.iteration.number == 2
        assert result.iteration.epoch != ticket.epoch


def test_restart_without_a_drain_voids_tickets_and_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        worker.push(payload(SMALL, 1.0))
        assert server.host.checkpoint()
        worker.pull()
        worker.push(payload(SMALL, 1.0))  # lost: after the last checkpoint
        worker.pull()
    with served(tmp_path) as server, connected(server) as stub:
        assert server.host.engine.iteration()[1] == 1
        worker.stub = stub
        with pytest.raises(Refused) as refused:
            worker.push(payload(SMALL, 1.0))
        assert refused.value.reason == "TICKET_UNKNOWN"
        worker.pull()
        assert worker.push(payload(SMALL, 1.0)).iteration.number == 2


def test_result_lost_with_the_connection_is_repeated_after_a_drained_restart(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        stream = worker.open()
        message = stream.begin(payload(SMALL, 1.0), wants=False)
        applied = stream.result()
        assert server.drain()
    with served(tmp_path) as server, connected(server) as stub:
        worker.stub = stub
        again = worker.open()
        again.replay(message, payload(SMALL, 1.0))
        repeated = again.result()
        assert repeated.repeated
        assert repeated.iteration == applied.iteration
        assert server.host.engine.iteration()[1] == 1


def test_drain_ends_waiting_and_idle_streams_at_once(tmp_path: Path) -> None:
    with served(tmp_path, method="ssgdm", min_workers=3, drain_seconds=30.0) as server, connected(server) as stub:
        waiting, idle = WireWorker(stub, "waiting"), WireWorker(stub, "idle")
        waiting.join()
        idle.join()
        streams = [waiting.open(), idle.open()]
        streams[0].begin(None)
        eventually(lambda: len(server.host.engine._waiting._waiters) == 1)
        eventually(lambda: len(server.streams) == 2)
        started = time.monotonic()
        assert server.drain()
        assert time.monotonic() - started < 5.0
        with pytest.raises(Refused) as refused:
            streams[0].receive()
        assert refused.value.reason == "DRAINING"
        with pytest.raises(Refused):
            WireWorker(stub, "late").ask_to_join()


def test_slow_reader_does_not_hold_the_others(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        slow, fast = WireWorker(stub, "slow", LARGE), WireWorker(stub, "fast", LARGE)
        slow.join()
        fast.join()
        held = slow.open()
        held.begin(None)  # and nobody reads the twelve megabytes
        for _ in range(3):
            fast.pull()
            fast.push(payload(LARGE, 1.0))
        assert server.host.engine.iteration()[1] == 3
        held.drop()


def test_worker_whose_bytes_keep_coming_keeps_its_lease_without_heartbeats(tmp_path: Path) -> None:
    with served(tmp_path, failure_timeout_seconds=1.0) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE)
        worker.join()
        worker.pull()
        stream = worker.open()
        gradient = payload(LARGE, 1.0)
        stream.send(worker.exchange(gradient, wants=False))
        for chunk in tensor_chunks(gradient):
            time.sleep(0.25)  # six times: longer than the lease
            stream.send(pb.PushPullRequest(chunk=chunk))
        assert stream.result().iteration.number == 1


def test_stream_that_says_nothing_is_ended(tmp_path: Path) -> None:
    with served(tmp_path, failure_timeout_seconds=0.3) as server, connected(server) as stub:
        WireWorker(stub, "a").join()
        stream = WireWorker(stub, "a").open()
        with pytest.raises(Refused):
            stream.receive()
        eventually(lambda: len(server.streams) == 0)


def test_ticket_of_a_hung_worker_is_void_after_the_ticket_timeout(tmp_path: Path) -> None:
    changes = {"method": "ssgd", "min_workers": 2, "ticket_timeout_seconds": 0.3}
    with served(tmp_path, **changes) as server, connected(server) as stub:
        a, hung = WireWorker(stub, "a"), WireWorker(stub, "hung")
        a.join()
        hung.join()
        a.pull()
        hung.pull()
        a.push(payload(SMALL, 1.0))
        for number in range(1, 4):
            assert a.pull().iteration.number == number  # the first one when the hung worker's ticket is void
            a.push(payload(SMALL, 1.0))
        assert len(stub.GetStatus(pb.GetStatusRequest()).workers) == 2
        assert server.metrics.upkeep.expired_tickets._value.get() == 1  # no round after that had one for it


@pytest.mark.parametrize(
    "scheduler", [{"method": "ssgd"}, {"scheduler": "bounded-staleness", "staleness_bound": 0}], ids=str
)
def test_also_before_the_first_push_a_ticket_is_out_for_a_limited_time(
    scheduler: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "FIRST_AUTOMATIC_SECONDS", 0.2)
    with served(tmp_path, **scheduler) as server, connected(server) as stub:
        idle, a = WireWorker(stub, "idle"), WireWorker(stub, "a")
        idle.join()
        idle.pull()
        eventually(lambda: server.metrics.upkeep.expired_tickets._value.get() == 1)
        a.join()
        a.pull()
        assert a.push(payload(SMALL, 1.0)).iteration.number == 1


def test_a_worker_joins_a_round_that_waits_for_an_idle_one_and_is_not_kept_waiting(tmp_path: Path) -> None:
    with served(tmp_path, method="ssgd", min_workers=2) as server, connected(server) as stub:  # no ticket lapses soon
        a, idle, late = (WireWorker(stub, name) for name in ("a", "idle", "late"))
        for worker in (a, idle):
            worker.join()
        for worker in (a, idle):
            worker.pull()
        a.push(payload(SMALL, 1.0))
        late.join()
        assert late.pull().iteration.number == 0
        assert late.params.unique().tolist() == [0.0]  # as at the opening
        assert late.push(payload(SMALL, 1.0)).iteration.number == 2
        assert server.metrics.upkeep.expired_tickets._value.get() == 0


def test_checkpoint_of_another_rule_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        WireWorker(stub, "a").join()
        server.drain()
    with pytest.raises(SettingsError, match=r"'ormo'.*'sgd'.*same rule"):
        Server(settings(tmp_path, method="asgd"))


def test_concurrent_pushes_are_all_applied_exactly_once(tmp_path: Path) -> None:
    with served(tmp_path, momentum=0.0, max_workers=16) as server, connected(server) as stub:
        WireWorker(stub, "first").join()

        def work(number: int) -> None:
            worker = WireWorker(stub, f"w{number}")
            worker.join()
            stream = worker.open()
            stream.begin(None)
            stream.delivery()
            for _ in range(50):
                stream.begin(payload(SMALL, 1.0))
                stream.result()
                stream.delivery()
            stream.finish()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        state = server.host.engine.snapshot()[0]
        assert state.fields["iteration"] == 300
        assert state.tensors["params"].tolist() == [-300.0] * 9
        eventually(lambda: len(server.streams) == 0)


def test_without_memory_for_a_copy_a_checkpoint_fails_with_a_sentence_and_a_drain_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        worker.push(payload(SMALL, 1.0))
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "clone", no_memory)
            assert not server.host.checkpoint()
            assert (
                "no checkpoint was written, the earlier ones stay: this machine has no memory for a copy" in caplog.text
            )
            assert server.drain()
    with served(tmp_path) as server:
        assert server.host.engine.iteration()[1] == 1
