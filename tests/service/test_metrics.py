"""What Prometheus scrapes and what GetStatus says: the run, its workers, its method, where its time goes."""

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import Metric, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as open_metrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from ormo_protos.manifest import FLOAT32
from ormo_protos.tensors import Payload
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.core.errors import DiskFull
from ormo_server.journal import Journal
from ormo_server.metrics.families import STAGES
from ormo_server.metrics.process import memory_limit_bytes, resident_bytes
from ormo_server.metrics.view import WorkerObservation
from ormo_server.service.figures import _MOST_NOTED
from ormo_server.service.server import Server
from service.wire import SMALL, Refused, WireWorker, connected, eventually, payload, refusals, served


def exported(server: Server) -> list[str]:
    return generate_latest(server.metrics.registry).decode().splitlines()


def race(stub: ParameterServerStub) -> tuple[WireWorker, WireWorker]:
    """K is 2: four gradients come without delay from one worker, then one with a delay of 4 from the other."""
    fast, slow = WireWorker(stub, "fast"), WireWorker(stub, "slow")
    for worker in (fast, slow):
        worker.join()
        worker.pull()
    for _ in range(4):
        fast.push(payload(SMALL, 1.0))
        fast.pull()
    slow.push(payload(SMALL, 1.0))
    return fast, slow


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, 'method="ormo",scheduler="asynchronous",step_scale="constant",update_rule="ormo"'),
        ({"method": "ssgdm"}, 'method="ssgdm",scheduler="synchronous",step_scale="constant",update_rule="ormo"'),
        ({"method": "asgd-tau"}, 'method="asgd-tau",scheduler="asynchronous",step_scale="inverse",update_rule="sgd"'),
    ],
)
def test_method_is_named_before_there_is_a_model(tmp_path: Path, changes: dict[str, str], line: str) -> None:
    with served(tmp_path, **changes) as server, connected(server) as stub:
        (info,) = [one for one in exported(server) if one.startswith("ormo_settings_info{")]
        assert all(choice in info for choice in line.split(",")), info
        assert 'momentum="0.5"' in info
        assert 'bucket_size=""' in info
        status = stub.GetStatus(pb.GetStatusRequest())
        said = f'method="{status.method}",scheduler="{status.scheduler}"'
        assert f'{said},step_scale="{status.step_scale}",update_rule="{status.update_rule}"' == line


def test_late_gradient_that_is_discarded_is_counted_and_the_limit_follows_the_bucket_size(tmp_path: Path) -> None:
    with served(tmp_path, method="ringmaster") as server, connected(server) as stub:
        race(stub)
        lines, status = exported(server), stub.GetStatus(pb.GetStatusRequest())
        assert "ormo_discard_limit_iterations 4.0" in lines
        assert 'ormo_pushes_total{outcome="discarded",reason=""} 1.0' in lines
        assert 'ormo_pushes_total{outcome="applied",reason=""} 4.0' in lines
        assert "ormo_gradient_delay_iterations_count 5.0" in lines
        assert "ormo_step_scale_count 4.0" in lines
        assert (status.applied, status.discarded, status.iteration.number) == (4, 1, 4)
        # Who is slow is seen also where slow gradients are not applied.
        assert 'ormo_worker_last_delay_iterations{worker="slow"} 4.0' in lines
        assert 'ormo_worker_gradients_total{worker="slow"} 0.0' in lines
        assert any(line.startswith('ormo_worker_last_push_timestamp_seconds{worker="slow"}') for line in lines)
        WireWorker(stub, "third").join()
        assert "ormo_discard_limit_iterations 6.0" in exported(server)


@pytest.mark.parametrize(
    ("changes", "limits"),
    [
        ({}, set()),
        ({"discard_delay": 7}, {"ormo_discard_limit_iterations 7.0"}),
        ({"scheduler": "bounded-staleness", "staleness_bound": 0}, {"ormo_staleness_bound_iterations 0.0"}),
    ],
)
def test_only_limits_that_are_set_are_exported(tmp_path: Path, changes: dict[str, Any], limits: set[str]) -> None:
    with served(tmp_path, **changes) as server, connected(server) as stub:
        WireWorker(stub, "a").join()
        found = {line for line in exported(server) if line.startswith(("ormo_discard_limit", "ormo_staleness_bound"))}
        assert found == limits


def test_step_scales_of_applied_gradients_are_exported(tmp_path: Path) -> None:
    with served(tmp_path, method="asgd-tau", learning_rate=0.3) as server, connected(server) as stub:
        race(stub)
        lines, status = exported(server), stub.GetStatus(pb.GetStatusRequest())
        assert [line for line in lines if line.startswith("ormo_step_scale_bucket") and 'le="0.' not in line] == [
            'ormo_step_scale_bucket{le="1.0"} 5.0',
            'ormo_step_scale_bucket{le="2.0"} 5.0',
            'ormo_step_scale_bucket{le="5.0"} 5.0',
            'ormo_step_scale_bucket{le="10.0"} 5.0',
            'ormo_step_scale_bucket{le="+Inf"} 5.0',
        ]
        assert 'ormo_step_scale_bucket{le="0.2"} 0.0' in lines
        assert 'ormo_step_scale_bucket{le="0.5"} 1.0' in lines
        assert status.step_scale_mean == pytest.approx((4 * 1.0 + 1 / 4) / 5)


def test_status_tells_the_mean_lag_once_there_is_one(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        assert not stub.GetStatus(pb.GetStatusRequest()).HasField("lag_mean")
        race(stub)
        # With K = 2 the fast one's tickets are of buckets 0, 1, 1, 2, and the slow one's of 0.
        assert stub.GetStatus(pb.GetStatusRequest()).lag_mean == pytest.approx(2 / 5)


def test_learning_rate_that_a_schedule_ends_at_zero_has_no_scale(tmp_path: Path) -> None:
    with served(tmp_path, schedule="cosine", cosine_gradients=1) as server, connected(server) as stub:
        race(stub)
        assert stub.GetStatus(pb.GetStatusRequest()).learning_rate == 0.0
        assert stub.GetStatus(pb.GetStatusRequest()).applied == 5
        assert "ormo_step_scale_count 1.0" in exported(server)


def test_trace_that_a_full_disk_ends_is_counted_and_training_goes_on(tmp_path: Path) -> None:
    with served(tmp_path, trace=Path("/dev/full")) as server, connected(server) as stub:
        assert 'ormo_upkeep_failures_total{work="trace"} 0.0' in exported(server)
        race(stub)
        eventually(lambda: 'ormo_upkeep_failures_total{work="trace"} 1.0' in exported(server))
        late = WireWorker(stub, "late")
        late.join()
        late.pull()
        assert late.push(payload(SMALL, 1.0)).iteration.number == 6


def value(server: Server, series: str) -> float | None:
    """What a series shows; None if it is not there."""
    found = [line.rpartition(" ")[2] for line in exported(server) if line.rpartition(" ")[0] == series]
    return float(found[0]) if found else None


def test_figures_of_the_run_and_of_each_worker_are_those_of_the_race(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        assert value(server, 'ormo_run_phase{phase="waiting_for_model"}') == 1
        assert value(server, "ormo_iteration") is None
        before = time.time()
        race(stub)
        for series, expected in {
            'ormo_run_phase{phase="waiting_for_model"}': 0,
            'ormo_run_phase{phase="training"}': 1,
            "ormo_iteration": 5,
            "ormo_newest_bucket_number": 2,
            "ormo_bucket_size": 2,
            "ormo_learning_rate": 1,
            "ormo_live_workers": 2,
            "ormo_live_slots": 2,
            "ormo_tickets_in_flight": 1,
            "ormo_slots_waiting": 0,
            "ormo_model_parameters": 9,
            "ormo_model_bytes": 36,
            "ormo_joins_total": 2,
            "ormo_workers_without_series": 0,
            'ormo_worker_info{rank="1",slots="1",worker="slow"}': 1,
            'ormo_worker_last_delay_iterations{worker="slow"}': 4,
            'ormo_worker_max_delay_iterations{worker="slow"}': 4,
            'ormo_worker_smoothed_delay_iterations{worker="fast"}': 0,
            'ormo_worker_gradients_total{worker="fast"}': 4,
            'ormo_worker_samples_total{worker="fast"}': 16,
            'ormo_worker_gradient_norm{worker="slow"}': 3,
            "ormo_gradient_delay_iterations_sum": 4,
            "ormo_gradient_relative_delay_sum": 2,
            'ormo_gradient_relative_delay_bucket{le="1.5"}': 4,
            'ormo_gradient_relative_delay_bucket{le="2.0"}': 5,
            "ormo_gradient_staleness_seconds_count": 5,
            "ormo_gradient_norm_sum": 15,
            "ormo_samples_total": 20,
            'ormo_pulls_total{outcome="ticket",reason=""}': 6,
        }.items():
            assert value(server, series) == expected, series
        for worker in ("fast", "slow"):
            for when in ("heard", "push"):
                moment = value(server, f'ormo_worker_last_{when}_timestamp_seconds{{worker="{worker}"}}')
                assert moment is not None
                assert before - 1 < moment < time.time() + 1


def test_delay_of_a_worker_is_smoothed_by_a_tenth(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        _, slow = race(stub)  # its first delay is 4
        slow.pull()
        slow.push(payload(SMALL, 1.0))
        assert value(server, 'ormo_worker_smoothed_delay_iterations{worker="slow"}') == pytest.approx(4 - 0.4)
        worker = next(one for one in stub.GetStatus(pb.GetStatusRequest()).workers if one.worker == "slow")
        assert worker.smoothed_delay == pytest.approx(3.6)
        assert (worker.samples, worker.last_delay, worker.gradient_norm) == (8, 0, 3.0)
        assert worker.ticket_seconds > 0
        assert 0 <= worker.push_age_seconds < 10


def test_training_time_of_a_worker_is_that_from_its_first_ticket_to_its_last_gradient() -> None:
    seen = WorkerObservation()
    passed = []
    for now, ticket_seconds in ((10.0, 4.0), (13.0, 2.0), (12.5, 6.0), (20.0, 7.0)):
        seen.counted(0, now, ticket_seconds, compute_seconds=1.0)
        passed.append(seen.training_seconds)
    assert passed == [4.0, 7.0, 7.0, 14.0]
    assert seen.compute_seconds_sum == 4.0


def test_training_time_of_each_worker_is_exported(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        race(stub)
        for worker in ("fast", "slow"):
            seconds = value(server, f'ormo_worker_training_seconds_total{{worker="{worker}"}}')
            assert seconds is not None
            assert 0 < seconds < 60


def test_series_of_a_worker_go_with_it_and_come_back_with_it(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        race(stub)
        assert any('worker="slow"' in line for line in exported(server))
        stub.Leave(pb.LeaveRequest(worker="slow", incarnation=1))
        assert not any('worker="slow"' in line for line in exported(server))
        WireWorker(stub, "slow").join()
        assert value(server, 'ormo_worker_gradients_total{worker="slow"}') == 0
        assert value(server, 'ormo_worker_last_push_timestamp_seconds{worker="slow"}') is None
        assert value(server, 'ormo_worker_training_loss{worker="slow"}') is None


def test_only_so_many_workers_have_series(tmp_path: Path) -> None:
    with served(tmp_path, worker_series=2) as server, connected(server) as stub:
        for name in ("c", "b", "a"):
            WireWorker(stub, name).join()
        shown = {line.split('worker="')[1].split('"')[0] for line in exported(server) if 'worker="' in line}
        assert shown == {"c", "b"}  # they joined first
        assert value(server, "ormo_workers_without_series") == 1
        assert value(server, "ormo_live_workers") == 3


def test_each_stage_of_an_exchange_is_timed_once(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        stream = worker.open()
        stream.begin(None)
        stream.delivery()
        for _ in range(3):
            stream.begin(payload(SMALL, 1.0))
            stream.result()
            stream.delivery()
        stream.finish()
        eventually(lambda: value(server, 'ormo_exchange_stage_seconds_count{stage="send"}') == 4)
        counts = {stage: value(server, f'ormo_exchange_stage_seconds_count{{stage="{stage}"}}') for stage in STAGES}
        assert counts == {"receive": 3, "check": 3, "lock": 4, "apply": 3, "wait": 4, "copy": 4, "send": 4}
        assert value(server, 'ormo_sent_bytes_total{method="PushPull"}') == 4 * payload(SMALL, 0.0).layout.total_bytes
        assert value(server, 'ormo_received_bytes_total{method="PushPull"}') == 3 * 40  # 9 floats and padding


def test_a_join_that_took_effect_is_counted_though_the_journal_can_not_keep_it_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path, journal=True) as server, connected(server) as stub:
        WireWorker(stub, "first").join()

        def refuse(*_: object) -> None:
            raise DiskFull("there is no room")

        with monkeypatch.context() as full:
            full.setattr(Journal, "wait_durable", refuse)
            with refusals(), pytest.raises(Refused, match="DISK_FULL"):
                WireWorker(stub, "second").ask_to_join()
        assert value(server, "ormo_joins_total") == 2


def test_time_that_the_lock_is_held_and_waited_for_is_counted(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        race(stub)
        held = value(server, "ormo_lock_held_seconds_total")
        with server.host.engine.inspect():
            time.sleep(0.2)
        assert held is not None
        assert (value(server, "ormo_lock_held_seconds_total") or 0) - held > 0.2
        assert (value(server, "ormo_lock_wait_seconds_count") or 0) > 10


def refusal_of(worker: WireWorker, gradient: Payload, *, streaming: bool, **header: Any) -> str:
    """Why this gradient is refused."""
    try:
        if not streaming:
            worker.push(gradient, **header)
            return ""
        stream = worker.open()
        stream.begin(gradient, wants=False, **header)
        return stream.result().refusal
    except Refused as refused:
        return refused.reason


@pytest.mark.parametrize(
    ("number", "header", "reason"),
    [
        (math.nan, {}, "NON_FINITE"),
        (1.0, {"ticket": pb.Ticket(epoch=1, number=9)}, "TICKET_UNKNOWN"),
        (1.0, {"manifest_digest": b"other"}, "MANIFEST_DIGEST"),
        (1.0, {"samples": -1}, "BAD_REQUEST"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_refused_gradient_is_counted_once_with_its_reason(
    tmp_path: Path, number: float, header: dict[str, Any], reason: str, streaming: bool
) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        assert refusal_of(worker, payload(SMALL, number), streaming=streaming, **header) == reason
        assert value(server, f'ormo_refusals_total{{reason="{reason}"}}') == 1
        refused = [line for line in exported(server) if line.startswith('ormo_pushes_total{outcome="refused"')]
        assert [line for line in refused if not line.endswith(" 0.0")] == [
            f'ormo_pushes_total{{outcome="refused",reason="{reason}"}} 1.0'
        ]
        assert value(server, 'ormo_pushes_total{outcome="applied",reason=""}') == 0


def test_parameters_that_are_refused_are_counted_with_the_reason(tmp_path: Path) -> None:
    with served(tmp_path, stop_after_gradients=1) as server, connected(server) as stub:
        stranger = WireWorker(stub, "stranger")
        worker = WireWorker(stub, "a")
        worker.join()
        with pytest.raises(Refused):
            stranger.pull()
        worker.pull()
        worker.push(payload(SMALL, 1.0))
        with pytest.raises(Refused):
            worker.pull()
        assert value(server, 'ormo_pulls_total{outcome="refused",reason="NOT_A_MEMBER"}') == 1
        assert value(server, 'ormo_pulls_total{outcome="refused",reason="FINISHED"}') == 1
        assert value(server, 'ormo_run_phase{phase="finished"}') == 1


def test_calls_are_counted_by_method_and_code(tmp_path: Path) -> None:
    labels = 'grpc_method="{}",grpc_service="ormo.v1.ParameterServer",grpc_type="{}"'
    push, pull = labels.format("PushGradient", "client_stream"), labels.format("PullParams", "server_stream")
    status, both = labels.format("GetStatus", "unary"), labels.format("PushPull", "bidi_stream")
    with served(tmp_path) as server, connected(server) as stub:
        assert value(server, f"grpc_server_started_total{{{push}}}") == 0  # there from the start
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        worker.push(payload(SMALL, 1.0))
        with pytest.raises(Refused):
            worker.push(payload(SMALL, math.nan))
        stub.GetStatus(pb.GetStatusRequest())
        stream = worker.open()
        stream.begin(None)
        stream.delivery()
        eventually(lambda: value(server, f"grpc_server_started_total{{{both}}}") == 1)
        # The worker's own pull has all that it wants before the end comes: its code is chance.
        assert len(list(stub.PullParams(pb.PullParamsRequest(delivery=pb.DeliveryRequest(dtype=FLOAT32))))) == 2
        eventually(lambda: value(server, f"grpc_server_handling_seconds_count{{{pull}}}") == 2)
        assert (value(server, f'grpc_server_handled_total{{grpc_code="OK",{pull}}}') or 0) >= 1
        stream.finish()
        eventually(lambda: value(server, f'grpc_server_handled_total{{grpc_code="OK",{both}}}') == 1)
        for series, expected in {
            f"grpc_server_started_total{{{push}}}": 2,
            f'grpc_server_handled_total{{grpc_code="OK",{push}}}': 1,
            f'grpc_server_handled_total{{grpc_code="INVALID_ARGUMENT",{push}}}': 1,
            f'grpc_server_handled_total{{grpc_code="OK",{status}}}': 1,
            f"grpc_server_handling_seconds_count{{{status}}}": 1,
        }.items():
            assert value(server, series) == expected, series


def test_stream_that_is_dropped_while_it_waits_counts_as_cancelled(tmp_path: Path) -> None:
    both = 'grpc_method="PushPull",grpc_service="ormo.v1.ParameterServer",grpc_type="bidi_stream"'
    with served(tmp_path, method="ssgd") as server, connected(server) as stub:
        worker, other = WireWorker(stub, "a"), WireWorker(stub, "b")
        worker.join()
        other.join()
        worker.pull()
        stream = worker.open()
        stream.begin(payload(SMALL, 1.0))
        assert not stream.result().refusal
        stream.drop()  # The next ticket waits for the other's gradient.
        eventually(lambda: value(server, f'grpc_server_handled_total{{grpc_code="CANCELLED",{both}}}') == 1)


def test_call_of_a_method_that_nobody_serves_makes_no_series(tmp_path: Path) -> None:
    with served(tmp_path) as server, grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
            channel.unary_unary("/ormo.v1.ParameterServer/Guess")(b"")
        assert not any("Guess" in line for line in exported(server))


def test_checkpoint_s_size_age_and_duration_are_told(tmp_path: Path) -> None:
    with served(tmp_path, checkpoint_seconds=77) as server, connected(server) as stub:
        race(stub)
        assert server.host.checkpoint()
        last = server.host.files.last_checkpoint
        assert last is not None
        size = sum(file.stat().st_size for file in last.path.iterdir())
        assert value(server, "ormo_checkpoint_last_size_bytes") == size
        assert value(server, "ormo_checkpoint_iteration") == 5
        assert value(server, "ormo_checkpoint_interval_seconds") == 77
        assert value(server, "ormo_checkpoint_duration_seconds_count") == 2  # the model's, when it was offered
        written = value(server, "ormo_checkpoint_last_success_timestamp_seconds")
        assert written is not None
        assert abs(time.time() - written) < 10
        status = stub.GetStatus(pb.GetStatusRequest())
        assert 0 <= status.checkpoint_age_seconds < 10


def test_memory_build_and_streams_are_told(tmp_path: Path) -> None:
    with served(tmp_path, max_workers=3, slots_per_worker=2) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        stream = worker.open()
        stream.begin(None)
        stream.delivery()
        assert value(server, 'ormo_open_streams{kind="worker"}') == 1
        assert value(server, 'ormo_open_streams{kind="reader"}') == 0
        assert value(server, 'ormo_memory_need_bytes{part="state"}') == 2 * 36 + 20  # w and u, and buffers
        assert value(server, 'ormo_memory_need_bytes{part="exchanges"}') == 6 * (36 + 20)
        assert value(server, 'ormo_memory_need_bytes{part="checkpoint"}') == 2 * 36 + 20
        limit, resident = value(server, "ormo_memory_limit_bytes"), value(server, "process_resident_memory_bytes")
        assert limit is not None
        assert resident is not None
        assert limit > resident > 1e7
        status = stub.GetStatus(pb.GetStatusRequest())
        assert status.resident_bytes == pytest.approx(resident, rel=0.2)
        (build,) = [line for line in exported(server) if line.startswith("ormo_build_info{")]
        assert f'version="{status.version}"' in build
        stream.finish()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"max": "1000000\n", "meminfo": "MemTotal:  2000 kB\n"}, 1_000_000),
        ({"max": "max\n", "meminfo": "MemFree: 1 kB\nMemTotal:  2000 kB\n"}, 2_048_000),
        ({"max": "9223372036854771712\n", "meminfo": "MemTotal:  2000 kB\n"}, 2_048_000),
        ({"max": "5\n"}, 5),
        ({}, None),
    ],
)
def test_memory_limit_is_the_least_of_the_container_s_and_the_machine_s(
    tmp_path: Path, files: dict[str, str], expected: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert memory_limit_bytes((tmp_path / "max",), tmp_path / "meminfo") == expected


def test_resident_memory_is_read_in_pages(tmp_path: Path) -> None:
    (tmp_path / "statm").write_text("100 7 3 1 0 9 0\n")
    assert resident_bytes(tmp_path / "statm", page_bytes=4096) == 7 * 4096
    assert resident_bytes(tmp_path / "none") == 0


def report(stub: ParameterServerStub, epoch: int, number: int, loss: float, accuracy: float | None) -> None:
    iteration = pb.Iteration(epoch=epoch, number=number)
    evaluation = pb.Evaluation(iteration=iteration, loss=loss, accuracy=accuracy)
    with refusals():
        stub.ReportEvaluation(pb.ReportEvaluationRequest(evaluation=evaluation))


def test_evaluation_that_is_reported_is_shown_until_a_newer_one_comes(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        with pytest.raises(Refused, match="NOT_READY"):
            report(stub, 1, 1, 0.5, 0.9)
        race(stub)
        epoch = stub.GetStatus(pb.GetStatusRequest()).iteration.epoch
        assert value(server, "ormo_test_loss") is None
        assert not stub.GetStatus(pb.GetStatusRequest()).HasField("evaluation")
        report(stub, epoch, 4, 0.25, 0.75)
        assert value(server, "ormo_test_loss") == 0.25
        assert value(server, "ormo_test_accuracy") == 0.75
        assert value(server, "ormo_test_iteration") == 4
        report(stub, epoch, 3, 9.0, 0.1)  # an evaluator that was slower
        report(stub, epoch + 1, 5, 9.0, 0.1)  # of the server before its restart
        assert value(server, "ormo_test_iteration") == 4
        report(stub, epoch, 5, math.nan, None)
        assert math.isnan(value(server, "ormo_test_loss") or 0)
        assert value(server, "ormo_test_accuracy") is None
        shown = stub.GetStatus(pb.GetStatusRequest()).evaluation
        assert (shown.iteration.number, shown.HasField("accuracy")) == (5, False)


@pytest.mark.parametrize(("number", "accuracy"), [(-1, 0.5), (1, 1.5), (1, -0.1), (1, math.nan)])
def test_evaluation_outside_its_limits_is_refused_and_changes_nothing(
    tmp_path: Path, number: int, accuracy: float
) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        race(stub)
        epoch = stub.GetStatus(pb.GetStatusRequest()).iteration.epoch
        with pytest.raises(Refused, match=r"BAD_REQUEST.*expected an iteration of at least 0"):
            report(stub, epoch, number, 1.0, accuracy)
        assert value(server, "ormo_test_loss") is None


def families(server: Server) -> Iterator[Metric]:
    text = open_metrics(server.metrics.registry).decode()
    yield from text_string_to_metric_families(text)  # it is strict about types, suffixes and buckets


def test_names_keep_the_rules_of_prometheus(tmp_path: Path) -> None:
    with served(tmp_path, method="ringmaster", scheduler="bounded-staleness", staleness_bound=8) as server:
        with connected(server) as stub:
            race(stub)
        found = list(families(server))
    assert len(found) > 60
    for family in found:
        if family.name.startswith(("process_", "python_")):
            continue  # the library's own
        assert re.fullmatch(r"(ormo|grpc_server)(_[a-z]+)+", family.name), family.name
        assert family.documentation.endswith("."), family.name
        assert not re.search(r"_(total|count|sum|bucket|ms|mb|milliseconds|percent|created)$", family.name), family.name
        assert family.name.endswith("_info") <= (family.type == "info")


def test_what_is_described_is_what_is_exported(tmp_path: Path) -> None:
    with served(tmp_path, method="ringmaster", scheduler="bounded-staleness", staleness_bound=8) as server:
        with connected(server) as stub:
            race(stub)
            report(stub, stub.GetStatus(pb.GetStatusRequest()).iteration.epoch, 1, 1.0, 1.0)
        described = {family.name for family in server.metrics.run.describe()}
        assert described - {family.name for family in server.metrics.run.collect()} == {"ormo_training_loss"}
        assert {family.name for family in server.metrics.run.collect()} <= described


def test_gradients_are_counted_when_somebody_looks_and_do_not_heap_up_before(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", SMALL)
        worker.join()
        for _ in range(_MOST_NOTED + 3):
            worker.pull()
            worker.push(payload(SMALL, 1.0), samples=2)
        assert len(server.host.engine._figures._noted) == 3
        assert value(server, "ormo_samples_total") == 2 * (_MOST_NOTED + 3)
        assert value(server, "ormo_gradient_delay_iterations_count") == _MOST_NOTED + 3
        with server.host.engine.settled() as seen:
            assert seen.workers["a"].applied == _MOST_NOTED + 3
