"""A loop with accelerate trains as a worker."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ormo_worker import RemoteOptimizer, ServerSchedule
from ormo_worker.errors import OptionRefused
from worker.fake_server import LEARNING_RATE, FakeServer
from worker.models import line

accelerate = pytest.importorskip("accelerate", reason="`make test-integrations` installs it")
prepare: Any = importlib.import_module("ormo_worker.integrations.accelerate").prepare


@pytest.fixture
def model() -> nn.Linear:
    return line(weight=2.0)


def made(**options: Any) -> Any:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True, **options)


def square(model: nn.Linear) -> Tensor:
    """A loss whose gradient is the weight."""
    return 0.5 * (model.weight**2).sum()


def test_what_prepare_gives_steps_counts_and_is_finished_as_the_optimizer_in_it(
    server: FakeServer, model: nn.Linear
) -> None:
    server.stop_after = 3
    accelerator = made()
    with prepare(accelerator, RemoteOptimizer(model, server.address)) as optimizer:
        model = accelerator.prepare(model)
        assert accelerator.prepare(optimizer) is optimizer
        while not optimizer.finished:
            loss = square(model)
            accelerator.backward(loss)
            optimizer.step(samples=8, loss=loss)
            optimizer.zero_grad()
        assert (optimizer.iteration, optimizer.progress, optimizer.counted) == (3, 1.0, 3)
        with pytest.raises(AttributeError, match="nothing"):
            optimizer.nothing  # noqa: B018
    assert [(each.samples, each.loss) for each in server.announced] == [(8, 2.0), (8, 0.5), (8, 0.125)]


def test_accumulated_mini_batches_are_one_step_with_all_their_samples(server: FakeServer, model: nn.Linear) -> None:
    accelerator = made(gradient_accumulation_steps=2)
    with prepare(accelerator, RemoteOptimizer(model, server.address, batch_size=5)) as optimizer:
        model = accelerator.prepare(model)
        for loss, samples in [(1.0, 3), (2.0, 4), (3.0, None), (4.0, None)]:
            with accelerator.accumulate(model):
                accelerator.backward(loss * model.weight.sum())
                optimizer.step(samples=samples, loss=loss)
                optimizer.zero_grad()
    assert [(each.samples, each.loss) for each in server.announced] == [(7, 1.5), (5, 3.5)]
    assert [each.item() for each in server.gradients] == [1.5, 3.5]


def test_figures_that_are_none_are_refused_at_their_step(server: FakeServer, model: nn.Linear) -> None:
    with (
        prepare(made(), RemoteOptimizer(model, server.address)) as optimizer,
        pytest.raises(OptionRefused, match="samples"),
    ):
        optimizer.step(samples=-1)
    assert server.gradients == []


def test_the_first_gradient_after_load_state_is_of_the_servers_parameters(
    server: FakeServer, model: nn.Linear, tmp_path: Path
) -> None:
    accelerator = made()
    with prepare(accelerator, RemoteOptimizer(model, server.address)) as optimizer:
        model = accelerator.prepare(model)
        schedule = accelerator.prepare(ServerSchedule(optimizer))
        for step in range(3):
            accelerator.backward(square(model))
            optimizer.step()
            schedule.step()
            if step < 2:
                optimizer.zero_grad()
            if step == 0:
                accelerator.save_state(str(tmp_path / "old"))
        accelerator.load_state(str(tmp_path / "old"))
        assert schedule.scheduler.last_epoch == 1
        accelerator.backward(square(model))
        optimizer.step()
    assert [each.item() for each in server.gradients] == [2.0 * (1 - LEARNING_RATE) ** step for step in range(4)]


def test_the_servers_schedule_is_prepared_with_the_optimizer(server: FakeServer, model: nn.Linear) -> None:
    server.rate = 0.25
    accelerator = made()
    with prepare(accelerator, RemoteOptimizer(model, server.address)) as optimizer:
        model, schedule = accelerator.prepare(model, ServerSchedule(optimizer))
        server.rate = 0.125
        accelerator.backward(square(model))
        optimizer.step()
        schedule.step()
        assert schedule.get_last_lr() == [0.125]
        assert schedule.optimizers == [optimizer]


def test_with_inner_a_scheduler_of_torchs_sets_the_inner_optimizers_rate(server: FakeServer, model: nn.Linear) -> None:
    server.local_steps = 2
    accelerator = made()
    inner = torch.optim.AdamW(model.parameters(), lr=0.5)
    with prepare(accelerator, RemoteOptimizer(model, server.address, inner=inner)) as optimizer:
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
        model, schedule = accelerator.prepare(model, schedule)
        for _ in range(4):
            accelerator.backward(square(model))
            optimizer.step(samples=8)
            schedule.step()
            optimizer.zero_grad()
    assert inner.param_groups[0]["lr"] == 0.0
    assert [(each.local_steps, each.samples) for each in server.announced] == [(2, 16), (2, 16)]
