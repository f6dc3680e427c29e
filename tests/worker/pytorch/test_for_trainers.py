"""What trainers of other libraries need of a `RemoteOptimizer`, which own the loop that calls `step`."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from ormo_worker import RemoteOptimizer, RunFinished, ServerSchedule
from ormo_worker.errors import OptionRefused
from worker.fake_server import LEARNING_RATE, LOST, FakeServer
from worker.models import Tied, line
from worker.pytorch.loops import backward, optimizer_of

# The learning rate


def test_groups_show_the_learning_rate_that_came_with_the_parameters(server: FakeServer, model: nn.Linear) -> None:
    server.rate = 0.25
    parts = [{"params": [model.weight], "weight_decay_scale": 0.5}]
    with optimizer_of(model, server, params=parts) as optimizer:
        (group,) = optimizer.param_groups
        assert (group["lr"], group.get("lr"), group.setdefault("lr", 1.0)) == (0.25, 0.25, 0.25)
        server.rate = 0.0  # as a cosine may end
        backward(model)
        optimizer.step()
        assert group["lr"] == 0.0


def test_an_older_servers_learning_rate_is_that_of_the_join(optimizer: RemoteOptimizer) -> None:
    assert optimizer.param_groups[0]["lr"] == LEARNING_RATE


def test_the_learning_rate_shown_is_not_part_of_the_state(server: FakeServer, optimizer: RemoteOptimizer) -> None:
    saved = optimizer.state_dict()
    assert list(saved["param_groups"][0]) == ["weight_decay_scale", "params"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == LEARNING_RATE
    assert copy.deepcopy(optimizer.param_groups[0])["lr"] == LEARNING_RATE


def test_the_servers_schedule_follows_the_server_and_changes_nothing(server: FakeServer, model: nn.Linear) -> None:
    server.rate = 0.25
    with optimizer_of(model, server) as optimizer:
        schedule = ServerSchedule(optimizer)
        assert schedule.get_last_lr() == schedule.base_lrs == [0.25]
        for rate in (0.125, 0.0625):
            server.rate = rate
            backward(model)
            optimizer.step()
            schedule.step()
            assert schedule.get_last_lr() == schedule.get_lr() == [rate]
        assert schedule.state_dict()["last_epoch"] == 2
        other = ServerSchedule(optimizer)
        other.load_state_dict(schedule.state_dict())
        assert (other.last_epoch, other.get_last_lr()) == (2, [0.0625])


def test_with_inner_the_schedule_shows_the_inner_optimizers_rate(server: FakeServer, model: nn.Linear) -> None:
    server.local_steps = 4
    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    with optimizer_of(model, server, inner=inner) as optimizer:
        schedule = ServerSchedule(optimizer)
        inner.param_groups[0]["lr"] = 0.125
        assert schedule.get_last_lr() == [optimizer.param_groups[0]["lr"]] == [0.125]


def test_a_schedule_of_something_else_is_refused() -> None:
    with pytest.raises(OptionRefused, match="given a Linear: expected the RemoteOptimizer whose learning rate"):
        ServerSchedule(line())  # type: ignore[arg-type]


# Samples and loss


def test_a_step_counts_what_was_noted_for_it_and_only_that_step(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    for _ in range(2):
        backward(model)
        optimizer.note_batch(samples=16, loss=torch.tensor(0.25))
        optimizer.step()
        backward(model)
        optimizer.step()
    assert [each.samples for each in server.announced] == [16, 1, 16, 1]
    assert [each.loss for each in server.announced if each.HasField("loss")] == [0.25, 0.25]


def test_a_step_goes_by_its_own_arguments_then_by_what_was_noted_in_its_closure(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    def closure() -> torch.Tensor:
        optimizer.note_batch(samples=16, loss=0.25)
        return backward(model)

    optimizer.step(closure)
    optimizer.step(closure, samples=2, loss=4.0)
    assert [(each.samples, each.loss) for each in server.announced] == [(16, 0.25), (2, 4.0)]


@pytest.mark.parametrize("figures", [{"samples": -1}, {"samples": 1.5}, {"loss": torch.zeros(2)}])
def test_figures_that_are_none_are_refused_when_they_are_noted(optimizer: RemoteOptimizer, figures: Any) -> None:
    with pytest.raises(OptionRefused):
        optimizer.note_batch(**figures)


# The end


def test_a_quiet_end_lets_further_steps_do_nothing(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    server.stop_after = 1
    optimizer.quiet_end = True
    backward(model)
    optimizer.step()
    assert optimizer.finished
    weight = model.weight.item()
    with torch.no_grad():
        loss = optimizer.step(lambda: backward(model, 3.0))
    assert loss.item() == 3.0 * weight
    assert optimizer.step() is None
    assert (len(server.gradients), model.weight.item()) == (1, weight)
    optimizer.quiet_end = False
    with pytest.raises(RunFinished):
        optimizer.step()


# A checkpoint of the trainer's


def test_reloading_puts_the_servers_parameters_back_and_drops_gradients(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer, caplog: pytest.LogCaptureFixture
) -> None:
    backward(model)
    optimizer.step()
    nn.init.constant_(model.weight, 9.0)
    backward(model, 100.0)
    optimizer.reload()
    assert model.weight.item() == 2.0 - LEARNING_RATE
    assert model.weight.grad is None
    (0.5 * model.weight.square()).sum().backward()  # the gradient is the weight
    optimizer.step()
    assert server.gradients[-1].item() == 2.0 - LEARNING_RATE
    assert caplog.messages == []


def test_reloading_asks_for_buffers_that_came_long_ago(server: FakeServer) -> None:
    model = Tied()
    old = copy.deepcopy(model.state_dict())
    with optimizer_of(model, server) as optimizer:
        for _ in range(2):  # the parameters that the model has by then came without buffers
            optimizer.zero_grad()
            model(torch.randn(6, 3)).square().mean().backward()
            optimizer.step()
        new = copy.deepcopy(model.state_dict())
        model.load_state_dict(old)
        optimizer.reload()
        assert server.model is not None
        assert model.norm.num_batches_tracked.item() == server.model.int_buffers[-1].item() == 2
        assert model.embedding.weight.equal(new["embedding.weight"])
        assert not model.norm.running_mean.equal(old["norm.running_mean"])


def test_reloading_drops_local_steps_that_were_not_pushed(server: FakeServer, model: nn.Linear) -> None:
    server.local_steps = 2
    with optimizer_of(model, server, inner=torch.optim.SGD(model.parameters(), lr=0.25)) as optimizer:
        backward(model)
        optimizer.step()
        nn.init.constant_(model.weight, 9.0)
        optimizer.reload()
        assert model.weight.item() == 2.0
        for _ in range(2):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()
        assert [each.tolist() for each in server.gradients] == [[0.5]]
        assert server.announced[0].local_steps == 2


@pytest.mark.parametrize("in_flight", [1, 2])
def test_reloading_after_an_interrupted_step_brings_other_parameters(
    server: FakeServer, model: nn.Linear, in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with optimizer_of(model, server, in_flight=in_flight) as optimizer:
        backward(model)
        with monkeypatch.context() as patched:
            patched.setattr(optimizer._pipeline, "swap", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        nn.init.constant_(model.weight, 9.0)
        optimizer.reload()
        assert model.weight.item() == 2.0
        backward(model)
        optimizer.step()
    assert [each.item() for each in server.gradients] == [1.0]


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_reloading_after_the_end_puts_the_last_parameters_back(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    server.stop_after = 1
    backward(model)
    optimizer.step()
    nn.init.constant_(model.weight, 9.0)
    optimizer.reload()
    assert model.weight.item() == 2.0 - LEARNING_RATE


def test_reloading_after_an_end_without_last_parameters_changes_nothing(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stop_after = 1
    monkeypatch.setattr("ormo_worker.pytorch.optimizer._FINAL_PULL_SECONDS", 0.2)
    backward(model)
    server.told(*[("pull", LOST)] * 50)
    optimizer.step()
    assert optimizer.finished
    nn.init.constant_(model.weight, 9.0)
    optimizer.reload()
    assert math.isclose(model.weight.item(), 9.0)
