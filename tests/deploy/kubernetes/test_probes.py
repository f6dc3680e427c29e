"""The probes' questions, put to a real server with the settings of the manifests."""

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.kubernetes.rendering import Manifests, overlay, probes
from deploy.kubernetes.settings import environment, settings
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.service.server import Server
from ormo_server.settings import ServerSettings
from security.authority import Authority, dialled
from service.wire import SMALL as MODEL
from service.wire import Refused, WireWorker, payload

SERVING = health_pb2.HealthCheckResponse.SERVING


@contextlib.contextmanager
def started(manifests: Manifests, directory: Path, **files: Any) -> Iterator[Server]:
    told = settings(manifests, manifests.server)
    assert isinstance(told, ServerSettings)
    here = {"directory": directory, "listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"}
    server = Server(told.model_copy(update=here | files))
    server.start()
    try:
        yield server
    finally:
        assert server.drain()


@pytest.mark.parametrize("name", ["local", "gpu"])
def test_server_of_the_manifests_starts_and_answers_every_probe(name: str, tmp_path: Path) -> None:
    manifests = overlay(name)
    with started(manifests, tmp_path) as server, grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        asked = [probe["grpc"]["service"] for probe in probes(manifests.server.container)]
        assert len(asked) == 3
        for service in asked:
            assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status == SERVING


def test_with_tls_the_manifests_server_answers_every_probe_and_takes_those_of_the_manifests(tmp_path: Path) -> None:
    """Certificates as cert-manager would make them, the access list and the workers' ids as they are."""
    manifests, authority = overlay("tls"), Authority(tmp_path)
    access = manifests.access
    (worker,) = manifests.pods("ormo-worker")
    with started(manifests, tmp_path / "run", **authority.server(access)) as server:
        paths = [probe["httpGet"]["path"] for probe in probes(manifests.server.container)]
        assert len(paths) == 3
        for path in paths:
            with urllib.request.urlopen(f"http://{server.metrics_address}{path}", timeout=10) as answer:
                assert answer.status == 200
        with dialled(server, authority.credentials("ormo-worker")) as stub:
            one = WireWorker(stub, environment(manifests, worker, 1)["ORMO_WORKER_ID"])
            one.join()
            one.pull()
            assert one.push(payload(MODEL, 1.0)).iteration.number == 1
            with pytest.raises(Refused, match="PERMISSION_DENIED"):
                WireWorker(stub, "somebody").join()
        with dialled(server, authority.credentials("ormo-evaluator")) as stub:
            assert WireWorker(stub, "evaluator").pull(ticket=False).payload_bytes
        with dialled(server, authority.credentials("ormo-operator")) as stub:
            assert stub.Control(pb.ControlRequest(checkpoint=pb.CheckpointNow())).checkpoint_path


def test_a_server_that_drains_is_alive_and_not_ready(tmp_path: Path) -> None:
    with started(overlay("local"), tmp_path) as server:
        server.stopping.set()
        with urllib.request.urlopen(f"http://{server.metrics_address}/alive", timeout=10) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError) as unready:
            urllib.request.urlopen(f"http://{server.metrics_address}/ready", timeout=10)
        assert unready.value.code == 503
        unready.value.close()
