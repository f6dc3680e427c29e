"""Joining a real server with the same model, another one, or one of very many tensors."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from ormo_protos.manifest import UNSPECIFIED
from ormo_server.service.server import Server
from ormo_worker import RemoteOptimizer
from ormo_worker.errors import ModelMismatch, Refused
from service.wire import served
from worker.fake_server import FakeServer, refuse


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with served(tmp_path / "run") as made:
        yield made


def test_a_model_in_bfloat16_and_one_in_float32_train_together(server: Server) -> None:
    plain, half = nn.Linear(4, 3), nn.Linear(4, 3).bfloat16()
    with RemoteOptimizer(plain, server.address) as first, RemoteOptimizer(half, server.address) as second:
        assert torch.equal(half.weight, plain.weight.bfloat16())
        for model, optimizer in ((plain, first), (half, second)):
            model(torch.ones(1, 4, dtype=model.weight.dtype)).sum().backward()
            optimizer.step()
        assert (first.counted, second.counted) == (1, 1)


def test_a_worker_with_another_model_never_counts_and_hears_tensors_and_folder(server: Server, tmp_path: Path) -> None:
    with RemoteOptimizer(nn.Linear(4, 1), server.address):
        with pytest.raises(ModelMismatch) as caught:
            RemoteOptimizer(nn.Linear(5, 1), server.address)
        with server.host.engine.inspect() as machine:
            assert (machine.bucket_size, machine.state.joins) == (1, 1)
    sentence = str(caught.value)
    assert "shape (1, 5) here and a float32 parameter of shape (1, 4) there" in sentence
    assert f"not that of the run in {tmp_path / 'run'}" in sentence


class Wide(nn.Module):
    """As many tensors with long names as do not fit into one message."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(8500):
            self.register_parameter(f"{'expert_' * 71}{number}", nn.Parameter(torch.zeros(())))


def test_a_model_whose_manifest_is_larger_than_a_message_trains(server: Server) -> None:
    model = Wide()
    with RemoteOptimizer(model, server.address) as optimizer, RemoteOptimizer(Wide(), server.address):
        for parameter in model.parameters():
            parameter.grad = torch.ones(())
        optimizer.step()
        assert optimizer.counted == 1


def test_an_older_server_that_takes_one_message_is_named_as_the_reason(fake: FakeServer) -> None:
    with pytest.raises(ValueError, match="has a longer list of tensors than one message holds, which the server at"):
        RemoteOptimizer(Wide(), fake.address)
    assert fake.asked == ["join"]


def test_an_older_server_is_offered_no_float64_buffer(fake: FakeServer) -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("scale", torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="has 'scale', a float64 buffer of shape \\(2,\\), which the server at"):
        RemoteOptimizer(model, fake.address)
    assert fake.asked == ["join"]


def test_an_older_server_is_not_told_how_buffers_are_merged(fake: FakeServer) -> None:
    model = nn.BatchNorm1d(2)
    with RemoteOptimizer(model, fake.address) as optimizer:
        assert fake.manifest is not None
        assert {spec.merge for spec in fake.manifest.tensors} == {UNSPECIFIED}
        model(torch.randn(3, 2)).sum().backward()
        optimizer.step()
        assert fake.announced[0].manifest_digest == fake.manifest.digest


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """As older servers are, which know nothing of a model's digest."""
    made = FakeServer(manifest_version=0).start()
    yield made
    made.stop()


def test_at_an_older_server_a_worker_with_another_model_leaves_at_once(fake: FakeServer) -> None:
    RemoteOptimizer(nn.Linear(2, 1), fake.address).close()
    fake.asked.clear()
    with pytest.raises(ModelMismatch, match="shape \\(1, 3\\) here"):
        RemoteOptimizer(nn.Linear(3, 1), fake.address)
    assert fake.asked == ["join", "leave"]


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "ALREADY_EXISTS", "OUT_OF_RANGE"])
def test_what_grpc_itself_refuses_every_time_is_not_tried_again(fake: FakeServer, code: str) -> None:
    fake.told(("join", refuse(code, message="CLIENT: Received message larger than max")))
    with pytest.raises(Refused, match="larger than max"):
        RemoteOptimizer(nn.Linear(2, 1), fake.address)
    assert fake.asked == ["join"]
