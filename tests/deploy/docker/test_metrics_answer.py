import os
import subprocess
import sys
from pathlib import Path

import prometheus_client
import pytest

from deploy.docker.tree import FOLDER
from security.authority import Authority, guarded
from service.crashing import unserved
from service.wire import served


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


def test_server_with_tls_is_healthy(tmp_path: Path) -> None:
    with guarded(tmp_path, Authority(tmp_path), metrics_listen="127.0.0.1:0") as server:
        assert health(server.metrics_address).returncode == 0


# That is how the thread dies.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_server_that_can_not_take_calls_is_not_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tmp_path, metrics_listen="127.0.0.1:0") as server:
        assert health(server.metrics_address).returncode == 0
        unserved(server, monkeypatch)
        assert health(server.metrics_address).returncode == 1
