import os
import subprocess
import sys

import prometheus_client
import pytest

from deploy.docker.tree import FOLDER


def health(metrics_listen: str) -> subprocess.CompletedProcess[str]:
    # Isolated: the check must need nothing but Python.
    return subprocess.run(
        [sys.executable, "-I", str(FOLDER / "metrics_answer.py")],
        env={"PATH": os.environ["PATH"], "ORMO_METRICS_LISTEN": metrics_listen},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def port() -> int:
    """A port where metrics answered until just now."""
    server, thread = prometheus_client.start_http_server(0, addr="127.0.0.1")
    taken: int = server.server_port
    assert health(f"0.0.0.0:{taken}").returncode == 0
    server.shutdown()
    server.server_close()
    thread.join()
    return taken


def test_process_is_healthy_while_its_metrics_answer_and_not_after(port: int) -> None:
    ran = health(f"0.0.0.0:{port}")
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"no metrics on 0.0.0.0:{port}: ")
    assert "Traceback" not in ran.stderr


def test_process_without_metrics_is_not_asked() -> None:
    assert health("").returncode == 0
