"""The probes' questions, put to a real server with the settings of the manifests."""

from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.kubernetes.rendering import RUNS, overlay, probes
from deploy.kubernetes.settings import settings
from ormo_server.config import ServerSettings
from ormo_server.service.server import Server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("name", RUNS)
def test_server_of_the_manifests_starts_and_answers_every_probe(name: str, tmp_path: Path) -> None:
    manifests = overlay(name)
    told = settings(manifests, manifests.server)
    assert isinstance(told, ServerSettings)
    server = Server(
        told.model_copy(update={"directory": tmp_path, "listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"})
    )
    server.start()
    try:
        with grpc.insecure_channel(server.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            asked = [probe["grpc"]["service"] for probe in probes(manifests.server.container)]
            assert len(asked) == 3
            for service in asked:
                answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
                assert answer.status == SERVING
    finally:
        assert server.drain()
