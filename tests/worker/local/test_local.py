"""What `ormo-local` finds out before it starts programs, and says when the system starts no more of them."""

import errno
import os
import re
import socket
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from ormo_runtime import logs
from ormo_worker.local import cli, cluster
from ormo_worker.local.cluster import Cluster, ClusterError, LocalSettings, refuse_unusable_task
from ormo_worker.local.exported import bytes_moved, delays_of


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAGAIN])
def test_a_program_that_can_not_be_started_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def scarce(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cluster, "Child", scarce)
    local = Cluster(LocalSettings(directory=tmp_path))
    with pytest.raises(ClusterError, match=rf"server can't be started \({os.strerror(number)}\): take fewer --workers"):
        local.start(print)


def test_programs_have_its_settings_as_flags_and_the_rest_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port for metrics is the server's: with the variable, too, each worker would want the same one and end."""
    for name, value in {"METRICS_LISTEN": "127.0.0.1:9464", "CONFIG": "local.toml", "JOURNAL": "true"}.items():
        monkeypatch.setenv(f"ORMO_{name}", value)
    started: list[tuple[Sequence[str], Mapping[str, str]]] = []

    def child(name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> NoReturn:
        started.append((arguments, environment))
        raise OSError(errno.EMFILE, "enough")

    monkeypatch.setattr(cluster, "Child", child)
    with pytest.raises(ClusterError):
        Cluster(LocalSettings(directory=tmp_path, metrics_listen="127.0.0.1:9464")).start(print)
    ((arguments, environment),) = started
    assert "127.0.0.1:9464" in arguments
    ours = {name: value for name, value in environment.items() if name.startswith("ORMO_")}
    assert ours.items() >= {("ORMO_JOURNAL", "true")}
    assert not ours.keys() & {"ORMO_METRICS_LISTEN", "ORMO_CONFIG"}
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_evaluations_are_read_in_either_form_of_log_and_what_a_task_prints_is_not(
    form: logs.LogFormat, capfd: pytest.CaptureFixture[str]
) -> None:
    facts = {"iteration": 3, "loss": 0.5, "accuracy": 0.25, "seconds": 2.0, "samples": 96}
    logs.announce("evaluation", facts, form)
    lines = ["loading the data took=long\n", *capfd.readouterr().out.splitlines(keepends=True)]
    told: list[dict[str, float]] = []
    cluster._report(SimpleNamespace(output=lines), told.append)  # type: ignore[arg-type]
    assert told == [facts]


def values_of(arguments: Sequence[str], *flags: str) -> list[str | None]:
    """What follows each of these flags; None for one that is not there."""
    return [arguments[arguments.index(flag) + 1] if flag in arguments else None for flag in flags]


@pytest.mark.parametrize(
    ("given", "server", "worker"),
    [
        ({}, ["ormo", None, None], [None, None]),
        ({"local_steps": 16}, ["local-ormo", None, "16"], ["adamw", "0.0003"]),
        (
            {"local_steps": 8, "inner": "muon", "inner_lr": 0.5, "method": "diloco", "learning_rate": 0.7},
            ["diloco", "0.7", "8"],
            ["muon", "0.5"],
        ),
    ],
)
def test_server_and_workers_are_told_of_local_steps(
    tmp_path: Path, given: dict[str, Any], server: list[str | None], worker: list[str | None]
) -> None:
    local = Cluster(LocalSettings(directory=tmp_path, **given))
    assert values_of(local._server_arguments(), "--method", "--learning-rate", "--local-steps") == server
    assert values_of(local._worker_arguments(0, 1.0), "--inner", "--inner-lr") == worker
    assert "--local-steps-by-speed" not in local._server_arguments()
    by_speed = LocalSettings(directory=tmp_path, local_steps=4, local_steps_by_speed=True)
    assert "--local-steps-by-speed" in Cluster(by_speed)._server_arguments()


@pytest.mark.parametrize(
    ("given", "updates"),
    [({}, 1500), ({"local_steps": 16}, 300), ({"local_steps": 16, "stop_after_gradients": 0}, 0)],
)
def test_a_run_that_is_not_told_its_end_is_shorter_with_local_steps(given: dict[str, Any], updates: int) -> None:
    local = Cluster(LocalSettings(**given))
    assert values_of(local._server_arguments(), "--stop-after-gradients") == [str(updates)]


METRICS = """
# TYPE ormo_received_bytes_total counter
ormo_received_bytes_total{method="PushPull"} 3e+06
ormo_received_bytes_total{method="PushGradient"} 500.0
ormo_received_bytes_total{method="OfferModel"} 7.0
ormo_sent_bytes_total{method="PushPull"} 4e+06
ormo_sent_bytes_total{method="PullParams"} 9e+06
ormo_sent_bytes_created{method="PushPull"} 1.7e+09
ormo_gradient_delay_iterations_bucket{le="0.0"} 3.0
ormo_gradient_delay_iterations_bucket{le="4.0"} 3.0
ormo_gradient_delay_iterations_bucket{le="6.0"} 8.0
ormo_gradient_delay_iterations_bucket{le="+Inf"} 9.0
"""


@pytest.mark.parametrize(
    ("page", "moved", "delays"), [(METRICS, 7_000_500, {0: 3, 6: 5, 7: 1}), ("nothing of that kind", None, {})]
)
def test_the_bytes_that_moved_are_those_of_gradients_and_of_parameters_with_tickets(
    page: str, moved: int | None, delays: dict[int, int]
) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    local = Cluster(LocalSettings())
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.handle_request).start()
        local.metrics_address = f"127.0.0.1:{server.server_port}"
        exported = local.metrics()
    assert bytes_moved(exported) == moved
    assert delays_of(exported) == delays


def test_where_nobody_serves_metrics_nothing_is_said_of_bytes() -> None:
    local = Cluster(LocalSettings(metrics_listen=""))
    assert bytes_moved(local.metrics()) is None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        local.metrics_address = f"127.0.0.1:{taken.getsockname()[1]}"
    assert bytes_moved(local.metrics()) is None


@pytest.mark.parametrize("given", [{"inner": "adamw"}, {"local_steps_by_speed": True}])
def test_flags_of_local_steps_without_their_number_are_one_sentence(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="are for local steps: say how many with --local-steps"):
        LocalSettings(**given)


UNUSABLE = {
    "an unknown tracker": (["--track", "wandb"], r"--track 'wandb' names no tracker: expected tensorboard:DIR"),
    "an unknown task": (["--task", "mnist"], r"there is no task named 'mnist': use one of digits"),
    "a data folder that is not there": (["--task", "image-folder", "--data-dir", "gone"], r"folder gone has no folder"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_what_can_not_be_used_is_said_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr("signal.signal", lambda *_: None)  # signals are the test runner's
    monkeypatch.setattr(cluster, "Child", lambda *_: pytest.fail("a program was started"))
    flags, sentence = UNUSABLE[what]
    assert cli.main(flags) == 1
    assert re.search(sentence, capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_can_be_used_is_looked_at_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\nfrom pathlib import Path\nfrom ormo_worker.tasks.digits import Digits\n"
        "def task(*, data_dir):\n    Path('seen').write_text(f'{data_dir} {os.getpid()}')\n    return Digits()\n"
    )
    monkeypatch.chdir(tmp_path)
    refuse_unusable_task(LocalSettings(task="mine.py:task", data_dir=Path("here")))
    folder, pid = (tmp_path / "seen").read_text().split()
    assert folder == "here"
    assert int(pid) != os.getpid()


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("raise RuntimeError('no data today')", r"(?s)Traceback.*RuntimeError: no data today"),
        ("import sys; sys.exit(3)", r"the task 'mine:Task' made Python exit with code 3 while it was loaded"),
    ],
    ids=["fails", "ends without a word"],
)
def test_what_a_task_does_instead_of_being_made_is_said(
    monkeypatch: pytest.MonkeyPatch, program: str, sentence: str
) -> None:
    monkeypatch.setattr(cluster, "_LOOK", program)
    with pytest.raises(ClusterError, match=sentence):
        refuse_unusable_task(LocalSettings(task="mine:Task"))
