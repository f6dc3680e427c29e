"""What means something else here than with another optimizer is said once, with the names of the tensors."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ormo_worker import RemoteOptimizer
from ormo_worker.errors import ModelUnusable, OptionRefused, ParametersChanged
from ormo_worker.pytorch import watch
from ormo_worker.pytorch.watch import Notice
from worker.fake_server import LEARNING_RATE, FakeServer
from worker.models import Tied

NO_GRADIENT, CHANGED = "there is no longer a gradient", "the program changed"


class Experts(nn.Module):
    """Seven parameters, of which the caller says which the loss depends on. The gradient of each is the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterList([nn.Parameter(torch.tensor([2.0])) for _ in range(7)])

    def loss(self, *used: int) -> torch.Tensor:
        return sum((0.5 * self.experts[number].square().sum() for number in used), torch.zeros(()))


@pytest.fixture
def model() -> Experts:
    return Experts()


def step(model: Experts, optimizer: RemoteOptimizer, *used: int, set_to_none: bool = True) -> None:
    optimizer.zero_grad(set_to_none)
    model.loss(*used).backward()
    optimizer.step()


def said(caplog: pytest.LogCaptureFixture, begin: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(begin)]


def made(model: nn.Module, server: FakeServer, **options: Any) -> RemoteOptimizer:
    return RemoteOptimizer(model, server.address, connect_timeout=5.0, **options)


# Gradients that are missing


def test_a_tensor_that_had_a_gradient_and_has_none_now_is_named_once(
    caplog: pytest.LogCaptureFixture, server: FakeServer, model: Experts
) -> None:
    with made(model, server) as optimizer:
        for used in ((0, 1), (0, 1), (0,), (0,), (0, 1), (0,)):
            step(model, optimizer, *used)
    assert said(caplog, NO_GRADIENT) == [watch._NO_GRADIENT % "'experts.1'"]
    assert server.gradients[2].tolist()[:2] == [2.0 * (1 - LEARNING_RATE) ** 2, 0.0]


def test_experts_that_are_idle_in_many_steps_are_named_a_few_at_a_time(
    caplog: pytest.LogCaptureFixture, server: FakeServer, model: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    with made(model, server) as optimizer:
        step(model, optimizer, 0, 1, 2, 3, 4, 5)
        step(model, optimizer, 0, 5)
        assert said(caplog, NO_GRADIENT) == [watch._NO_GRADIENT % "'experts.1', 'experts.2', 'experts.3' and 1 more"]
        step(model, optimizer, 1)  # too soon for a line about the other two
        assert len(said(caplog, NO_GRADIENT)) == 1
        now = 100.0
        step(model, optimizer, 1)
    assert said(caplog, NO_GRADIENT)[1:] == [watch._NO_GRADIENT % "'experts.0', 'experts.5'"]


def test_what_was_put_off_is_said_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    notice = Notice("%s")
    for name in "abc":
        notice.note(name)
    assert [record.getMessage() for record in caplog.records] == ["'a'"]
    notice.flush()
    notice.flush()
    assert [record.getMessage() for record in caplog.records] == ["'a'", "'b', 'c'"]


def zeroed(model: Experts, optimizer: RemoteOptimizer) -> None:
    """Zeros count as with any optimizer: momentum goes on."""
    step(model, optimizer, 0, 1)
    step(model, optimizer, 0, set_to_none=False)


def accumulated(model: Experts, optimizer: RemoteOptimizer) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(0).backward()
        model.loss(1).backward()
        optimizer.step()


def used_later(model: Experts, optimizer: RemoteOptimizer) -> None:
    step(model, optimizer, 0)
    step(model, optimizer, 0, 1)


@pytest.mark.parametrize("loop", [zeroed, accumulated, used_later])
def test_nothing_is_said_of_gradients_that_are_there_or_never_were(
    caplog: pytest.LogCaptureFixture,
    server: FakeServer,
    model: Experts,
    loop: Callable[[Experts, RemoteOptimizer], None],
) -> None:
    with made(model, server) as optimizer:
        loop(model, optimizer)
    assert said(caplog, NO_GRADIENT) == []


def test_nothing_is_said_of_tensors_that_are_not_trained(
    caplog: pytest.LogCaptureFixture, server: FakeServer, model: Experts
) -> None:
    with made(model, server, params=[model.experts[0]]) as optimizer:
        step(model, optimizer, 0, 1)
        model.experts[1].grad = None
        step(model, optimizer, 0)
    assert said(caplog, NO_GRADIENT) == []


# Parameters that were changed


def clamp(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-0.01, 0.01)


def clamp_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.01, 0.01)


def load(model: nn.Module) -> None:
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()})


def replace_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter)


@pytest.mark.parametrize("way", [clamp, clamp_data, load, replace_data])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_parameters_that_the_program_changes_are_named_once_and_overwritten(
    caplog: pytest.LogCaptureFixture, server: FakeServer, in_flight: int, way: Callable[[nn.Module], None]
) -> None:
    model = Tied()
    with made(model, server, in_flight=in_flight) as optimizer:
        for number in range(4):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            if number != 1:
                way(model)
            optimizer.step()
    trained = ("'embedding.weight', 'norm.weight'", "'embedding.weight', 'norm.weight', 'norm.bias'")
    sentences = {
        watch._CHANGED % names for names in (*trained, "'norm.bias'")
    }  # its zeros may be the same clamped or not
    frozen = watch._FROZEN_CHANGED % "'frozen.weight', 'frozen.bias'"
    assert said(caplog, CHANGED)[:2] in ([watch._CHANGED % names, frozen] for names in trained)
    assert set(said(caplog, CHANGED)) <= sentences | {frozen}
    assert max(parameter.abs().max().item() for parameter in model.parameters()) > 0.02


def test_a_checkpoint_that_is_loaded_after_joining_is_a_change(
    caplog: pytest.LogCaptureFixture, server: FakeServer, model: Experts
) -> None:
    saved = {name: tensor + 1.0 for name, tensor in model.state_dict().items()}
    with made(model, server) as optimizer:
        model.load_state_dict(saved)
        step(model, optimizer, 0)
    assert said(caplog, CHANGED) == [watch._CHANGED % "'experts.0', 'experts.1', 'experts.2' and 4 more"]
    assert model.experts[1].item() == 2.0


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("wire_dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_said_where_nothing_is_changed_or_all_is_put_back(
    caplog: pytest.LogCaptureFixture, server: FakeServer, in_flight: int, wire_dtype: torch.dtype
) -> None:
    model = Tied()
    model.embedding.to(torch.bfloat16)  # its weight is rounded when it is loaded
    model.head.weight = model.embedding.weight
    with made(model, server, in_flight=in_flight, wire_dtype=wire_dtype, on_local_change="error") as optimizer:
        for _ in range(4):
            optimizer.zero_grad()
            model.norm(model.embedding(torch.ones(4, 3, dtype=torch.bfloat16)).float()).square().sum().backward()
            own = copy.deepcopy(model.state_dict())
            clamp(model)
            model.load_state_dict(own)
            optimizer.step()
    assert said(caplog, CHANGED) == []


@pytest.mark.parametrize("way", [clamp, clamp_data])
def test_a_change_can_be_an_error_before_anything_is_pushed(
    caplog: pytest.LogCaptureFixture, server: FakeServer, model: Experts, way: Callable[[nn.Module], None]
) -> None:
    with made(model, server, on_local_change="error") as optimizer:
        step(model, optimizer, 0)
        kept = copy.deepcopy(model.state_dict())
        way(model)
        for _ in range(2):
            with pytest.raises(ParametersChanged, match=r"the program changed 'experts.0', .* and 4 more"):
                optimizer.step()
        assert len(server.gradients) == 1
        model.load_state_dict(kept)
        optimizer.step()
    assert len(server.gradients) == 2
    assert said(caplog, CHANGED) == []


def test_a_parameter_that_gets_another_shape_is_named_before_anything_is_pushed(server: FakeServer) -> None:
    model = nn.Linear(3, 2, bias=False)
    kept = model.weight.data
    with made(model, server) as optimizer:
        model.weight.data, model.weight.grad = torch.zeros(1, 3), torch.zeros(1, 3)  # which would fit, twice
        with pytest.raises(ModelUnusable, match=r"'weight' now has the shape \(1, 3\), and the run .* \(2, 3\)"):
            optimizer.step()
        assert server.gradients == []
        model.weight.data, model.weight.grad = kept, torch.zeros(2, 3)
        optimizer.step()
    assert len(server.gradients) == 1


def test_what_is_to_be_done_about_a_change_is_one_of_two_words(server: FakeServer, model: Experts) -> None:
    with pytest.raises(OptionRefused, match="on_local_change is 'raise': expected 'warn' or 'error'"):
        made(model, server, on_local_change="raise")


def test_warnings_are_for_people_who_look_at_warnings(
    caplog: pytest.LogCaptureFixture, server: FakeServer, model: Experts
) -> None:
    with made(model, server) as optimizer:
        clamp(model)
        step(model, optimizer, 0)
        step(model, optimizer, 1)
    assert {record.levelno for record in caplog.records if "experts" in record.getMessage()} == {logging.WARNING}
