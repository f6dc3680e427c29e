"""What an operator may do to a run that goes on."""

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.cli import main
from security.authority import Authority, dialled, guarded
from service.wire import SMALL, Refused, WireWorker, connected, payload, refusals, served, state_of
from system.programs import Stage

RATE = pb.ControlRequest(set_learning_rate=pb.SetLearningRate(learning_rate=0.25))
CHECKPOINT = pb.ControlRequest(checkpoint=pb.CheckpointNow())


def test_a_checkpoint_is_on_disk_when_the_answer_comes(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        WireWorker(stub, "w").join()
        for _ in range(2):  # also where nothing has changed
            last = server.host.files.last_checkpoint
            answer = stub.Control(CHECKPOINT)
            assert (Path(answer.checkpoint_path) / "model.safetensors").exists()
            assert server.host.files.last_checkpoint is not last


@pytest.mark.parametrize("journal", [True, False])
def test_the_learning_rate_outlives_a_server_that_is_killed_at_once(tmp_path: Path, journal: bool) -> None:
    changes: dict[str, Any] = {"journal": journal, "bucket_size": 1, "method": "asgd", "momentum": 0.0}
    with served(tmp_path, **changes) as server, connected(server) as stub:
        worker = WireWorker(stub, "w")
        worker.join()
        worker.pull()
        worker.push(payload(SMALL, 1.0))
        assert stub.Control(RATE).iteration.number == 1
        # `served` closes it without a drain or a checkpoint, as a crash would.
    with served(tmp_path, **changes) as server, connected(server) as stub:
        worker = WireWorker(stub, "w", incarnation=2)
        worker.join()
        worker.pull()
        result = worker.push(payload(SMALL, 1.0))
        assert (result.iteration.number, result.learning_rate) == (2, 0.25)
        assert stub.GetStatus(pb.GetStatusRequest()).learning_rate == 0.25


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (pb.ControlRequest(), "without an action: expected checkpoint, drain or set_learning_rate"),
        (
            pb.ControlRequest(set_learning_rate=pb.SetLearningRate(learning_rate=-1)),
            "learning rate -1.0: expected 1e-15 to",
        ),
        (pb.ControlRequest(set_learning_rate=pb.SetLearningRate(learning_rate=float("nan"))), "learning rate nan"),
    ],
)
def test_what_can_not_be_done_is_refused_and_changes_nothing(
    request_: pb.ControlRequest, sentence: str, tmp_path: Path
) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        WireWorker(stub, "w").join()
        before = state_of(server)
        with pytest.raises(Refused, match=sentence) as refused, refusals():
            stub.Control(request_)
        assert refused.value.reason == "BAD_REQUEST"
        assert state_of(server) == before


def test_without_a_model_there_is_nothing_to_do(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        for request in (CHECKPOINT, RATE):
            with pytest.raises(Refused) as refused, refusals():
                stub.Control(request)
            assert refused.value.reason == "NOT_READY"
        assert not server.told_to_stop.is_set()


def test_a_checkpoint_that_can_not_be_written_is_said_to_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        WireWorker(stub, "w").join()
        monkeypatch.setattr(server.host, "checkpoint", lambda **_: False)
        with pytest.raises(Refused, match="no checkpoint of iteration 0 could be written") as refused, refusals():
            stub.Control(CHECKPOINT)
        assert refused.value.retry_seconds == 5.0


def test_what_an_operator_does_is_logged_with_the_name(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        guarded(tmp_path, authority) as server,
        dialled(server, authority.credentials("gpu-1")) as worker,
        dialled(server, authority.credentials("operator")) as operator,
        caplog.at_level(logging.INFO),
    ):
        WireWorker(worker, "gpu-1").join()
        operator.Control(RATE)
        operator.Control(pb.ControlRequest(drain=pb.Drain()))
        assert server.told_to_stop.is_set()
    told = {record.__dict__.get("action"): record for record in caplog.records if record.name.endswith("admin")}
    assert list(told) == ["set the learning rate to 0.25", "drain"]
    assert all(record.__dict__["caller"] == "operator" for record in told.values())
    (joined,) = [record for record in caplog.records if "joined" in record.message]
    assert joined.__dict__["caller"] == "gpu-1"


def test_the_rate_may_be_set_while_workers_push(tmp_path: Path) -> None:
    with served(tmp_path, method="asgd", momentum=0.0, journal=True) as server, connected(server) as stub:
        worker, over = WireWorker(stub, "w"), threading.Event()
        worker.join()

        def turn() -> None:
            while not over.is_set():
                stub.Control(RATE)

        turning = threading.Thread(target=turn)
        turning.start()
        try:
            for number in range(1, 60):
                worker.pull()
                assert worker.push(payload(SMALL, 1.0)).iteration.number == number
        finally:
            over.set()
            turning.join()


def test_the_command_does_it_with_real_processes(stage: Stage) -> None:
    server = stage.server(learning_rate=0.02)
    worker = stage.worker("w", task="digits")
    stage.until(lambda status: status.iteration.number > 5, "a few gradients")

    def control(*flags: str) -> str:
        command = stage.program("control", "control", "--server", stage.address, *flags, module="ormo_server")
        assert command.wait() == 0, command.log.read_text()
        assert command.process.stdout is not None
        return command.process.stdout.read()

    assert control("--checkpoint").startswith("checkpoint run/checkpoint-")
    assert "the learning rate is 0.005 from the next bucket on, at iteration" in control("--learning-rate", "0.005")
    stage.until(lambda status: status.learning_rate == 0.005, "the new learning rate")
    assert "the server drains and stops, at iteration" in control("--drain")
    assert server.wait() == 0
    again = stage.server(learning_rate=0.02)
    stage.until(lambda status: status.iteration.number > 5 and status.learning_rate == 0.005, "going on as it was")
    assert worker.terminate() == 0
    assert again.terminate() == 0


def test_a_refusal_is_no_silence_and_before_there_is_a_model_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(tmp_path) as server:
        assert main(["control", "--server", server.address, "--checkpoint"]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"ormo-server control: the server at {server.address} refused: ")
        assert "no answer" not in said.err
        assert main(["control", "--server", server.address, "--drain"]) == 0
        assert capsys.readouterr().out == "the server drains and stops; it has no model yet\n"


def test_the_command_takes_its_action_from_flags_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a pod it finds what is meant for `serve`, such as a rate, or the name of the server's settings file."""
    file = tmp_path / "serve.toml"
    file.write_text("learning-rate = 0.5\nmin-workers = 2\n")
    for name, value in {"LEARNING_RATE": "0.5", "DRAIN": "true", "CHECKPOINT": "true", "CONFIG": str(file)}.items():
        monkeypatch.setenv(f"ORMO_{name}", value)
    with served(tmp_path) as server, connected(server) as stub:
        WireWorker(stub, "w").join()
        assert main(["control", "--server", server.address, "--checkpoint"]) == 0
        assert capsys.readouterr().out.startswith("checkpoint ")
        assert main(["control", "--server", server.address, "--learning-rate", "0.25"]) == 0
        with pytest.raises(SystemExit, match="2"):
            main(["control", "--server", server.address])
        assert stub.GetStatus(pb.GetStatusRequest()).learning_rate == 0.25
        assert main(["control", "--server", server.address, "--drain"]) == 0
        assert server.told_to_stop.is_set()
    (sentence,) = capsys.readouterr().err.splitlines()
    assert (
        sentence == "ormo-server control: expected exactly one of the flags --checkpoint, --learning-rate and --drain"
    )


def test_the_command_says_what_it_needs_and_what_was_refused(stage: Stage) -> None:
    stage.server()
    for flags, code, sentence in (
        ((), 2, "expected exactly one of the flags --checkpoint, --learning-rate and --drain"),
        (("--drain", "--checkpoint"), 2, "exactly one of the flags --checkpoint"),
        (("--learning-rate", "0"), 2, "--learning-rate is '0'"),
        (("--checkpoint",), 1, "this server has no model yet"),
    ):
        command = stage.program(f"control{flags}", "control", "--server", stage.address, *flags, module="ormo_server")
        assert command.wait() == code
        assert sentence in command.log.read_text()


def test_a_rate_that_is_set_and_could_not_be_written_down_is_said_to_be_set_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with served(tmp_path) as server, connected(server) as stub, caplog.at_level(logging.INFO):
        WireWorker(stub, "w").join()
        monkeypatch.setattr(server.host, "checkpoint", lambda **_: False)
        sentence = r"is set to 0\.25, and a crash would undo it: no checkpoint"
        with pytest.raises(Refused, match=sentence) as refused, refusals():
            stub.Control(RATE)
        assert refused.value.reason == "NOT_READY"
        assert stub.GetStatus(pb.GetStatusRequest()).learning_rate == 0.25
    assert "'127.0.0.1' had the server set the learning rate to 0.25" in caplog.messages
