"""A client that is not ours: `buf curl`, which learns the service from reflection."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.rpc import error_details_pb2

from ormo_server.service.server import Server
from service.wire import served

BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")


def curl(server: Server, method: str, request: dict[str, object]) -> subprocess.CompletedProcess[str]:
    assert BUF is not None
    address = f"http://{server.address}/ormo.v1.ParameterServer/{method}"
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", json.dumps(request), address]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.skipif(BUF is None, reason="buf is not installed: pip install buf-bin")
def test_foreign_client_learns_the_service_calls_it_and_reads_its_refusals(tmp_path: Path) -> None:
    with served(tmp_path, reflection=True) as server:
        status = curl(server, "GetStatus", {})
        assert json.loads(status.stdout)["phase"] == "PHASE_WAITING_FOR_MODEL"
        joined = curl(server, "Join", {"worker": "foreign", "incarnation": "7", "protocolVersion": 1, "slots": 1})
        assert "modelWanted" in json.loads(joined.stdout)
        refused = curl(server, "Join", {"worker": "foreign", "incarnation": "7", "protocolVersion": 9})
        assert refused.returncode != 0
        error = json.loads(refused.stderr)
        assert error["code"] == "failed_precondition"
        assert "install the same version" in error["message"]
        info = error_details_pb2.ErrorInfo.FromString(base64.b64decode(error["details"][0]["value"] + "=="))
        assert (info.reason, info.domain) == ("PROTOCOL_VERSION", "ormo.v1")


@pytest.mark.skipif(BUF is None, reason="buf is not installed: pip install buf-bin")
def test_reflection_is_off_unless_asked_for(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        assert curl(server, "GetStatus", {}).returncode != 0
