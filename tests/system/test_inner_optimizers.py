"""Local steps through real processes: what they equal in a plain loop, and what becomes of them when one ends."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from ormo_worker import RemoteOptimizer
from system import counting_task, linear_task
from system.programs import Program, Stage

H, PUSHES = 5, 12
RATE, MOMENTUM, INNER_RATE = 0.7, 0.9, 0.01
LOCAL = {"update_rule": "ormo-nesterov", "bucket": "mean", "local_steps": H}
OUTER = {"learning_rate": RATE, "momentum": MOMENTUM}


def trained(stage: Stage, numbers: Sequence[int], **flags: Any) -> nn.Module:
    """The model that a server with these flags and these workers end with."""
    shutil.copy(Path(linear_task.__file__), stage.folder)
    server = stage.server(**OUTER | {"min_workers": len(numbers)} | flags)
    inner = {"inner": "adamw", "inner_lr": INNER_RATE, "inner_warmup": 0} if "local_steps" in flags else {}
    workers = [
        stage.worker(f"w{number}", {"BATCH_OF": str(number)}, task="linear_task.py:Linear", batch_size=8, **inner)
        for number in numbers
    ]
    assert [worker.wait() for worker in workers] == [0] * len(workers)
    assert server.terminate() == 0
    model = linear_task.model()
    model.load_state_dict(safetensors.torch.load_file(stage.model()), strict=True)
    return model


def diloco(numbers: Sequence[int], rounds: int) -> nn.Module:
    """Douillard et al. 2023, in one process: AdamW in each worker, SGD with Nesterov's momentum on their mean move."""
    outer = linear_task.model()
    stepper = torch.optim.SGD(outer.parameters(), lr=RATE, momentum=MOMENTUM, nesterov=True)
    workers = [linear_task.model() for _ in numbers]
    inner = [torch.optim.AdamW(worker.parameters(), lr=INNER_RATE) for worker in workers]
    for _ in range(rounds):
        stepper.zero_grad()
        for number, worker, optimizer in zip(numbers, workers, inner, strict=True):
            worker.load_state_dict(outer.state_dict())
            for _ in range(H):
                optimizer.zero_grad()
                linear_task.loss(worker, linear_task.batch_of(number)).backward()
                optimizer.step()
            for mean, moved in zip(outer.parameters(), worker.parameters(), strict=True):
                if mean.requires_grad:
                    move = (mean.detach() - moved.detach()) / len(numbers)
                    mean.grad = move if mean.grad is None else mean.grad + move
        stepper.step()
    return outer


def assert_equal(got: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        difference = (got.state_dict()[name] - value).double().norm() / max(float(value.double().norm()), 1e-30)
        assert difference < 1e-5, (name, float(difference))
    assert not torch.equal(got.encode.weight, linear_task.model().encode.weight)  # type: ignore[arg-type, union-attr]


def test_one_worker_equals_adamw_within_and_nesterov_without(stage: Stage) -> None:
    assert_equal(trained(stage, [0], stop_after_gradients=PUSHES, **LOCAL), diloco([0], PUSHES))


def test_three_workers_in_rounds_equal_diloco(stage: Stage) -> None:
    flags = LOCAL | {"scheduler": "synchronous", "stop_after_gradients": 3 * PUSHES}
    assert_equal(trained(stage, [0, 1, 2], **flags), diloco([0, 1, 2], PUSHES))


def test_gradients_in_step_equal_sgd_with_nesterovs_momentum_on_the_buckets_sum(stage: Stage) -> None:
    rounds, rate = 20, 0.02
    flags = {"method": "ssgdm", "update_rule": "ormo-nesterov", "learning_rate": rate}
    got = trained(stage, [0, 1, 2], stop_after_gradients=3 * rounds, **flags)
    expected = linear_task.model()
    optimizer = torch.optim.SGD(expected.parameters(), lr=rate, momentum=MOMENTUM, nesterov=True)
    for _ in range(rounds):
        optimizer.zero_grad()
        sum(linear_task.loss(expected, linear_task.batch_of(number)) for number in range(3)).backward()
        optimizer.step()
    assert_equal(got, expected)


def counting_worker(stage: Stage, **flags: Any) -> Program:
    """One that has made ten local steps of very many, of which the server knows nothing."""
    shutil.copy(Path(counting_task.__file__), stage.folder)
    stage.server(update_rule="ormo-nesterov", bucket="mean", local_steps=10**6, failure_timeout_seconds=20.0)
    worker = stage.worker("w", task="counting_task.py:Counting", batch_size=4, inner="sgd", slow_factor=1.0, **flags)
    stage.until(lambda _: (stage.folder / counting_task.TOLD).exists(), "the worker has made local steps")
    assert stage.status().applied == 0
    return worker


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_worker_that_is_told_to_stop_pushes_the_steps_that_it_has_made(stage: Stage, in_flight: int) -> None:
    worker = counting_worker(stage, in_flight=in_flight)
    assert worker.terminate() == 0
    status = stage.status()
    assert (status.applied, len(status.workers)) == (1, 0)
    assert status.samples >= 4 * counting_task.COMPUTED
    assert status.samples % 4 == 0
    assert "interrupted: left the run" in worker.log.read_text()


def test_a_worker_that_is_killed_loses_the_steps_that_it_has_made_and_no_more(stage: Stage) -> None:
    worker = counting_worker(stage)
    worker.kill()
    assert stage.status().applied == 0


@pytest.mark.parametrize(("journal", "lost"), [(False, 1), (True, 0)])
def test_steps_made_while_the_server_crashes_are_lost_and_said_unless_it_has_a_journal(
    stage: Stage, journal: bool, lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    flags = LOCAL | {"journal": journal, "checkpoint_seconds": 3600}
    server = stage.server(**flags)
    model = linear_task.model()
    inner = torch.optim.SGD(model.parameters(), lr=INNER_RATE)
    with RemoteOptimizer(model, stage.address, inner=inner, connect_timeout=20.0) as optimizer:
        for made in range(2 * H):
            if made == H - 1:
                server.kill()
                server = stage.server(**flags)
            optimizer.zero_grad()
            linear_task.loss(model, linear_task.batch_of(0)).backward()
            optimizer.step()
        assert optimizer.refusals == Counter({"TICKET_UNKNOWN": lost} if lost else {})
        assert (optimizer.counted, stage.status().iteration.number) == (2 - lost, 2 - lost)
    said = f"{H} local steps were lost, training continues: TICKET_UNKNOWN"
    assert (said in caplog.text) == bool(lost)


def test_workers_of_the_other_kind_are_turned_away_with_a_sentence(stage: Stage) -> None:
    server = stage.server(**LOCAL)
    plain = stage.worker("plain")
    assert plain.wait() == 1
    assert "give this worker an optimizer of its own, with inner= (ormo-worker: --inner)" in plain.log.read_text()
    server.terminate()
    stage.server(directory="other")
    local = stage.worker("local", inner="adamw")
    assert local.wait() == 1
    assert "start ormo-server with --local-steps, or leave out inner= (--inner)" in local.log.read_text()
    assert stage.status().workers == []
