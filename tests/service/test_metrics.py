"""What Prometheus scrapes and what GetStatus says of the method: its name, its limits, and its own figures."""

import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as open_metrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.service.server import Server
from service.wire import SMALL, WireWorker, connected, eventually, payload, served


def exported(server: Server) -> list[str]:
    return generate_latest(server.metrics.registry).decode().splitlines()


def race(stub: ParameterServerStub) -> None:
    """K is 2: four gradients come without delay, then one with a delay of 4."""
    fast, slow = WireWorker(stub, "fast"), WireWorker(stub, "slow")
    for worker in (fast, slow):
        worker.join()
        worker.pull()
    for _ in range(4):
        fast.push(payload(SMALL, 1.0))
        fast.pull()
    slow.push(payload(SMALL, 1.0))


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
        assert f"ormo_method_info{{{line}}} 1.0" in exported(server)
        status = stub.GetStatus(pb.GetStatusRequest())
        said = f'method="{status.method}",scheduler="{status.scheduler}"'
        assert f'{said},step_scale="{status.step_scale}",update_rule="{status.update_rule}"' == line


def test_late_gradient_that_is_discarded_is_counted_and_the_limit_follows_the_bucket_size(tmp_path: Path) -> None:
    with served(tmp_path, method="ringmaster") as server, connected(server) as stub:
        race(stub)
        lines, status = exported(server), stub.GetStatus(pb.GetStatusRequest())
        assert "ormo_discard_limit 4.0" in lines
        assert 'ormo_pushes_total{outcome="discarded"} 1.0' in lines
        assert 'ormo_pushes_total{outcome="applied"} 4.0' in lines
        assert "ormo_step_scale_count 4.0" in lines
        assert (status.applied, status.discarded, status.iteration.number) == (4, 1, 4)
        WireWorker(stub, "third").join()
        assert "ormo_discard_limit 6.0" in exported(server)


@pytest.mark.parametrize(
    ("changes", "limits"),
    [
        ({}, set()),
        ({"discard_delay": 7}, {"ormo_discard_limit 7.0"}),
        ({"scheduler": "bounded-staleness", "staleness_bound": 0}, {"ormo_staleness_bound 0.0"}),
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


def test_run_without_a_trace_tells_nobody_of_its_inputs(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        WireWorker(stub, "a").join()
        with server.host.engine.inspect() as machine:
            assert machine.listener is None


def test_names_keep_the_rules_of_prometheus(tmp_path: Path) -> None:
    with served(tmp_path, method="ringmaster", scheduler="bounded-staleness", staleness_bound=8) as server:
        with connected(server) as stub:
            race(stub)
        text = open_metrics(server.metrics.registry).decode()
    families = list(text_string_to_metric_families(text))  # it is strict about types, suffixes and buckets
    assert len(families) > 25
    for family in families:
        assert re.fullmatch(r"ormo(_[a-z]+)+", family.name), family.name
        assert family.documentation.endswith("."), family.name
        assert not re.search(r"_(total|count|sum|bucket|info|ms|mb|milliseconds|percent)$", family.name), family.name
