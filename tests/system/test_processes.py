"""`ormo-worker run --processes 2`, and the same under torchrun: one worker in several processes."""

import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch

from docs.pages import example
from ormo_worker.processes import Place, Processes
from service.wire import eventually
from system import linear_task
from system.programs import Program, Stage, as_flags

pytestmark = pytest.mark.timeout(300)  # each starts three programs, with all that they import
PATIENT_SECONDS = 120.0
STEPS, RATE, MOMENTUM = 10, 0.1, 0.9
# Each of both processes has four of the eight samples in each step.
LINEAR = {"task": "linear_task.py:Linear", "batch_size": 4}


def worker(stage: Stage) -> Program:
    shutil.copy(Path(linear_task.__file__), stage.folder)
    return stage.worker("w", {"BATCH_OF": "1"}, processes=2, **LINEAR)


def torchrun(stage: Stage) -> Program:
    """The same, as the page says."""
    shutil.copy(Path(linear_task.__file__), stage.folder)
    shown = example("with/ddp.md", "torchrun").replace("127.0.0.1:50051", stage.address)
    command = shown.replace("--nproc-per-node 8", "--nproc-per-node 2").split()
    words = [*command[1:], *as_flags(LINEAR)]
    return stage.program("w", *words, module="torch.distributed.run", environment={"BATCH_OF": "1"})


def expected() -> dict[str, torch.Tensor]:
    """What one process makes of all eight samples."""
    model = linear_task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    for _ in range(STEPS):
        optimizer.zero_grad()
        linear_task.loss(model, linear_task.batch_of(1)).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("started", [worker, torchrun])
def test_two_processes_are_one_worker_that_trains_as_one_process_does(stage: Stage, started: Any) -> None:
    server = stage.server(learning_rate=RATE, momentum=MOMENTUM, stop_after_gradients=STEPS)
    made = started(stage)
    assert made.wait(PATIENT_SECONDS) == 0, made.log.read_text()
    assert stage.status().samples == STEPS * 8
    assert made.log.read_text().count(f"the run is over at iteration {STEPS}: {STEPS} gradients from this worker") == 1
    assert server.terminate() == 0
    assert server.log.read_text().count(" joined (rank 0, 1 slot)") == 1
    trained = safetensors.torch.load_file(stage.model())
    for name, value in expected().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-6)


def ranks_of(launcher: Program) -> list[psutil.Process]:
    """In the order in which they were started."""
    return sorted(psutil.Process(launcher.process.pid).children(), key=lambda rank: rank.pid)


def training(stage: Stage) -> tuple[Program, list[psutil.Process]]:
    stage.server(learning_rate=0.01, failure_timeout_seconds=5.0)
    launcher = worker(stage)
    stage.until(lambda status: status.applied >= 3, "they train")
    return launcher, ranks_of(launcher)


def test_a_process_that_is_killed_ends_the_worker_with_1_and_no_other(stage: Stage) -> None:
    launcher, ranks = training(stage)
    ranks[1].kill()
    assert launcher.wait(PATIENT_SECONDS) == 1
    assert "rank 1 of this worker's 2 processes has ended by signal 9" in launcher.log.read_text()
    assert not any(rank.is_running() for rank in ranks)
    stage.until(lambda status: not status.workers, "the worker is out of the run")


def test_a_signal_makes_all_processes_leave_and_the_worker_exit_with_0(stage: Stage) -> None:
    launcher, ranks = training(stage)
    assert launcher.terminate(PATIENT_SECONDS) == 0
    assert stage.status().workers == []
    log = launcher.log.read_text()
    assert "interrupted: left the run" in log
    assert "ERROR" not in log
    assert "Traceback" not in log
    assert not any(rank.is_running() for rank in ranks)


def test_processes_do_not_outlive_the_one_that_started_them(stage: Stage) -> None:
    launcher, ranks = training(stage)
    launcher.kill()
    eventually(lambda: not any(rank.is_running() for rank in ranks), PATIENT_SECONDS)
    assert stage.status().workers == []


def test_the_first_process_that_fails_says_how_all_end(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert Processes(["--server", "nowhere"], 2).run() == 2
    assert "--server is 'nowhere': expected HOST:PORT" in capfd.readouterr().err
    assert "of this worker's 2 processes has ended with code 2: the others end, too" in caplog.text


def test_a_process_learns_its_place_from_torchrun_and_from_nobody_else() -> None:
    numbers = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert Place.found(numbers) is None  # as operators of clusters set them
    assert Place.found(numbers | {"TORCHELASTIC_RUN_ID": "none"}) == Place(3, 8, 1, "env://")
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    assert Place.found(one) is None
