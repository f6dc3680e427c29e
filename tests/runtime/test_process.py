"""What stands round a program: terminals that lack letters, and variables that are meant for other programs."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ormo_runtime.process import PatientStream, prepare_process
from ormo_server.cli import main as server
from ormo_server.sim.cli import main as sim
from ormo_worker.cli import main as worker
from ormo_worker.local.cli import main as local
from service.wire import SMALL, WireWorker, connected, payload, served

Main = Callable[[Sequence[str]], int]

HELPS: list[tuple[Main, list[str]]] = [
    *((server, [command, "--help"]) for command in ("serve", "status", "top", "control")),
    *((worker, [command, "--help"]) for command in ("run", "evaluate")),
    *((sim, [*command, "--help"]) for command in ([], ["plot"], ["reproduce"])),
    (local, ["--help"]),
    (server, ["--help"]),
    (worker, ["--help"]),
]


ENCODINGS = ["ascii", "latin-1"]


def printed(encoding: str, program: Callable[[], object]) -> str:
    """What it prints on a terminal that lacks most letters."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(terminal):
        program()
        terminal.flush()
    assert isinstance(terminal.buffer, io.BytesIO)
    return terminal.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("main", "argv"), HELPS)
def test_help_is_printed_where_the_terminal_lacks_letters(encoding: str, main: Main, argv: list[str]) -> None:
    def program() -> None:
        with contextlib.suppress(SystemExit):
            main(argv)

    said = printed(encoding, program)
    assert "usage: ormo-" in said
    assert "\\u" not in said
    assert argv != ["serve", "--help"] or "lambda; workers add" in " ".join(said.split())


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("argv", [["status"], ["top", "--once", "--every-seconds", "0.1"]])
def test_a_server_is_shown_where_the_terminal_lacks_letters(tmp_path: Path, encoding: str, argv: list[str]) -> None:
    with (
        served(tmp_path / "日", update_rule="sgd", step_scale="inverse") as run,
        connected(run) as stub,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("signal.signal", lambda *_: None)  # signals are the test runner's
        member = WireWorker(stub, "w")
        member.join()
        member.pull()
        member.push(payload(SMALL, 1.0))
        assert run.host.checkpoint()
        said = printed(encoding, lambda: server([*argv, "--server", run.address]))
    assert "sgd x inverse x asynchronous" in said.replace("×", "x")
    assert argv == ["top", *argv[1:]] or "/\\u65e5/checkpoint-" in said


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_simulation_is_shown_where_the_terminal_lacks_letters(tmp_path: Path, encoding: str) -> None:
    flags = ["--workers", "1", "--stop-after-gradients", "2", "--train-samples", "10", "--test-samples", "10"]
    said = printed(encoding, lambda: sim([*flags, "--no-plots", "--directory", str(tmp_path / "日λ")]))
    assert f"results  {tmp_path}/\\u65e5lambda" in said


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_letters_of_others_are_escapes(encoding: str) -> None:
    def program() -> None:
        prepare_process()
        sys.stdout.write("日 – β \udcff\n")

    assert printed(encoding, program) == "\\u65e5 - beta \\udcff\n"


def test_a_line_of_the_log_is_in_the_terminal_s_encoding() -> None:
    reader, writer = os.pipe()
    PatientStream(writer, encoding="latin-1").write("läuft: λ\n")
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == b"l\xe4uft: \\u03bb\n"


PAGE = """
import sys
from ormo_runtime.process import prepare_process
if sys.argv[1] == "a program":
    prepare_process()
import torch
from prometheus_client import generate_latest
from ormo_server.metrics import Metrics
from ormo_worker.metrics import WorkerMetrics
worker, server = WorkerMetrics("w", torch.device("cpu")), Metrics()
for metrics in (worker, WorkerMetrics("w", torch.device("cpu"))):
    metrics.note_exchange((), "applied")
    metrics.note_retry("OK")
print(generate_latest(worker.registry).decode() + generate_latest(server.registry).decode())
"""


def page(kind: str, folder: Path | None) -> list[str]:
    """What server and worker export, but for what the process itself changes."""
    others = {name: value for name, value in os.environ.items() if "multiproc" not in name.lower()}
    environment = others | ({} if folder is None else {"PROMETHEUS_MULTIPROC_DIR": str(folder)})
    command = [sys.executable, "-W", "error", "-c", PAGE, kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith(("process_", "ormo_server_", "python_"))]


def test_a_folder_for_shared_metrics_changes_nothing_of_what_is_exported(tmp_path: Path) -> None:
    plain = page("a program", None)
    assert 'ormo_worker_steps_total{outcome="applied"} 1.0' in plain
    assert page("a program", tmp_path) == plain
    assert not any(tmp_path.iterdir())
    assert page("a program", tmp_path / "not-there") == plain
    assert page("a library", tmp_path / "not-there") == plain


ENDS = """
import atexit, sys
from ormo_runtime.process import end_with

class Model:
    def __del__(self):
        print("taken apart")

model = Model()

def main():
    atexit.register(print, "functions for the end are called")
    print("what was printed is written", end=" ")
    if sys.argv[1:]:
        raise ValueError("and what was not caught is shown")
    return 3

end_with(main)
"""


def test_a_program_ends_with_its_code_and_takes_nothing_apart() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, check=False)
    assert ended.returncode == 3, ended.stderr
    assert ended.stdout == "what was printed is written functions for the end are called\n"


def test_what_a_program_did_not_catch_ends_it_as_ever() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDS, "raise"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "ValueError: and what was not caught is shown" in ended.stderr
    assert ended.stdout.endswith("taken apart\n")
