"""Real processes: what the project is for, from outside."""

import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker.tasks.digits import Digits
from system import linear_task
from system.programs import Program, Stage, as_flags

pytestmark = pytest.mark.timeout(300)  # three programs, with all that they import, on a busy machine

FINISHED = pb.GetStatusResponse.PHASE_FINISHED


def test_training_goes_on_while_one_worker_is_killed_and_another_joins(stage: Stage) -> None:
    server = stage.server(stop_after_gradients=3000, failure_timeout_seconds=1.0, learning_rate=0.02)
    # Slowed down, so that the newcomer has time to start before the end.
    first, second = stage.worker("first"), stage.worker("second", slow_factor=4)
    stage.until(lambda s: len(s.workers) == 2 and s.iteration.number > 50, "two workers train together")
    first.kill()
    status = stage.until(lambda s: [w.worker for w in s.workers] == ["second"], "the dead worker loses its lease")
    assert status.bucket_size == 1
    third = stage.worker("third")
    stage.until(lambda s: any(w.worker == "third" and w.applied > 0 for w in s.workers), "the newcomer takes part")
    stage.until(lambda s: s.phase == FINISHED, "the run ends", seconds=240.0)
    assert [second.wait(), third.wait()] == [0, 0]
    assert server.terminate() == 0
    digits = Digits()
    model = digits.build_model()
    model.load_state_dict(safetensors.torch.load_file(stage.model()), strict=True)
    model.eval()
    score = digits.score(model, digits.test_set().tensors)
    assert score.accuracy > 0.9


def test_synchronous_run_equals_single_process_sgd_with_momentum(stage: Stage) -> None:
    rounds, rate, momentum, decay = 20, 0.05, 0.9, 0.01
    shutil.copy(Path(linear_task.__file__), stage.folder)
    server = stage.server(
        method="ssgdm",
        min_workers=linear_task.WORKERS,
        learning_rate=rate,
        momentum=momentum,
        weight_decay=decay,
        stop_after_gradients=rounds * linear_task.WORKERS,
    )
    workers = [
        stage.worker(f"w{number}", {"BATCH_OF": str(number)}, task="linear_task.py:Linear", batch_size=8)
        for number in range(linear_task.WORKERS)
    ]
    assert [worker.wait() for worker in workers] == [0] * linear_task.WORKERS
    assert server.terminate() == 0

    expected = linear_task.model()
    # Every one of the three workers adds the decay to its gradient, and gradients are summed.
    optimizer = torch.optim.SGD(expected.parameters(), lr=rate, momentum=momentum, weight_decay=3 * decay)
    for _ in range(rounds):
        optimizer.zero_grad()
        sum(linear_task.loss(expected, linear_task.batch_of(number)) for number in range(3)).backward()
        optimizer.step()
    trained = linear_task.model()
    trained.load_state_dict(safetensors.torch.load_file(stage.model()), strict=True)
    assert trained.decode.weight is trained.encode.weight
    for name, value in expected.state_dict().items():
        got = trained.state_dict()[name]
        difference = (got - value).double().norm() / max(float(value.double().norm()), 1e-30)
        assert difference < 1e-5, (name, float(difference))
    assert not torch.equal(trained.encode.weight, linear_task.model().encode.weight)


def test_workers_ride_out_a_killed_server_and_one_that_is_stopped_in_order(stage: Stage) -> None:
    flags = {
        "stop_after_gradients": 700,
        "failure_timeout_seconds": 2.0,
        "checkpoint_seconds": 0.2,
        "learning_rate": 0.02,
    }
    server = stage.server(**flags)
    workers = [stage.worker(name) for name in ("a", "b")]
    stage.until(lambda s: s.iteration.number > 50 and s.checkpoint_iteration > 0, "training with a checkpoint")
    server.kill()
    server = stage.server(**flags)
    kept = stage.status().iteration.number
    assert kept > 0
    before = stage.until(lambda s: s.applied > 50, "training after the kill").iteration.number
    assert before > kept
    assert server.terminate() == 0
    server = stage.server(**flags)
    after = stage.status()
    assert after.iteration.number >= before, "a drain loses nothing"
    stage.until(lambda s: s.phase == FINISHED, "the run ends")
    assert [worker.wait() for worker in workers] == [0, 0]
    assert server.terminate() == 0


def test_worker_that_comes_back_under_its_name_replaces_the_old_one(stage: Stage) -> None:
    stage.server(failure_timeout_seconds=20.0)
    old = stage.worker("same")
    stage.until(lambda s: s.applied > 5, "the first one trains")
    new = stage.worker("same")
    assert old.wait() == 3
    assert "different worker ids" in old.log.read_text()
    applied = stage.status().applied
    stage.until(lambda s: s.applied > applied + 5, "the second one trains")
    assert new.process.poll() is None


def test_local_run_trains_evaluates_and_cleans_up(stage: Stage) -> None:
    flags = {
        "workers": 2,
        "slow": "1:3x",
        "stop_after_gradients": 250,
        "directory": "run",
        "evaluate_every_seconds": 0.5,
    }
    local = stage.program("local", *as_flags(flags), module="ormo_worker.local")
    code, output = local.printed()
    assert code == 0, output + local.log.read_text()
    accuracy = float(output.split("test accuracy")[1].split("%")[0])
    assert accuracy > 85
    assert "gradients  250 in" in output
    assert str(stage.model().relative_to(stage.folder)) in output
    Digits().build_model().load_state_dict(safetensors.torch.load_file(stage.model()), strict=True)


def local_run(stage: Stage) -> tuple[Program, list[int], int]:
    """A run that would not end, the ids of its processes, the server's first, and how far it was."""
    flags = {"workers": 2, "stop_after_gradients": 0, "directory": "run"}
    local = stage.program("local", *as_flags(flags), module="ormo_worker.local")
    assert local.process.stdout is not None
    stage.address = local.process.stdout.readline().split("server on ")[1].split(",")[0]
    reached = stage.until(lambda s: s.applied > 20, "local training").iteration.number
    children = Path(f"/proc/{local.process.pid}/task/{local.process.pid}/children").read_text().split()
    assert len(children) == 4  # server, two workers, evaluator
    return local, [int(child) for child in children], reached


def test_interrupted_local_run_keeps_a_checkpoint_and_leaves_no_process(stage: Stage) -> None:
    local, children, reached = local_run(stage)
    assert local.terminate(60) == 130
    assert not any(psutil.pid_exists(child) for child in children)
    assert int(stage.model().parent.name.rpartition("-")[2]) >= reached


def test_local_run_that_is_interrupted_twice_ends_at_once_and_leaves_no_process(stage: Stage) -> None:
    local, children, _ = local_run(stage)
    assert local.process.stdout is not None
    os.kill(children[0], signal.SIGSTOP)  # so that it does not stop in order
    os.kill(local.process.pid, signal.SIGINT)
    while "stopping: " not in (line := local.process.stdout.readline()):
        assert line
    os.kill(local.process.pid, signal.SIGINT)
    assert local.process.wait(20) == 130
    assert "stopping at once" in local.process.stdout.read()
    assert not any(psutil.pid_exists(child) for child in children)
