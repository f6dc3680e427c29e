"""`ormo-server status`, and `top` where there is no screen."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from console.building import status, worker
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.cli import main
from ormo_server.console.status import as_plain
from service.wire import SMALL, WireWorker, connected, payload, served


def test_status_says_how_the_run_is_going(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(tmp_path, min_workers=2, stop_after_gradients=40) as server, connected(server) as stub:
        first = WireWorker(stub, "w0")
        first.join()
        assert main(["status", "--server", server.address]) == 0
        assert "progress  waiting for workers, iteration 0 of 40, 0 samples" in capsys.readouterr().out
        WireWorker(stub, "w1").join()
        first.pull()
        first.push(payload(SMALL, 1.0), compute_seconds=0.25, loss=0.5)
        evaluation = pb.Evaluation(iteration=stub.GetStatus(pb.GetStatusRequest()).iteration, loss=0.5, accuracy=0.75)
        stub.ReportEvaluation(pb.ReportEvaluationRequest(evaluation=evaluation))
        assert main(["status", "--server", server.address]) == 0
    said = capsys.readouterr().out
    for fact in (
        f"server  {server.address}, version ",
        "progress  training, iteration 1 of 40, 4 samples",
        "updates/s since the server started (1 applied)",
        "method  ormo: update rule ormo, step scale constant (mean 1), scheduler asynchronous",
        "model  9 parameters",
        "learning rate  1, K 2",
        "loss  0.5000",
        "evaluation  accuracy 75.0%, loss 0.5000 at iteration 1",
        "delay  mean 0.0, largest 0",
        "tickets  0 in flight, 0 slots waiting",
        "checkpoint  iteration 0, ",
        f" ago, {tmp_path}/checkpoint-",
        "refusals  none",
    ):
        assert fact in said, said
    table = said.split("\n\n")[1].splitlines()
    assert table[0].split()[:5] == ["worker", "rank", "slots", "updates", "delay"]
    assert table[2].split()[:8] == ["w0", "0", "1", "1", "0.0", "0", "0", "0.250"]
    assert table[3].split()[:5] == ["w1", "1", "1", "0", "0.0"]


def test_status_of_a_run_of_local_steps_says_how_many_and_how_many_each_worker_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(tmp_path, local_steps=1024) as server, connected(server) as stub:
        first = WireWorker(stub, "w0", local_steps=1024)
        first.join()
        first.pull()
        first.push(payload(SMALL, 1.0), local_steps=1000)
        assert main(["status", "--server", server.address]) == 0
    said = capsys.readouterr().out
    assert "scheduler asynchronous, up to 1,024 local steps" in said
    head, _, row = said.split("\n\n")[1].splitlines()[:3]
    assert (head.split()[:5], row.split()[:5]) == (
        ["worker", "rank", "slots", "updates", "steps"],
        ["w0", "0", "1", "1", "1,000"],
    )


def test_status_as_json_has_every_field_of_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        one = WireWorker(stub, "w0")
        one.join()
        one.pull()
        one.push(payload(SMALL, 1.0), loss=float("nan"))
        epoch = stub.GetStatus(pb.GetStatusRequest()).iteration.epoch
        assert main(["status", "--json", "--server", server.address]) == 0
    said = json.loads(capsys.readouterr().out, parse_constant=_no_json)
    assert set(said) == set(pb.GetStatusResponse.DESCRIPTOR.fields_by_name)
    assert set(said["workers"][0]) == set(pb.WorkerStatus.DESCRIPTOR.fields_by_name)
    assert set(said["settings"]) == set(pb.RunSettings.DESCRIPTOR.fields_by_name)
    assert said["phase"] == "training"
    assert said["iteration"] == {"epoch": f"{epoch:016x}", "number": 1}
    assert (said["samples"], said["applied"], said["workers"][0]["applied"]) == (4, 1, 1)
    assert said["loss"] is None, "NaN is no JSON"
    assert said["evaluation"] is None, "not set"
    assert said["refusals"] == {}
    assert said["settings"]["stop_after_gradients"] == 0


def _no_json(word: str) -> Any:
    raise AssertionError(f"{word} is no JSON")


def test_json_has_numbers_for_numbers_and_null_for_what_is_none() -> None:
    answer = status(
        worker("w", last_loss=float("inf"), push_age_seconds=0.0, applied=2**53),
        epoch=2**63 + 1,
        delay_mean=float("nan"),
        refusals={"B": 2, "A": 1},
        phase=99,
    )
    said = json.loads(json.dumps(as_plain(answer), allow_nan=False))
    assert said["phase"] == "phase_99"
    assert said["iteration"]["epoch"] == "8000000000000001"
    assert said["delay_mean"] is None
    assert list(said["refusals"].items()) == [("A", 1), ("B", 2)]
    (mine,) = said["workers"]
    assert (mine["last_loss"], mine["push_age_seconds"], mine["applied"]) == (None, 0.0, 2**53)


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["top"], ["top", "--once"]])
def test_a_server_that_does_not_answer_makes_it_exit_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)  # signals are the test runner's
    assert main([*command, "--server", "127.0.0.1:1", "--timeout-seconds", "2"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"ormo-server {command[0]}: no answer from 127.0.0.1:1 (")
    assert said.err.endswith("is the server up, and is this its address?\n")


def test_a_phase_that_only_a_newer_server_knows_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ormo_server.console.client.Asker.ask", lambda _: status(phase=99))
    assert main(["status"]) == 0
    assert "progress  phase 99, iteration 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["status", "--server", "somewhere"], "--server is 'somewhere': expected HOST:PORT with a port from 1"),
        (["status", "--timeout-seconds", "0"], "--timeout-seconds is '0': input should be greater than 0"),
        (["top", "--sort", "age"], "--sort is 'age': input should be 'delay', 'rate', 'silent' or 'worker'"),
        (["top", "--every-seconds", "0"], "--every-seconds is '0': input should be greater than or equal to 0.1"),
    ],
)
def test_bad_flags_exit_with_2_and_a_sentence(
    capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_top_in_a_pipe_prints_one_uncut_view_with_rates(tmp_path: Path) -> None:
    with served(tmp_path, max_workers=30) as server, connected(server) as stub:
        crowd = [WireWorker(stub, f"worker-{number}") for number in range(30)]
        for one in crowd:
            one.join()
        command = [sys.executable, "-m", "ormo_server", "top", "--server", server.address, "--every-seconds", "0.1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "0 updates/s, 0 samples/s" in done.stdout
    assert all(f"worker-{number} " in done.stdout for number in range(30))


def test_status_and_top_do_not_wait_for_pytorch() -> None:
    script = (
        "import sys; from ormo_server.cli import main; main(['status', '--server', '127.0.0.1:1']);"
        "import ormo_server.console.top; sys.exit('torch' in sys.modules)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 10
