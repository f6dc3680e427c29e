"""The evaluator: a reader that follows a run to its end."""

import json
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_protos.refusals import Reason
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker import evaluation
from ormo_worker.errors import ModelMismatch, OptionRefused
from ormo_worker.pytorch.transfer import Staging
from ormo_worker.settings import EvaluateSettings
from ormo_worker.tasks import TaskError
from worker.fake_server import FakeServer, Fault, refuse
from worker.lines import Lines
from worker.models import Tied


@pytest.fixture
def training(server: FakeServer) -> FakeServer:
    """The server, in the middle of a run; its model is y = 0."""
    staging = Staging(Lines().build_model())
    server.manifest, server.model = staging.tensors.manifest, staging.snapshot()
    server.stop_after = 2
    return server


def settings(server: FakeServer, **more: Any) -> EvaluateSettings:
    return EvaluateSettings(
        server=server.address,
        task="worker.lines:Lines",
        device="cpu",
        batch_size=2,
        connect_timeout_seconds=5.0,
        **more,
    )


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rpartition(" seconds=")[0] for line in capsys.readouterr().out.splitlines()]


def test_one_evaluation_is_one_line(training: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation.run(settings(training, once=True))
    assert lines_of(capsys) == ["evaluation iteration=0 loss=42.0000 accuracy=0.0000"]
    assert training.members == {}


def test_with_json_logs_an_evaluation_is_a_record_of_numbers(
    training: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation.run(settings(training, once=True, log_format="json"))
    (said,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert {"time", "level", "logger", "seconds"} <= said.keys()
    assert (said["message"], said["iteration"], said["loss"], said["accuracy"], said["samples"]) == (
        *("evaluation", 0, 42.0, 0.0),
        training.samples,
    )


def test_it_evaluates_what_is_newer_until_the_run_is_over(
    training: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([lambda: None, lambda: train(training, 2.0), lambda: None, lambda: train(training, 3.0)])
    monkeypatch.setattr(evaluation.time, "sleep", lambda seconds: next(looks)())
    evaluation.run(settings(training, every_seconds=1e-6))
    assert lines_of(capsys) == [
        "evaluation iteration=0 loss=42.0000 accuracy=0.0000",
        "evaluation iteration=1 loss=4.6667 accuracy=0.0000",
        "evaluation iteration=2 loss=0.0000 accuracy=1.0000",
    ]
    assert training.asked == ["pull"] * 5


def test_each_evaluation_is_reported_to_the_server(training: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([lambda: train(training, 2.0), lambda: train(training, 3.0)])
    monkeypatch.setattr(evaluation.time, "sleep", lambda seconds: next(looks)())
    evaluation.run(settings(training, every_seconds=1e-6))
    told = [(e.iteration.epoch, e.iteration.number, round(e.loss, 4), e.accuracy) for e in training.evaluations]
    assert told == [(7, 0, 42.0, 0.0), (7, 1, 4.6667, 0.0), (7, 2, 0.0, 1.0)]


@pytest.mark.parametrize(
    "fault", [refuse("UNIMPLEMENTED"), refuse("INVALID_ARGUMENT", Reason.BAD_REQUEST)], ids=["unknown", "refused"]
)
def test_evaluation_that_the_server_does_not_take_ends_nothing(
    training: FakeServer, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    training.told(("report", fault))
    with caplog.at_level("INFO"):
        evaluation.run(settings(training, once=True))
    assert len(lines_of(capsys)) == 1
    assert "the server does not show the evaluation of iteration 0" in caplog.text


def train(server: FakeServer, weight: float) -> None:
    assert server.model is not None
    server.iteration += 1
    server.model.parameters.fill_(weight)


def test_the_end_is_noticed_before_the_next_evaluation_is_due(
    training: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        training.iteration = 2 if len(waits) == 3 else training.iteration

    monkeypatch.setattr(evaluation.time, "sleep", sleep)
    evaluation.run(settings(training, every_seconds=3600.0))
    assert waits == [1.0, 1.0, 1.0]
    assert [line.split()[1] for line in lines_of(capsys)] == ["iteration=0", "iteration=2"]


def test_it_waits_for_a_server_without_a_model(
    training: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = pb.GetStatusResponse(phase=pb.GetStatusResponse.PHASE_WAITING_FOR_MODEL)
    answers = iter([waiting, waiting, pb.GetStatusResponse(phase=pb.GetStatusResponse.PHASE_TRAINING)])
    monkeypatch.setattr(FakeServer, "GetStatus", lambda self, request, context: next(answers))
    monkeypatch.setattr(evaluation.time, "sleep", lambda seconds: None)
    evaluation.run(settings(training, once=True))
    assert len(lines_of(capsys)) == 1
    assert training.asked == ["pull"]


def test_buffers_are_evaluated_too(server: FakeServer) -> None:
    class Norm(Lines):
        def build_model(self) -> torch.nn.Module:
            return Tied()

        def score(self, model: torch.nn.Module, batch: Any) -> Any:
            assert isinstance(model, Tied)
            assert not model.training
            assert model.norm.running_mean.tolist() == [5.0] * 4
            return super().score(lambda inputs: inputs, batch)  # type: ignore[arg-type]

    trained = Tied()
    trained.norm.running_mean.fill_(5.0)
    staging = Staging(trained)
    server.manifest, server.model = staging.tensors.manifest, staging.snapshot()
    evaluator = evaluation.Evaluator(Norm(), torch.device("cpu"), 2)
    with evaluator.client(server.address, evaluation.Patience(5.0)) as client:
        (found,) = evaluation.evaluations(evaluator, client, 1.0, once=True)
    assert found.score.samples == 3


def test_the_metrics_are_served_while_it_runs(training: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pages: list[str] = []

    def look(seconds: float) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            pages.append(answer.read().decode())
        training.iteration = 2

    monkeypatch.setattr(evaluation.time, "sleep", look)
    before = set(threading.enumerate())
    evaluation.run(settings(training, metrics_listen=f"127.0.0.1:{port}"))
    for line in ("ormo_evaluator_duration_seconds_count 1.0", "ormo_evaluator_iteration 0.0"):
        assert line in pages[0].splitlines()
    assert not {thread for thread in set(threading.enumerate()) - before if "http" in thread.name}


def test_a_port_in_use_is_one_sentence(training: FakeServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OptionRefused, match=f"--metrics-listen is {listen}, but nothing can listen there"):
            evaluation.run(settings(training, metrics_listen=listen))


def test_another_tasks_model_is_an_error(training: FakeServer) -> None:
    with pytest.raises(ModelMismatch, match="give the server and this program the same model"):
        evaluation.run(settings(training, once=True).model_copy(update={"task": "digits"}))


def test_a_missing_data_folder_is_the_tasks_sentence(training: FakeServer, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="does not exist: correct --data-dir"):
        evaluation.run(settings(training, data_dir=tmp_path / "none"))
