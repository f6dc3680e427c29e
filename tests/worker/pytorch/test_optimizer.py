"""`RemoteOptimizer` keeps to the conventions of `torch.optim`."""

import gc
import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from ormo_protos.manifest import BFLOAT16
from ormo_protos.refusals import Reason
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker import RemoteOptimizer
from ormo_worker.errors import ModelUnusable, OptionRefused, RunFinished, ServerUnreachable
from worker.fake_server import LEARNING_RATE, LOST, FakeServer
from worker.models import Tied, line
from worker.pytorch.loops import backward, optimizer_of


def test_a_step_is_the_servers_update(server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer) -> None:
    weight = model.weight
    for step in range(1, 4):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        assert optimizer.iteration == step
        assert model.weight.item() == 2.0 - LEARNING_RATE * step
    assert model.weight is weight
    assert optimizer.last_result is not None
    assert optimizer.last_result.learning_rate == LEARNING_RATE


def test_making_it_loads_the_servers_parameters_and_buffers(server: FakeServer) -> None:
    first, second = Tied(), Tied()
    first(torch.randn(4, 3))  # so that its buffers differ
    with optimizer_of(first, server), optimizer_of(second, server) as optimizer:
        assert optimizer.rank == 1
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert second.head.weight is second.embedding.weight


def test_a_model_with_everything_trains_as_with_torchs_sgd(server: FakeServer) -> None:
    ours, theirs = Tied(), Tied()
    theirs.load_state_dict(ours.state_dict())
    reference = torch.optim.SGD(theirs.parameters(), lr=LEARNING_RATE)
    with optimizer_of(ours, server) as optimizer:
        for _ in range(3):
            inputs = torch.randn(6, 3)
            for model, stepper in ((ours, optimizer), (theirs, reference)):
                stepper.zero_grad()
                model(inputs).square().mean().backward()
                stepper.step()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
    assert server.model is not None
    assert server.model.int_buffers[-1] == 3  # batches that batch norm has seen


def test_a_closure_is_run_with_gradients_and_its_loss_returned(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return backward(model, 3.0)

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 6.0
    assert server.announced[0].loss == 6.0
    assert model.weight.item() == 2.0 - LEARNING_RATE * 3.0


def test_clipped_gradients_are_what_is_pushed(server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer) -> None:
    backward(model, 100.0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    assert server.gradients[0].item() == pytest.approx(1.0, abs=1e-4)


def test_accumulated_gradients_are_pushed_once_with_all_their_samples(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    backward(model, 1.0)
    backward(model, 2.0)
    optimizer.step(samples=16, loss=0.25)
    assert [gradient.item() for gradient in server.gradients] == [3.0]
    assert (server.announced[0].samples, server.announced[0].loss) == (16, 0.25)


def test_samples_are_the_batch_size_and_a_loss_may_be_missing(server: FakeServer, model: nn.Linear) -> None:
    with optimizer_of(model, server, batch_size=32) as optimizer:
        backward(model)
        optimizer.step()
    assert server.announced[0].samples == 32
    assert not server.announced[0].HasField("loss")
    assert server.announced[0].compute_seconds > 0


def test_a_grad_scaler_unscales_what_is_pushed_and_may_skip_a_step(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (math.inf, 3.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.tensor([[factor]])).sum()).backward()
        scaler.step(optimizer, samples=8)
        scaler.update()
    assert [gradient.item() for gradient in server.gradients] == [3.0]  # the infinite one never left
    assert server.announced[0].samples == 8
    assert scaler.get_scale() == 512.0


def test_autocast_leaves_the_parameters_in_float32(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.tensor([[1.0]])).sum()
        loss.backward()
        optimizer.step(loss=loss)
    assert model.weight.dtype == torch.float32
    assert model.weight.item() == 2.0 - 2 * LEARNING_RATE
    assert [announced.loss for announced in server.announced] == [2.0, 1.5]


def test_parameters_without_a_gradient_are_pushed_as_zero_without_decay(server: FakeServer) -> None:
    server.weight_decay = 0.5
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    with optimizer_of(model, server) as optimizer:
        model.weight.grad = torch.tensor([[1.0]])
        optimizer.step()
    assert server.gradients[0].tolist() == [1.5, 0.0]


def test_a_group_scales_the_servers_weight_decay(server: FakeServer) -> None:
    server.weight_decay = 0.5
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    groups = [{"params": [model.weight], "weight_decay_scale": 2.0}, {"params": [model.bias], "weight_decay_scale": 0}]
    with optimizer_of(model, server, params=groups) as optimizer:
        model.weight.grad, model.bias.grad = torch.zeros(1, 1), torch.zeros(1)
        optimizer.step()
    assert server.gradients[0].tolist() == [1.0, 0.0]


def test_named_parameters_and_a_part_of_the_model_can_be_given(server: FakeServer) -> None:
    model = nn.Linear(1, 1)
    with optimizer_of(model, server, params=[("weight", model.weight)]) as optimizer:
        model.weight.grad, model.bias.grad = torch.ones(1, 1), torch.ones(1)
        optimizer.step()
        with pytest.raises(
            OptionRefused,
            match="was added after the optimizer was made: which parameters are trained is fixed "
            "when the optimizer is created",
        ):
            optimizer.add_param_group({"params": [("bias", model.bias)]})
        optimizer.step()
    assert [gradient.tolist() for gradient in server.gradients] == [[1.0], [1.0]]


def test_bfloat16_can_travel(server: FakeServer, model: nn.Linear) -> None:
    with optimizer_of(model, server, wire_dtype=torch.bfloat16) as optimizer:
        backward(model, 1.001)
        optimizer.step()
    assert server.announced[0].dtype == BFLOAT16
    assert server.gradients[0].item() == 1.0
    assert model.weight.item() == 1.5


OPTIONS = ["lr", "momentum", "weight_decay", "nesterov"]


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_is_the_servers_gets_one_sentence(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer, option: str
) -> None:
    attempts = [
        lambda: optimizer_of(model, server, params=[{"params": model.parameters(), option: 0.1}]),
        lambda: optimizer.param_groups[0].__setitem__(option, 0.1),
        lambda: optimizer.param_groups[0].update({option: 0.1}),
    ]
    if option != "lr":  # which can be read
        attempts += [
            lambda: optimizer.param_groups[0][option],
            lambda: optimizer.param_groups[0].setdefault(option, 0.1),
        ]
    for attempt in attempts:
        with pytest.raises(OptionRefused, match=f"option '{option}'"):
            attempt()


SCHEDULERS = [
    lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10),
    lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10),
    lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
]


@pytest.mark.parametrize("make", SCHEDULERS)
def test_a_learning_rate_scheduler_is_told_where_the_learning_rate_is(optimizer: RemoteOptimizer, make: Any) -> None:
    with pytest.raises(OptionRefused, match="start ormo-server with --learning-rate and --schedule"):
        make(optimizer)


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
def test_a_weight_decay_scale_must_make_sense(optimizer: RemoteOptimizer, scale: float) -> None:
    with pytest.raises(OptionRefused, match="expected a finite number, at least 0"):
        optimizer.param_groups[0]["weight_decay_scale"] = scale


def test_groups_survive_a_state_dict_and_refuse_that_of_another_optimizer(
    model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    optimizer.param_groups[0]["weight_decay_scale"] = 0.25
    saved = optimizer.state_dict()
    optimizer.param_groups[0]["weight_decay_scale"] = 1.0
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["weight_decay_scale"] == 0.25
    assert optimizer.param_groups[0]["params"] == [model.weight]
    with pytest.raises(OptionRefused, match="option 'lr'"):
        optimizer.load_state_dict(torch.optim.SGD([model.weight], lr=0.1).state_dict())
    assert optimizer.param_groups[0]["weight_decay_scale"] == 0.25


def test_a_parameter_of_another_model_is_an_error(model: nn.Linear, optimizer: RemoteOptimizer) -> None:
    with pytest.raises(OptionRefused, match="is not one of the model's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    assert len(optimizer.param_groups) == 1


def test_an_unusable_model_or_dtype_is_an_error_before_the_server_is_asked(
    server: FakeServer, model: nn.Linear
) -> None:
    with pytest.raises(ModelUnusable):
        optimizer_of(nn.Linear(1, 1).double(), server)
    with pytest.raises(OptionRefused, match=r"wire_dtype is torch\.float16"):
        optimizer_of(model, server, wire_dtype=torch.float16)
    assert server.asked == []


def test_refused_gradients_are_counted_and_warned_of_once(
    caplog: pytest.LogCaptureFixture, server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    with caplog.at_level(logging.INFO):
        for factor in (math.nan, math.inf, 1.0):
            optimizer.zero_grad()
            backward(model, factor)
            optimizer.step()
    assert optimizer.refusals == {Reason.NON_FINITE: 2}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert model.weight.item() == 2.0 - LEARNING_RATE


def test_a_step_survives_a_broken_connection(server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer) -> None:
    server.told(("result", LOST))
    backward(model)
    optimizer.step()
    assert model.weight.item() == 2.0 - LEARNING_RATE


def test_a_server_that_lost_everything_gets_the_model_from_the_worker(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    backward(model)
    optimizer.step()
    server.forget_workers()
    server.manifest = server.model = None
    optimizer.step()
    assert server.asked.count("offer") == 2
    assert model.weight.item() == 2.0 - LEARNING_RATE
    optimizer.step()
    assert model.weight.item() == 2.0 - 2 * LEARNING_RATE


def test_the_step_that_ends_the_run_returns_and_the_next_one_raises(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    server.stop_after = 1
    backward(model)
    optimizer.step()
    assert optimizer.finished
    assert (optimizer.iteration, model.weight.item()) == (1, 2.0 - LEARNING_RATE)  # what the run ended with
    with pytest.raises(RunFinished, match="the run is over at iteration 1: leave the training loop"):
        optimizer.step()


def test_a_run_that_is_over_gives_its_parameters_to_a_late_worker(
    server: FakeServer, optimizer: RemoteOptimizer
) -> None:
    server.stop_after, server.iteration = 1, 1
    late = line(weight=-1.0)
    with optimizer_of(late, server) as second:
        assert second.finished
        # What a loop is set up with before it looks whether there is anything to do.
        assert (second.rank, second.data_seed, second.settings) == (0, 0, pb.RunSettings())
    assert late.weight.item() == 2.0


def test_a_server_that_is_gone_at_the_end_does_no_harm(
    caplog: pytest.LogCaptureFixture, server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    server.stop_after = 1
    server.told(*[("pull", LOST)] * 100)
    backward(model)
    optimizer.step()
    assert optimizer.finished
    assert "its last parameters could not be loaded" in caplog.text


def test_an_optimizer_that_cannot_be_made_leaves_nothing_behind(model: nn.Linear) -> None:
    with pytest.raises(ServerUnreachable):
        RemoteOptimizer(model, "127.0.0.1:1", connect_timeout=0.1)


def test_leaving_the_block_or_forgetting_the_optimizer_leaves_the_run(server: FakeServer, model: nn.Linear) -> None:
    with optimizer_of(model, server):
        pass
    assert server.asked.pop() == "leave"
    forgotten = optimizer_of(model, server)
    assert server.members
    del forgotten
    gc.collect()
    assert server.asked.pop() == "leave"


def test_each_join_has_a_data_seed_and_the_runs_settings(server: FakeServer, optimizer: RemoteOptimizer) -> None:
    assert optimizer.data_seed >= 1234
    assert optimizer.settings.method == "fake"
