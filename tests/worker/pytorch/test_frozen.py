"""Frozen parameters: they come once, and what is trained moves alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ormo_protos.manifest import BFLOAT16, FLOAT32
from ormo_server.service.server import Server
from ormo_worker import ParameterClient, Patience, RemoteOptimizer
from ormo_worker.errors import (
    ModelMismatch,
    ModelUnusable,
    OlderServer,
    OptionRefused,
    ParametersChanged,
    Refused,
)
from ormo_worker.evaluation import Evaluator, evaluations
from ormo_worker.pytorch.transfer import Staging
from service.wire import received_bytes, served
from worker.fake_server import FakeServer
from worker.lines import Lines

RATE, MOMENTUM = 0.125, 0.5


class Adapted(nn.Module):
    """A base, and beside it a way through few numbers: what LoRA makes of a layer."""

    def __init__(self, base_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base = nn.Linear(64, 64).to(base_dtype).requires_grad_(False)
        self.down = nn.Linear(64, 2, bias=False)
        self.up = nn.Linear(2, 64, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs.to(self.base.weight.dtype)).to(inputs.dtype) + self.up(self.down(inputs))


BASE_BYTES = (64 * 64 + 64) * 4
ADAPTER_BYTES = 2 * 64 * 2 * 4


def joined(model: nn.Module, server: Server | FakeServer, **options: object) -> RemoteOptimizer:
    return RemoteOptimizer(model, server.address, connect_timeout=10.0, **options)  # type: ignore[arg-type]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


def sent_bytes(server: Server) -> int:
    return int(sum(tally.total() for tally in server.metrics.traffic.sent_bytes.values()))


def equal(one: nn.Module, other: nn.Module) -> bool:
    there = other.state_dict()
    return all(torch.equal(tensor, there[name]) for name, tensor in one.state_dict().items())


# Training


def test_a_step_moves_what_is_trained_alone_and_trains_as_torchs_sgd(tmp_path: Path) -> None:
    ours, theirs = Adapted(), Adapted()
    theirs.load_state_dict(ours.state_dict())
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    reference = torch.optim.SGD(trained, lr=RATE, momentum=MOMENTUM)
    with served(tmp_path, learning_rate=RATE, momentum=MOMENTUM) as server, joined(ours, server) as optimizer:
        came, went = received_bytes(server), sent_bytes(server)
        assert (came, went) == (ADAPTER_BYTES + BASE_BYTES,) * 2  # the offer, and the first delivery
        for seed in range(5):
            step(ours, optimizer, seed)
            step(theirs, reference, seed)
        assert (received_bytes(server) - came, sent_bytes(server) - went) == (5 * ADAPTER_BYTES,) * 2
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)


def test_a_worker_with_another_base_gets_the_servers_to_the_bit(tmp_path: Path) -> None:
    first, second = Adapted(), Adapted()
    base = {name: tensor.clone() for name, tensor in first.base.state_dict().items()}
    with served(tmp_path) as server, joined(first, server) as one, joined(second, server) as other:
        for seed in range(4):
            step(first, one, 2 * seed)
            step(second, other, 2 * seed + 1)
        step(first, one, 9)
    for model in (first, second):
        assert all(torch.equal(tensor, base[name]) for name, tensor in model.base.state_dict().items())


def test_the_run_goes_on_when_the_server_was_killed_and_its_files_are_whole(tmp_path: Path) -> None:
    model, unfilled = Adapted(), Adapted()
    with served(tmp_path, journal=True) as server:
        port = server.address
        optimizer = joined(model, server)
        step(model, optimizer, 0)
    with served(tmp_path, journal=True, listen=port) as server:
        step(model, optimizer, 1)
        step(model, optimizer, 2)
        with joined(unfilled, server):
            assert equal(unfilled, model)
        assert server.host.checkpoint()
        kept = server.host.files.last_checkpoint
        optimizer.close()
    assert kept is not None
    fresh = Adapted()
    fresh.load_state_dict(load_file(kept.path / "model.safetensors"), strict=True)
    assert equal(fresh, model)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_server_that_lost_its_files_is_given_the_whole_model_anew(tmp_path: Path, in_flight: int) -> None:
    model, unfilled = Adapted(), Adapted()
    base = model.base.weight.clone()
    with served(tmp_path / "first") as server:
        address = server.address
        optimizer = joined(model, server, in_flight=in_flight, give_up_after=60.0)
        step(model, optimizer, 1)
    with served(tmp_path / "second", listen=address) as server:
        for seed in range(2, 5):
            step(model, optimizer, seed)
        optimizer.close()
        assert optimizer.counted > 1
        with joined(unfilled, server):
            assert torch.equal(unfilled.base.weight, base)


def test_a_bfloat16_base_stays_what_it_is(tmp_path: Path) -> None:
    model, unfilled = Adapted(torch.bfloat16), Adapted(torch.bfloat16)
    base = model.base.weight.clone()
    with served(tmp_path) as server, joined(model, server) as optimizer:
        step(model, optimizer, 0)
        with joined(unfilled, server):
            assert equal(unfilled, model)
        server.host.checkpoint()
        kept = server.host.files.last_checkpoint
    assert torch.equal(model.base.weight, base)
    assert kept is not None
    assert torch.equal(load_file(kept.path / "model.safetensors")["base.weight"], base)


def test_a_bfloat16_base_and_one_in_float32_train_together(tmp_path: Path) -> None:
    half, plain = Adapted(torch.bfloat16), Adapted()
    with served(tmp_path) as server, joined(half, server) as one, joined(plain, server) as other:
        step(half, one, 0)
        step(plain, other, 1)
        assert (one.counted, other.counted) == (1, 1)
    assert torch.equal(plain.base.weight, half.base.weight.float())


def test_a_worker_that_trains_other_parameters_is_told_which(tmp_path: Path) -> None:
    model, unfrozen = Adapted(), Adapted()
    unfrozen.base.weight.requires_grad_(True)
    with served(tmp_path) as server, joined(model, server):
        with pytest.raises(ModelMismatch) as caught:
            joined(unfrozen, server)
        assert server.host.engine.view().bucket_size == 1
    here, there = "is a float32 parameter of shape (64, 64) here", "a float32 frozen parameter of shape (64, 64) there"
    assert f"('base.weight' {here} and {there})" in str(caught.value)


def test_a_base_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    model = Adapted()
    with torch.no_grad():
        model.base.bias[3] = torch.nan
    with served(tmp_path) as server, pytest.raises(Refused, match=r"has NaN, or infinity in a parameter: 'base\.bias'"):
        joined(model, server)


def test_what_params_leaves_out_is_frozen_although_it_has_gradients(server: FakeServer) -> None:
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    with (
        joined(first, server, params=[first.weight]) as optimizer,
        joined(second, server, params=[second.weight]),
    ):
        first(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        assert first.bias.grad is not None
    assert [gradient.tolist() for gradient in server.gradients] == [[1.0]]
    assert torch.equal(first.bias, second.bias)


# How often they travel


@pytest.mark.parametrize("in_flight", [1, 3])
def test_they_come_once_for_all_slots_and_again_from_another_server(server: FakeServer, in_flight: int) -> None:
    model = Adapted()
    optimizer = joined(model, server, in_flight=in_flight)
    for seed in range(6):
        step(model, optimizer, seed)
    assert server.with_frozen == 1
    server.told(("exchange", server.forget_workers))  # the same server: the worker joins again, and has them
    for seed in range(2 * in_flight):
        step(model, optimizer, seed)
    assert (server.asked.count("join"), server.with_frozen) == (3, 1)
    assert server.model is not None
    server.model.frozen.fill_(0.5)
    server.epoch += 1
    server.told(("exchange", server.forget_workers))
    for seed in range(2 * in_flight):
        step(model, optimizer, seed)
    optimizer.close()
    assert 2 <= server.with_frozen <= 1 + in_flight
    assert model.base.weight.unique().tolist() == [0.5]


def test_a_worker_that_is_late_for_the_run_gets_them_with_the_last_parameters(server: FakeServer) -> None:
    model, late = Adapted(), Adapted()
    with joined(model, server) as optimizer:
        step(model, optimizer, 0)
        server.stop_after = 1
        with joined(late, server) as second:
            assert second.finished
        assert equal(late, model)
        assert server.with_frozen == 2
        optimizer.step()
        assert (optimizer.finished, server.with_frozen) == (True, 2)  # who has them is spared


def test_a_reader_gets_them_once_from_each_server(server: FakeServer) -> None:
    trained, staging = Adapted(), Staging(Adapted())
    optimizer = joined(trained, server)
    before = server.with_frozen
    with ParameterClient(server.address, staging.tensors.manifest, patience=Patience(10.0)) as reader:
        for pulls in range(1, 3):
            for _ in range(2):
                delivered = reader.pull()
                assert delivered is not None
                staging.transfer(delivered.payload).load()
            assert server.with_frozen == before + pulls
            assert server.model is not None
            server.model.frozen.add_(1.0)  # another server's, with another base
            server.epoch += 1
        delivered = reader.pull(newer_than=delivered.iteration)
        assert delivered is not None
        assert torch.equal(delivered.payload.frozen, server.model.frozen)
    optimizer.close()


# Older servers


@pytest.mark.parametrize("in_flight", [1, 2])
def test_to_an_older_server_they_are_parameters_as_all_others(
    server: FakeServer, caplog: pytest.LogCaptureFixture, in_flight: int
) -> None:
    server.manifest_version = 0
    first, second = Adapted(), Adapted()
    options: dict[str, object] = {"in_flight": in_flight, "metrics_listen": "127.0.0.1:0"}
    with joined(first, server, **options) as optimizer, joined(second, server, params=second.up.parameters()) as other:
        step(first, optimizer, 0)
        step(second, other, 0)
    assert server.manifest is not None
    assert server.manifest.newer is None
    assert equal(second.base, first.base)
    assert [len(gradient) * 4 for gradient in server.gradients] == [BASE_BYTES + ADAPTER_BYTES] * 2
    for gradient in server.gradients:
        assert gradient[: BASE_BYTES // 4].unique().tolist() == [0.0]
    assert "does not know frozen parameters: in its run, they travel as all others do" in caplog.text


def test_a_newer_server_with_the_run_of_an_older_one_is_told_of_with_what_to_do(tmp_path: Path) -> None:
    model = Adapted()
    with served(tmp_path) as server:
        joined(model.requires_grad_(), server).close()  # as older workers described it
        model.base.requires_grad_(False)
        with pytest.raises(
            ModelMismatch, match=r"a run that an older version began, .* continue with that version, or"
        ):
            joined(model, server)


def test_an_older_server_in_the_place_of_a_newer_one_is_an_error_of_one_sentence(server: FakeServer) -> None:
    model = Adapted()
    with joined(model, server) as optimizer:
        step(model, optimizer, 0)
        server.manifest_version = 0
        server.forget_workers()
        server.manifest = None
        with pytest.raises(OlderServer, match="is too old for frozen parameters, which this model has: upgrade"):
            step(model, optimizer, 1)


# Readers


class Adapting(Lines):
    """A task whose model has a base, or none that is frozen."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 1).requires_grad_(not self.frozen), nn.Linear(1, 1))


@pytest.mark.parametrize(("trains_all", "reads_all"), [(False, False), (False, True), (True, False)])
def test_an_evaluator_reads_whatever_the_run_trains(tmp_path: Path, trains_all: bool, reads_all: bool) -> None:
    model = Adapting(frozen=not trains_all).build_model()
    evaluator = Evaluator(Adapting(frozen=not reads_all), torch.device("cpu"), 2)
    with (
        served(tmp_path) as server,
        joined(model, server) as optimizer,
        evaluator.client(server.address, Patience(10.0)) as client,
    ):
        for _ in range(2):
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()
            (found,) = evaluations(evaluator, client, 1.0, once=True)
            score = Adapting(frozen=True).score(model, (torch.tensor([[1.0], [2.0], [3.0]]), TARGETS))
            assert found.score.mean_loss == pytest.approx(score.mean_loss)


TARGETS = torch.tensor([[3.0], [6.0], [9.0]])


def test_an_evaluator_of_another_model_is_told_so(tmp_path: Path) -> None:
    evaluator = Evaluator(Adapting(frozen=True), torch.device("cpu"), 2)
    with (
        served(tmp_path) as server,
        joined(Adapted(), server),
        evaluator.client(server.address, Patience(10.0)) as client,
        pytest.raises(ModelMismatch, match="give the server and this program the same model"),
    ):
        evaluator.pull(client, None)


# What changes later


def test_a_parameter_that_is_unfrozen_later_is_an_error_that_names_it(server: FakeServer) -> None:
    model = Adapted()
    with joined(model, server) as optimizer:
        model.base.bias.requires_grad_(True)
        with pytest.raises(ModelUnusable, match=r"'base\.bias' requires a gradient, and was frozen when the run began"):
            step(model, optimizer, 0)
        assert "push 2" not in server.asked
        model.base.bias.requires_grad_(False)
        with pytest.raises(ModelUnusable, match=r"'base\.bias' has a gradient, and was frozen"):
            optimizer.step()
        optimizer.zero_grad()
        step(model, optimizer, 0)
    assert len(server.gradients) == 1


def test_zeros_in_the_place_of_an_old_gradient_are_no_error_and_the_old_one_is(server: FakeServer) -> None:
    model = Adapted()
    model.base.requires_grad_(True)
    model(torch.ones(1, 64)).sum().backward()
    model.base.requires_grad_(False)
    with joined(model, server) as optimizer:
        with pytest.raises(ModelUnusable, match=r"'base.weight' has a gradient"):
            optimizer.step()  # with which another optimizer would move it
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        assert optimizer.counted == 1


def test_an_old_gradient_of_a_parameter_that_nobody_wants_trained_is_no_error(server: FakeServer) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model(torch.ones(1, 2)).sum().backward()  # trained whole, by another optimizer
    model[0].requires_grad_(False)
    with joined(model, server, params=model[1].parameters()) as optimizer:
        optimizer.step()
    assert [len(gradient) for gradient in server.gradients] == [3]


@pytest.mark.parametrize("spelling", ["load_state_dict", "data"])
def test_a_base_that_the_program_changes_is_named_once(
    server: FakeServer, caplog: pytest.LogCaptureFixture, spelling: str
) -> None:
    model = Adapted()
    with joined(model, server) as optimizer:
        model.load_state_dict(model.state_dict())  # the same values: nothing to tell
        step(model, optimizer, 0)
        assert caplog.text == ""
        if spelling == "data":
            model.base.bias.data.add_(1.0)
        else:
            model.base.load_state_dict({"weight": model.base.weight, "bias": model.base.bias + 1.0})
        for seed in range(2):
            step(model, optimizer, seed)
    (record,) = caplog.records
    assert (
        "the program changed 'base.bias', which is frozen in this run; other workers and checkpoints keep"
        in record.message
    )


def test_a_base_that_the_program_changes_can_be_an_error(server: FakeServer) -> None:
    model = Adapted()
    with joined(model, server, on_local_change="error") as optimizer:
        model.base.bias.data.add_(1.0)
        with pytest.raises(ParametersChanged, match=r"'base\.bias', which is frozen in this run"):
            step(model, optimizer, 0)
    assert server.gradients == []


def test_a_group_that_comes_later_is_an_error(server: FakeServer) -> None:
    model = Adapted()
    with joined(model, server, params=model.up.parameters()) as optimizer:
        with pytest.raises(
            OptionRefused,
            match="was added after the optimizer was made: which parameters are trained is fixed "
            "when the optimizer is created",
        ):
            optimizer.add_param_group({"params": model.down.parameters()})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("wire_dtype", [FLOAT32, BFLOAT16])
def test_they_come_in_float32_whatever_parameters_travel_in(tmp_path: Path, wire_dtype: int) -> None:
    dtype = torch.float32 if wire_dtype == FLOAT32 else torch.bfloat16
    first, second = Adapted(), Adapted()
    with served(tmp_path) as server, joined(first, server, wire_dtype=dtype), joined(second, server, wire_dtype=dtype):
        assert torch.equal(first.base.weight, second.base.weight)
    assert not torch.equal(first.base.weight, first.base.weight.to(torch.bfloat16).float())
