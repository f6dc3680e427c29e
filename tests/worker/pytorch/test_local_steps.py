"""Local steps with an optimizer of torch, against an honest server: what is pushed, when, and what is never pushed."""

import gc
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ormo_protos.manifest import BFLOAT16, FLOAT32
from ormo_protos.refusals import Reason
from ormo_worker import RemoteOptimizer
from ormo_worker.errors import OptionRefused, OrmoError, ParametersChanged, Refused
from ormo_worker.pytorch.inner import Inner
from service.wire import eventually
from worker.fake_server import LEARNING_RATE, LOST, FakeServer, refuse
from worker.models import Tied, line
from worker.pytorch.loops import PATIENT_SECONDS
from worker.pytorch.streams import LateStreams

H = 4


@pytest.fixture
def server(server: FakeServer) -> FakeServer:
    server.local_steps = H
    return server


@pytest.fixture
def model() -> nn.Linear:
    return line(weight=2.0)


def descent(model: nn.Module, rate: float = 0.25) -> torch.optim.SGD:
    """An inner optimizer whose every move is the rate, if each gradient is one."""
    return torch.optim.SGD(model.parameters(), lr=rate)


def remote(model: nn.Module, server: FakeServer, inner: Any = None, **options: Any) -> RemoteOptimizer:
    given = descent(model) if inner is None else inner
    return RemoteOptimizer(model, server.address, inner=given, connect_timeout=5.0, **options)


@pytest.fixture
def optimizer(server: FakeServer, model: nn.Linear) -> Iterator[RemoteOptimizer]:
    with remote(model, server) as optimizer:
        yield optimizer


def backward(model: nn.Linear, factor: float = 1.0) -> torch.Tensor:
    """A loss whose gradient is `factor`."""
    loss = model(torch.tensor([[factor]])).sum()
    loss.backward()
    return loss


def step(model: nn.Linear, optimizer: RemoteOptimizer, factor: float = 1.0, **told: Any) -> None:
    optimizer.zero_grad()
    backward(model, factor)
    optimizer.step(**told)


def counted(optimizer: RemoteOptimizer, outcome: str) -> float:
    """Local steps that the worker's metrics have for this outcome."""
    value = optimizer._metrics.registry.get_sample_value("ormo_worker_local_steps_total", {"outcome": outcome})
    assert value is not None
    return value


def test_only_each_hth_step_pushes_and_what_it_pushes_is_the_sum_of_the_moves(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    for made in range(1, H):
        step(model, optimizer)
        assert server.gradients == []
        assert model.weight.item() == 2.0 - 0.25 * made
    step(model, optimizer)
    assert [pushed.item() for pushed in server.gradients] == [0.25 * H]
    assert model.weight.item() == 2.0 - LEARNING_RATE * 0.25 * H
    assert optimizer.iteration == 1


def test_a_model_with_everything_trains_as_in_a_loop_of_torchs_own_optimizers(server: FakeServer) -> None:
    ours, theirs = Tied(), Tied()
    theirs.load_state_dict(ours.state_dict())
    inner, reference = (torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1) for model in (ours, theirs))
    begin = [parameter.detach().clone() for parameter in theirs.parameters()]
    with remote(ours, server, inner) as optimizer:
        for made in range(1, 3 * H + 1):
            inputs = torch.randn(6, 3)
            for model, stepper in ((ours, optimizer), (theirs, reference)):
                stepper.zero_grad()
                model(inputs).square().mean().backward()
                stepper.step()
            if made % H == 0:
                with torch.no_grad():
                    for now, then in zip(theirs.parameters(), begin, strict=True):
                        now.copy_(then.sub_(then - now, alpha=LEARNING_RATE))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
    assert server.model is not None
    assert server.model.int_buffers[-1] == 3 * H  # batches that batch norm has seen


def test_each_ticket_says_how_many_steps_to_make_for_it(server: FakeServer, model: nn.Linear) -> None:
    server.steps_of_tickets.extend([3, 1, 2])
    with remote(model, server) as optimizer:
        for _ in range(3 + 1 + 2):
            step(model, optimizer)
        assert [announced.local_steps for announced in server.announced] == [3, 1, 2]


@pytest.mark.parametrize(("asked", "made"), [(0, 1), (-7, 1), (2**31 - 1, H)])
def test_a_ticket_outside_the_runs_bounds_is_brought_within_them(
    server: FakeServer, model: nn.Linear, asked: int, made: int
) -> None:
    server.steps_of_tickets.append(asked)
    with remote(model, server) as optimizer:
        for _ in range(made):
            step(model, optimizer)
        assert [announced.local_steps for announced in server.announced] == [made]


def test_samples_are_the_sum_the_loss_is_the_mean_and_the_time_is_that_of_all_steps(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    local: Any = optimizer._local
    local._loaded_at -= 1000.0
    losses = [1.0, torch.tensor(2.0), None, torch.tensor([6.0], dtype=torch.bfloat16)]
    for samples, loss in zip((1, 2, 3, 4), losses, strict=True):
        step(model, optimizer, samples=samples, loss=loss)
    (announced,) = server.announced
    assert (announced.samples, announced.loss, announced.local_steps) == (10, 3.0, H)
    assert 1000.0 < announced.compute_seconds < 1060.0


def test_a_loss_that_the_program_overwrites_counts_as_it_was(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    loss = torch.zeros(())
    for value in range(H):
        loss.fill_(value)
        step(model, optimizer, loss=loss)
    assert server.announced[0].loss == 1.5


def test_more_samples_than_a_push_can_count_are_refused_before_anything_moves(
    model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    step(model, optimizer, samples=2**31 - 1)
    with pytest.raises(OptionRefused, match="samples of 2 local steps are 2147483648"):
        step(model, optimizer, samples=1)
    assert model.weight.item() == 2.0 - 0.25


def test_a_closure_is_run_once_a_step_and_its_loss_returned_and_pushed(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return backward(model)

    with torch.no_grad():
        returned = [optimizer.step(closure).item() for _ in range(H)]
    assert returned == [2.0, 1.75, 1.5, 1.25]
    assert server.announced[0].loss == sum(returned) / H


def test_several_optimizers_step_together_and_a_parameter_in_none_has_not_moved(server: FakeServer) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    groups = [list(layer.parameters()) for layer in model]  # type: ignore[union-attr]
    inner = [torch.optim.SGD(groups[0], lr=1.0), torch.optim.SGD(groups[1], lr=2.0)]
    with remote(model, server, inner) as optimizer:
        for _ in range(H):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            with torch.no_grad():
                groups[2][0] += 1  # whatever the program does to it
            optimizer.step()
    expected = torch.cat([torch.full((6,), 1.0 * H), torch.full((6,), 2.0 * H), torch.zeros(3)])
    torch.testing.assert_close(server.gradients[0], expected)
    assert server.gradients[0][-3:].tolist() == [0.0] * 3


def test_what_the_program_does_to_parameters_between_steps_is_part_of_the_move(
    server: FakeServer, model: nn.Linear, caplog: pytest.LogCaptureFixture
) -> None:
    with remote(model, server, on_local_change="error") as optimizer:
        for _ in range(H):
            step(model, optimizer)
            with torch.no_grad():
                model.weight.clamp_(min=1.9)
    assert server.gradients[0].item() == pytest.approx(2.0 - (1.9 - 0.25))
    assert "the program changed" not in caplog.text


def test_a_frozen_parameter_that_the_program_changes_is_found_as_without_local_steps(server: FakeServer) -> None:
    model = Tied()
    with remote(model, server, on_local_change="error") as optimizer:
        model.frozen.weight.data = torch.ones(4, 4)
        for _ in range(H - 1):
            optimizer.step()
        with pytest.raises(ParametersChanged, match="frozen"):
            optimizer.step()
    assert [announced.local_steps for announced in server.announced] == [H - 1]  # by closing


# Who may be in a run with local steps, and who may not.


def test_a_worker_says_that_it_makes_local_steps(server: FakeServer, model: nn.Linear) -> None:
    with remote(model, server):
        pass
    with pytest.raises(Refused, match=r"LOCAL_STEPS.*give this worker an optimizer of its own, with inner= \(ormo-w"):
        RemoteOptimizer(model, server.address, connect_timeout=5.0)


def test_a_run_without_local_steps_is_left_at_once_with_a_sentence(server: FakeServer, model: nn.Linear) -> None:
    server.local_steps = 0
    with pytest.raises(Refused, match=r"takes the gradient of each step.*start ormo-server with --local-steps") as told:
        remote(model, server)
    assert told.value.reason == Reason.LOCAL_STEPS
    assert server.asked[-1] == "leave"
    assert server.members == {}


def test_a_run_that_has_no_local_steps_any_more_is_left_when_the_worker_comes_back(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    def restarted_otherwise(context: Any) -> None:
        server.forget_workers()
        server.local_steps = 0
        refuse("FAILED_PRECONDITION", Reason.NOT_A_MEMBER)(context)

    server.told(("exchange", restarted_otherwise))
    for _ in range(H - 1):
        step(model, optimizer)
    with pytest.raises(Refused, match="start ormo-server with --local-steps"):
        step(model, optimizer)
    assert server.members == {}


OTHER = line()


def bad_inner(kind: str, model: nn.Linear) -> Any:
    return {
        "no optimizer": lambda: "adamw",
        "none": list,
        "one of another model": lambda: descent(OTHER),
        "twice": lambda: [descent(model), torch.optim.AdamW(model.parameters())],
        "several closures": lambda: torch.optim.LBFGS(model.parameters()),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("no optimizer", "inner is, or has in it, a str: expected a torch.optim optimizer, or a list of them"),
        ("none", "inner is an empty list"),
        ("one of another model", r"a parameter of shape \(1, 1\) in inner is not one of the model's"),
        ("twice", "inner has the parameter 'weight' twice"),
        ("several closures", "inner is a LBFGS, which calls its closure several times in a step"),
    ],
)
def test_inner_optimizers_that_cant_be_used_are_one_sentence(
    server: FakeServer, model: nn.Linear, kind: str, sentence: str
) -> None:
    with pytest.raises(OptionRefused, match=sentence):
        remote(model, server, bad_inner(kind, model))
    assert server.asked == []


def test_a_parameter_that_params_leaves_out_cant_be_in_inner(server: FakeServer) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(OptionRefused, match=r"inner has the parameter '1\.weight', which params= leaves out"):
        remote(model, server, descent(model), params=model[0].parameters())


def test_frozen_parameters_may_be_in_inner_as_with_any_optimizer(server: FakeServer) -> None:
    model = Tied()
    with remote(model, server, torch.optim.AdamW(model.parameters())) as optimizer:
        optimizer.step()
    assert server.announced[0].local_steps == 1


# Torch's conventions.


def test_a_direct_step_of_the_inner_optimizer_is_refused_until_the_worker_has_left(
    server: FakeServer, model: nn.Linear
) -> None:
    inner = descent(model)
    with remote(model, server, inner):
        backward(model)
        with pytest.raises(OrmoError, match=r"step\(\) of the inner optimizer was called: call step\(\) of the Remote"):
            inner.step()
        assert model.weight.item() == 2.0
    inner.step()
    assert model.weight.item() == 1.75


def test_an_inner_optimizer_can_be_used_again_after_a_run_could_not_be_joined(
    server: FakeServer, model: nn.Linear
) -> None:
    inner = descent(model)
    server.local_steps = 0
    with pytest.raises(Refused):
        remote(model, server, inner)
    server.local_steps = H
    with remote(model, server, inner) as optimizer:
        step(model, optimizer)
        with remote(model, server, inner) as again:  # as by a notebook's cell that runs again
            step(model, again)


@pytest.mark.parametrize("before", [True, False])
def test_schedulers_work_on_inner_optimizers_made_before_or_after(
    server: FakeServer, model: nn.Linear, before: bool
) -> None:
    server.stop_after = 4
    inner = descent(model, 1.0)
    made: list[RemoteOptimizer] = []

    def schedule() -> Any:
        return torch.optim.lr_scheduler.LambdaLR(inner, lambda _: 1.0 - made[0].progress if made else 1.0)

    scheduler = schedule() if before else None
    with remote(model, server, inner) as optimizer:
        made.append(optimizer)
        scheduler = scheduler or schedule()
        rates = []
        while not optimizer.finished:
            rates.append(inner.param_groups[0]["lr"])
            step(model, optimizer)
            scheduler.step()
    assert rates == [1.0] * H + [0.75] * H + [0.5] * H + [0.25] * H
    assert optimizer.progress == 1.0


def test_a_scheduler_of_the_remote_optimizer_sets_the_rates_of_the_inner_ones(
    model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda made: 0.5**made)
    step(model, optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_progress_is_that_of_the_limit_that_is_nearer_and_none_without_a_limit(
    server: FakeServer, model: nn.Linear
) -> None:
    with remote(model, server, batch_size=10) as optimizer:
        settings = optimizer.settings
        for _ in range(H):
            step(model, optimizer)
        assert (optimizer.iteration, optimizer.progress) == (1, 0.0)
        settings.stop_after_gradients = 10
        assert optimizer.progress == 0.1
        settings.stop_after_samples = 80
        assert optimizer.progress == 10 * H / 80
        settings.stop_after_samples = 1
        assert optimizer.progress == 1.0


def test_groups_and_state_are_those_of_the_inner_optimizers_also_after_they_have_loaded_others(
    server: FakeServer,
) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    inner = [torch.optim.AdamW(model[0].parameters(), lr=0.1), torch.optim.SGD(model[1].parameters(), lr=0.2)]
    with remote(model, server, inner) as optimizer:
        inner[0].load_state_dict(inner[0].state_dict())
        optimizer.param_groups[0]["lr"] = 0.3
        assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.2]
        assert inner[0].param_groups[0]["lr"] == 0.3
        assert optimizer.param_groups[0] is inner[0].param_groups[0]
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        assert set(optimizer.state) == set(model[0].parameters())
        optimizer.zero_grad()
        assert [parameter.grad for parameter in model.parameters()] == [None] * 4
        with pytest.raises(OptionRefused, match="add it to the inner optimizer"):
            optimizer.add_param_group({"params": []})


def test_a_state_dict_is_the_inner_ones_and_brings_their_moments_back(server: FakeServer) -> None:
    def trained(count: int) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        layers = [list(model[0].parameters()), list(model[1].parameters())] if count == 2 else [model.parameters()]
        return model, [torch.optim.AdamW(parameters, lr=0.1) for parameters in layers]

    for count in (1, 2):
        model, inner = trained(count)
        with remote(model, server, inner) as optimizer:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            saved = optimizer.state_dict()
            moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
        assert saved == (inner[0].state_dict() if count == 1 else {"inner": [each.state_dict() for each in inner]})
        model, inner = trained(count)
        with remote(model, server, inner) as optimizer:
            optimizer.load_state_dict(saved)
            assert [state["exp_avg"] for state in optimizer.state.values()] == moments
            with pytest.raises(OptionRefused, match=f"state is that of 3 inner optimizers, and there are {count}"):
                optimizer.load_state_dict({"inner": [{}] * 3})


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_is_no_local_step(server: FakeServer, model: nn.Linear, fused: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inner = torch.optim.SGD(model.parameters(), lr=0.25, fused=fused)
    with remote(model, server, inner) as optimizer:
        for factor in [math.inf, *[1.0] * H]:
            optimizer.zero_grad()
            scaler.scale(model(torch.tensor([[factor]])).sum()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer, samples=8)
            scaler.update()
        assert [pushed.item() for pushed in server.gradients] == [pytest.approx(0.25 * H, abs=1e-5)]
    assert (server.announced[0].samples, server.announced[0].local_steps) == (8 * H, H)
    assert scaler.get_scale() == 512.0


# What is never sent, and what a worker that leaves still sends.


def diverge(model: nn.Linear, optimizer: RemoteOptimizer) -> None:
    for _ in range(H):
        step(model, optimizer, math.inf)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_a_sum_that_is_not_finite_is_never_sent_and_training_begins_anew(
    server: FakeServer, model: nn.Linear, kind: Callable[..., torch.optim.Optimizer], caplog: pytest.LogCaptureFixture
) -> None:
    inner = kind(model.parameters(), lr=0.25)
    fresh = kind(model.parameters(), lr=0.25).state
    with remote(model, server, inner) as optimizer:
        assert server.model is not None
        server.model.parameters.fill_(5.0)  # meanwhile by others
        diverge(model, optimizer)
        assert server.gradients == []
        assert model.weight.item() == 5.0
        assert {name: float(value) for name, value in inner.state[model.weight].items()} == {
            name: float(value) for name, value in fresh[model.weight].items()
        }
        assert optimizer.refusals == {Reason.NON_FINITE: 1}
        assert counted(optimizer, "refused") == H
        for _ in range(H):
            step(model, optimizer)
        assert server.announced[0].ticket.number == 2  # the first was given back for another
        assert optimizer.last_result is not None
    said = [record for record in caplog.records if "has NaN or infinity and was not sent" in record.message]
    assert [record.levelno for record in said] == [logging.WARNING]
    assert f"the sum of {H} local steps" in said[0].message


def test_a_bfloat16_model_without_gradients_leaves_the_servers_finer_parameters_where_they_are(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    model = line(2.0).to(torch.bfloat16)
    with remote(model, server) as optimizer:
        assert server.model is not None
        server.model.parameters.fill_(1.2345678)  # between the numbers of bfloat16
        for _ in range(3 * H):
            model.weight.grad = torch.zeros_like(model.weight)
            optimizer.step()
    assert [pushed.item() for pushed in server.gradients] == [0.0] * 3
    assert server.model.parameters.item() == pytest.approx(1.2345678, abs=1e-7)
    assert caplog.text.count("keep the model in float32 and compute under torch.autocast") == 1


def test_moves_of_a_bfloat16_model_travel_in_float32(server: FakeServer) -> None:
    model = line(1.0).to(torch.bfloat16)
    with remote(model, server, descent(model, 2.0**-8)) as optimizer:
        for _ in range(H):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
    assert server.announced[0].dtype == FLOAT32
    assert server.gradients[0].item() == H * 2.0**-8


def test_a_sum_is_rounded_once_where_bfloat16_travels(server: FakeServer) -> None:
    model = line(1.0)
    with remote(model, server, descent(model, 2.0**-12), wire_dtype=torch.bfloat16) as optimizer:
        for _ in range(H):
            step(model, optimizer)
    assert server.announced[0].dtype == BFLOAT16
    assert server.gradients[0].item() == H * 2.0**-12  # of 1.0 in bfloat16 nothing would be left of it


@pytest.mark.parametrize("in_flight", [1, 2])
def test_closing_pushes_the_steps_that_were_made(server: FakeServer, model: nn.Linear, in_flight: int) -> None:
    with remote(model, server, in_flight=in_flight) as optimizer:
        for _ in range(H + 1):
            step(model, optimizer, samples=3)
    # Those of two slots are under way together, and may come in either order.
    rest, whole = sorted(server.announced, key=lambda announced: announced.local_steps)
    assert (rest.local_steps, whole.local_steps) == (1, H)
    assert (rest.samples, whole.samples) == (3, 3 * H)
    assert sorted(gradient.item() for gradient in server.gradients) == [0.25, H * 0.25]
    assert (optimizer.counted, optimizer.under_way) == (2, 0)
    assert counted(optimizer, "applied") == H + 1
    assert server.asked[-1] == "leave"


def test_closing_without_a_step_pushes_nothing(server: FakeServer, model: nn.Linear) -> None:
    with remote(model, server) as optimizer:
        for _ in range(H):
            step(model, optimizer)
    assert [announced.local_steps for announced in server.announced] == [H]


def test_a_forgotten_optimizer_pushes_the_steps_that_were_made_and_leaves(server: FakeServer, model: nn.Linear) -> None:
    optimizer = remote(model, server)
    step(model, optimizer)
    del optimizer
    gc.collect()
    assert [announced.local_steps for announced in server.announced] == [1]
    assert server.members == {}


def test_a_rest_that_is_not_finite_is_not_sent_either(server: FakeServer, model: nn.Linear) -> None:
    with remote(model, server) as optimizer:
        step(model, optimizer, math.inf)
    assert server.gradients == []
    assert counted(optimizer, "refused") == 1


def test_a_server_that_is_gone_does_not_keep_a_worker_that_leaves(
    server: FakeServer, model: nn.Linear, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with remote(model, server) as optimizer:
        step(model, optimizer)
        server.stop()
    server.start()
    assert server.gradients == []
    assert "what became of a gradient in flight is not known" in caplog.text


def test_steps_whose_ticket_is_void_are_lost_counted_said_and_never_sent_again(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer, caplog: pytest.LogCaptureFixture
) -> None:
    step(model, optimizer)
    server.epoch += 1  # it has crashed and restored itself: all tickets are void
    for _ in range(H - 1):
        step(model, optimizer)
    assert server.gradients == []
    assert server.asked.count("push 2") == 1
    assert (counted(optimizer, "refused"), optimizer.refusals) == (H, {Reason.TICKET_UNKNOWN: 1})
    assert f"{H} local steps were lost, training continues: TICKET_UNKNOWN" in caplog.text
    assert model.weight.item() == 2.0
    for _ in range(H):
        step(model, optimizer)
    assert [pushed.item() for pushed in server.gradients] == [0.25 * H]
    assert server.announced[0].ticket.epoch == server.epoch


def test_steps_of_a_worker_whose_lease_has_ended_are_lost_and_never_sent_under_a_new_ticket(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    tickets: list[int] = []
    received = server._result

    def noting(who: Any, slot: Any, announced: Any, gradient: Any) -> Any:
        tickets.append(announced.ticket.number)
        return received(who, slot, announced, gradient)

    server._result = noting  # type: ignore[method-assign]
    server.forget_workers()
    for _ in range(H):
        step(model, optimizer)
    assert (tickets, server.gradients) == ([1], [])  # under its own alone
    assert counted(optimizer, "refused") == H
    assert server.asked.count("join") == 3  # model wanted, then a welcome, then again


def test_steps_whose_result_was_lost_are_sent_again_only_under_their_own_ticket(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    server.told(("result", LOST))  # they were applied, and the answer is lost
    for _ in range(H):
        step(model, optimizer)
    assert [pushed.item() for pushed in server.gradients] == [0.25 * H]
    assert counted(optimizer, "applied") == H
    assert server.asked.count("push 2") == 2


@pytest.mark.parametrize("goes_on", [True, False])
def test_an_interrupted_push_is_made_again_under_its_own_ticket(
    server: FakeServer, model: nn.Linear, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with remote(model, server) as optimizer:
        slot = optimizer._client.slots[0]
        with monkeypatch.context() as interrupting:
            interrupting.setattr(slot, "_converse", interrupted)
            for _ in range(H - 1):
                step(model, optimizer)
            with pytest.raises(KeyboardInterrupt):
                step(model, optimizer)
        if goes_on:
            step(model, optimizer)  # its gradient is of parameters that are gone: it only fetches others
            assert model.weight.item() == 2.0 - LEARNING_RATE * 0.25 * H
    assert [(each.ticket.number, each.local_steps) for each in server.announced] == [(1, H)]
    assert server.gradients[0].item() == 0.25 * H


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_push_that_is_interrupted_after_its_result_is_not_made_again(
    server: FakeServer, model: nn.Linear, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where workers wait for each other, and one of them is stopped."""
    with remote(model, server) as optimizer:
        with monkeypatch.context() as interrupting:
            interrupting.setattr(optimizer._client.slots[0], "_on_delivery", interrupted)
            for _ in range(H - 1):
                step(model, optimizer)
            with pytest.raises(KeyboardInterrupt):
                step(model, optimizer)
        if goes_on:
            step(model, optimizer)
            assert model.weight.item() == 2.0 - LEARNING_RATE * 0.25 * H
    assert len(server.gradients) == 1
    assert [kind for kind in server.asked if kind.startswith("push")] == ["push 2"]
    assert (counted(optimizer, "applied"), optimizer.refusals.total()) == (H, 0)


def test_a_run_that_is_over_before_the_worker_joins_gives_it_the_last_parameters(
    server: FakeServer, model: nn.Linear
) -> None:
    with remote(line(weight=5.0), server):
        pass
    server.stop_after, server.iteration = 1, 1
    with remote(model, server) as optimizer:
        assert optimizer.finished
        assert optimizer.progress == 1.0
        assert model.weight.item() == 5.0


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_a_worker_learns_between_two_pushes_that_the_run_is_over(
    server: FakeServer, model: nn.Linear, optimizer: RemoteOptimizer
) -> None:
    step(model, optimizer)
    assert server.model is not None
    server.model.parameters.fill_(7.0)
    optimizer._client._membership.finished = True  # as a heartbeat's answer tells
    step(model, optimizer)
    assert optimizer.finished
    assert model.weight.item() == 7.0
    assert server.gradients == []


def test_with_two_in_flight_the_next_steps_begin_without_the_last_ones_and_share_the_optimizers_state(
    server: FakeServer, model: nn.Linear
) -> None:
    inner = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
    moves = [0.25, 0.375, 0.4375, 0.46875]  # of gradients of one
    with remote(model, server, inner, in_flight=2) as optimizer:
        arrived: Any = optimizer._pipeline
        eventually(lambda: arrived._done.qsize() == 1, PATIENT_SECONDS)  # the other slot's first parameters
        slots = []
        for _ in range(H):
            slots.append(optimizer._pipeline.current)
            step(model, optimizer)
        assert model.weight.item() == 2.0  # the other slot's parameters, which do not have this sum
        assert len(set(slots)) == 1
        assert optimizer._pipeline.current not in slots
        for _ in range(H):
            step(model, optimizer)
    first, second = sorted(pushed.item() for pushed in server.gradients)  # on two streams either may come first
    assert first == sum(moves)
    assert second > first  # the momentum went on


@pytest.mark.parametrize("in_flight", [1, 2])
def test_moves_leave_a_device_beside_the_computation_as_gradients_do(
    server: FakeServer, model: nn.Linear, in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = LateStreams(ahead="compute")
    streams.serve(monkeypatch)
    with streams.queueing(), remote(model, server, in_flight=in_flight) as optimizer:
        for factor in range(1, 3 * H + 1):
            step(model, optimizer, float(factor), loss=torch.tensor(float(factor)))
    sums = [sum(range(first, first + H)) for first in (1, H + 1, 2 * H + 1)]
    pushed, losses = [each.item() for each in server.gradients], [each.loss for each in server.announced]
    if in_flight > 1:  # those of two slots are under way together, and may come in either order
        pushed, losses = sorted(pushed), sorted(losses)
    assert pushed == [0.25 * each for each in sums]
    assert losses == [each / H for each in sums]


def test_inner_optimizers_forget_only_what_they_have_gathered() -> None:
    model = line(1.0)
    inner = Inner(torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5), model, set(model.parameters()))
    model.weight.grad = torch.ones_like(model.weight)
    inner.step()
    assert inner.state
    inner.reset()
    assert not inner.state
    assert inner.param_groups[0]["lr"] == 0.25
