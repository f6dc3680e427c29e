"""`ormo_server.local()`: a real server for notebooks and tests. Kernels are in tests/integrations/test_notebooks.py."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
import torch

import ormo_server
from ormo_server.core.errors import SettingsError
from ormo_server.from_python import ServerFailed
from ormo_worker import RemoteOptimizer
from system.programs import ENVIRONMENT, Stage


def train(address: str) -> int:
    """Make steps until the run is over; returns its iteration."""
    model = torch.nn.Linear(2, 1)
    with RemoteOptimizer(model, address) as optimizer:
        while not optimizer.finished:
            optimizer.zero_grad()
            model(torch.ones(4, 2)).square().mean().backward()
            optimizer.step()
    return optimizer.iteration


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_server_serves_as_told_and_leaves_nothing(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("ORMO_LEARNING_RATE", "0.5")  # is not for it
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    threads, processes = set(threading.enumerate()), children()
    with ormo_server.local(method="asgd", stop_after_gradients=5, milestones=(2, 3), journal=True) as address:
        stage.address = address
        status = stage.status()
        assert (status.method, status.settings.learning_rate) == ("asgd", 0.01)
        assert train(address) == 5
        assert len(list(tmp_path.glob("ormo-local-*"))) == 1
    assert set(threading.enumerate()) == threads
    assert children() == processes
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert not list(tmp_path.glob("ormo-local-*"))


def test_a_server_is_found_whatever_the_form_of_its_log(stage: Stage) -> None:
    with ormo_server.local(log_format="json", metrics_listen="127.0.0.1:0") as address:
        stage.address = address
        assert stage.status().phase == stage.status().PHASE_WAITING_FOR_MODEL


def test_a_directory_is_kept_and_goes_on_and_its_older_server_is_closed(
    stage: Stage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = ormo_server.local(directory=tmp_path / "run", stop_after_gradients=5)
    assert train(older.address) == 5
    newer = ormo_server.local(directory=tmp_path / "run", stop_after_gradients=7)
    try:
        assert "is closed: another takes its place" in caplog.text
        assert "stopped" in repr(older)
        stage.address = newer.address
        assert stage.status().iteration.number == 5
        older.close()  # again; nothing
    finally:
        newer.close()
    assert (tmp_path / "run" / "latest").exists()
    assert "drain" in newer.log.read_text()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"learning_rat": 0.1}, r"has no setting 'learning_rat': did you mean learning_rate\?"),
        ({"gpu": 1}, r"has no setting 'gpu'; `ormo-server serve --help` lists them"),
        ({"learning_rate": -1}, r"^ormo_server.local\(\): learning_rate is '-1': input should be greater than 0$"),
        ({"tls_cert": "a.pem"}, r"tls_cert and tls_key go together: give both, or neither"),
        ({"directory": "/proc/nowhere"}, r"can't write to /proc/nowhere \(.*\): make it writable, or choose another"),
    ],
)
def test_a_setting_that_can_not_be_used_is_one_sentence(given: dict[str, object], sentence: str) -> None:
    processes = children()
    with pytest.raises(SettingsError, match=sentence):
        ormo_server.local(**given)
    assert children() == processes


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    processes = children()
    with pytest.raises(ServerFailed, match=r"did not start: exit code 1; (?s:.*)nowhere.safetensors"):
        ormo_server.local(directory=tmp_path / "run", model=tmp_path / "nowhere.safetensors")
    assert children() == processes


def test_a_server_that_has_ended_by_itself_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    def killed() -> int:
        (pid,) = children() - processes
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # whose exit code it is for others to take
        return 0

    processes = children()
    with pytest.raises(ServerFailed, match=r"ended before it was closed: exit code -9"), ormo_server.local():
        killed()
    with pytest.raises(ZeroDivisionError), ormo_server.local():  # what came first is what is raised
        _ = 1 / killed()
    assert "ended before it was closed: exit code -9" in caplog.text


def test_a_program_that_is_killed_leaves_no_server_and_no_folder(tmp_path: Path) -> None:
    code = (
        "import tempfile, time, ormo_server\ntempfile.tempdir = '.'\n"
        "server = ormo_server.local()\nprint(server._process.pid, flush=True)\ntime.sleep(600)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        server = psutil.Process(int(program.stdout.readline()))
        assert list(tmp_path.glob("ormo-local-*"))
        program.kill()
    server.wait(60)
    assert not list(tmp_path.glob("ormo-local-*"))


def test_a_forked_program_that_ends_leaves_its_parents_server(stage: Stage) -> None:
    with ormo_server.local() as stage.address:
        pid = os.fork()
        if pid == 0:
            import weakref

            weakref.finalize._exitfunc()  # type: ignore[attr-defined]
            os._exit(0)
        os.waitpid(pid, 0)
        assert stage.status().version


def test_importing_the_package_imports_nothing_of_it() -> None:
    code = "import sys, ormo_server; print(sorted(name for name in sys.modules if re.match('torch|ormo_', name)))"
    done = subprocess.run([sys.executable, "-c", f"import re; {code}"], capture_output=True, text=True, check=True)
    assert done.stdout == "['ormo_server']\n"
    with pytest.raises(AttributeError, match=re.escape("module 'ormo_server' has no attribute 'remote'")):
        _ = ormo_server.remote
