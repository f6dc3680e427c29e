"""The command line: settings, exit codes, and a sentence for whatever goes wrong."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ormo_worker
from ormo_protos.refusals import Reason
from ormo_runtime.settings import settings_table
from ormo_worker import cli
from ormo_worker.settings import EvaluateSettings, RunSettings
from service.wire import eventually
from system.programs import staged
from worker.fake_server import FakeServer, refuse


@pytest.fixture(autouse=True)
def _keep_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli.logging, "basicConfig", lambda **_: None)


def run(*argv: str) -> int:
    """The exit code of the command, as the shell would see it."""
    try:
        return cli.main(argv)
    except SystemExit as exit_:
        return int(exit_.code or 0)


MISTAKES = [
    ([], "ormo-worker: no command was given, expected run or evaluate"),
    (["train"], "ormo-worker: 'train' was given, expected run or evaluate"),
    (["run", "--sever", "x"], "ormo-worker run: unknown flag --sever: did you mean --server?"),
    (["run", "--server", "somewhere"], "ormo-worker run: --server is 'somewhere': expected HOST:PORT with a port"),
    (["run", "--server", "a:0"], "expected HOST:PORT with a port from 1 to 65535"),
    (["run", "--server", "a:70000"], "expected HOST:PORT with a port from 1 to 65535"),
    (["run", "--batch-size", "many"], "--batch-size is 'many': input should be a valid integer"),
    (["run", "--slow-factor", "0.5"], "--slow-factor is '0.5': input should be greater than or equal to 1"),
    (["run", "--device", "tpu"], "--device is 'tpu': expected auto, cpu, cuda, or cuda:N"),
    (["run", "--device", "cuda:1", "--processes", "2"], "each process takes the GPU of its own number"),
    (["run", "--amp", "fp8"], "--amp is 'fp8': input should be 'off', 'bfloat16' or 'float16'"),
    (["run", "--worker-id", "a b"], "--worker-id is 'a b': string should match pattern"),
    (["run", "--device", "cuda:99"], "ormo-worker run: --device is cuda:99, but PyTorch finds"),
    (["run", "--task", "nothing"], "ormo-worker run: there is no task named 'nothing'"),
    (["run", "--task", "worker.lines:Lines", "--data-dir", "/no"], "The data folder /no does not exist"),
    (["evaluate", "--metrics-listen", "9000"], "--metrics-listen is '9000': expected HOST:PORT"),
    (["evaluate", "--every-seconds", "0"], "--every-seconds is '0': input should be greater than 0"),
]


@pytest.mark.parametrize(("argv", "sentence"), MISTAKES)
def test_bad_settings_exit_with_2_and_a_sentence(
    capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_nobody_at_the_address_exits_with_1(capsys: pytest.CaptureFixture[str], command: str) -> None:
    arguments = ["--server", "127.0.0.1:1", "--connect-timeout-seconds", "0.1", "--task", "worker.lines:Lines"]
    assert run(command, *arguments) == 1
    assert f"ormo-worker {command}: no parameter server answered at 127.0.0.1:1 within" in capsys.readouterr().err


def test_a_worker_that_is_replaced_exits_with_3(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.told(("join", refuse("FAILED_PRECONDITION", Reason.REPLACED)))
    assert run("run", "--server", server.address, "--task", "worker.lines:Lines") == 3
    assert "a newer process has joined with this worker's id" in capsys.readouterr().err


def test_another_model_exits_with_1(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "--server", server.address, "--task", "worker.lines:Lines", "--leave-after-gradients", "1") == 0
    assert run("run", "--server", server.address, "--task", "digits") == 1
    assert "trains another model than this worker has" in capsys.readouterr().err


def test_what_is_no_sentence_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("ormo_worker.training.run", broken)
    with pytest.raises(ZeroDivisionError):
        run("run")


def test_settings_come_from_a_file_too(server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text(f'server = "{server.address}"\ntask = "worker.lines:Lines"\nleave-after-gradients = 2\n')
    assert run("run", "--config", str(file)) == 0
    assert server.iteration == 2


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "exit codes: 0 the run is over" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [RunSettings, EvaluateSettings])
def test_every_setting_has_a_meaning(settings: type[RunSettings]) -> None:
    rows = [row for row in settings_table(settings).splitlines() if row.startswith("| `--")]
    assert len(rows) == len(settings.model_fields)
    for row in rows:
        assert len(row.split(" | ")[-1]) > 10, row


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_makes_a_worker_leave_and_exit_with_0(
    server: FakeServer, tmp_path: Path, number: signal.Signals
) -> None:
    with staged(tmp_path) as stage:
        flags = ["--server", server.address, "--task", "worker.lines:Lines"]
        worker = stage.program("worker", "run", *flags, module="ormo_worker")
        eventually(lambda: server.iteration >= 3, 60.0)
        os.kill(worker.process.pid, number)
        code, error = worker.wait(30.0), worker.log.read_text()
    assert code == 0, error
    assert "interrupted: left the run" in error
    assert "Traceback" not in error
    assert server.asked[-1] == "leave"


def test_the_package_and_its_command_line_import_without_pytorch() -> None:
    script = "import sys, ormo_worker.cli; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0


def test_what_the_package_exports_is_there() -> None:
    for name in ormo_worker.__all__:
        assert getattr(ormo_worker, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Optimizer'"):
        _ = ormo_worker.Optimizer
