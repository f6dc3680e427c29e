"""A program's buffers and the real server's, through `RemoteOptimizer`."""

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ormo_server.service.server import Server
from ormo_worker import RemoteOptimizer
from ormo_worker.errors import ModelUnusable, Refused
from service.wire import served


class Kept(nn.Module):
    """Batch norm, a queue with its pointer, a mask of -inf, and a number in float64; it counts what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.line = nn.Linear(3, 2)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("queue", torch.zeros(4))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("precise", torch.tensor(1 + 1e-12, dtype=torch.float64))
        self.register_buffer("alive", torch.ones(2, dtype=torch.bool))

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.queue[self.pointer] = float(self.pointer)
            self.pointer[0] = (self.pointer[0] + 1) % 4
            self.precise += 1e-15
            self.alive[0] = False
        return (self.line(self.norm(inputs)) + self.mask).softmax(-1)[:, 0].sum() + self.line.weight.square().sum()


def step(model: nn.Module, optimizer: RemoteOptimizer, inputs: Tensor) -> None:
    optimizer.zero_grad()
    model(inputs).backward()
    for parameter in model.parameters():  # as GradScaler and clipping do: the batch is bad, the gradient is not
        if parameter.grad is not None:
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
    optimizer.step()


def batch(bad: float = 0.0) -> Tensor:
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    inputs[0, 0] += bad
    return inputs


def stored(server: Server) -> dict[str, Tensor]:
    assert server.host.checkpoint(anew=True)
    assert server.host.files.last_checkpoint is not None
    return load_file(server.host.files.last_checkpoint.path / "model.safetensors")


def test_one_workers_buffers_are_on_the_server_exactly_as_the_program_has_them(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        model = Kept()
        with RemoteOptimizer(model, server.address) as optimizer:
            for _ in range(6):
                step(model, optimizer, batch())
        found = stored(server)
        for name, own in model.named_buffers():
            assert torch.equal(found[name].to(own.dtype), own), name
        assert found["precise"].dtype == torch.float64
        assert found["pointer"].tolist() == [2]


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_bad_batch_costs_no_gradient_and_its_statistics_are_mended_soon(
    tmp_path: Path, in_flight: int, caplog: pytest.LogCaptureFixture
) -> None:
    with served(tmp_path, slots_per_worker=2) as server, caplog.at_level(logging.WARNING):
        model = Kept()
        with RemoteOptimizer(model, server.address, in_flight=in_flight) as optimizer:
            for bad in (0.0, 0.0, math.inf, *[0.0] * 6):
                step(model, optimizer, batch(bad))
            assert model.norm.running_mean is not None
            assert model.norm.running_mean.isfinite().all()
            assert model.mask.tolist() == [0.0, -math.inf]
            assert model.pointer.tolist() == [9 % 4], "its own were not overwritten"
        assert (optimizer.counted, optimizer.refusals) == (9, {})
        assert all(found.isfinite().all() for name, found in stored(server).items() if name != "mask")
        assert "were reset to the server's values: 'norm.running_mean', 'norm.running_var'" in (caplog.text)


def test_a_worker_that_joins_again_gets_the_servers_buffers_once_and_no_slot_brings_them_later(tmp_path: Path) -> None:
    with served(tmp_path, slots_per_worker=4) as server:
        model = Kept()
        with RemoteOptimizer(model, server.address, in_flight=4) as optimizer:
            for number in range(1, 9):
                step(model, optimizer, batch())
                assert model.pointer.tolist() == [number % 4]
            with server.host.engine.inspect() as machine:
                machine.state.int_buffers.fill_(0)
            identity = optimizer._client.identity
            server.host.engine.leave(identity.worker, identity.incarnation)
            seen = []
            for _ in range(8):
                step(model, optimizer, batch())
                seen.append(model.pointer.item())
            falls = [at for at, (one, other) in enumerate(itertools.pairwise(seen)) if other != (one + 1) % 4]
            assert len(falls) <= 1, seen


def growing(model: Any) -> None:
    model.queue = torch.cat([model.queue, torch.zeros(1)])


def shrinking(model: Any) -> None:
    model.queue = torch.tensor(0.0)


def other_dtype(model: Any) -> None:
    model.queue = model.queue.double()


@pytest.mark.parametrize("change", [growing, shrinking, other_dtype])
def test_a_buffer_that_changes_ends_the_step_with_its_name_before_anything_is_sent(tmp_path: Path, change: Any) -> None:
    with served(tmp_path) as server:
        model = Kept()
        with RemoteOptimizer(model, server.address) as optimizer:
            step(model, optimizer, batch())
            before, queue = server.host.engine.iteration(), model.queue
            change(model)
            model.line.weight.grad = torch.zeros_like(model.line.weight)
            with pytest.raises(ModelUnusable, match="the buffer 'queue' has become"):
                optimizer.step()
            assert server.host.engine.iteration() == before
            model.queue = queue
            step(model, optimizer, batch())  # its ticket is still good
            assert optimizer.counted == 2


def test_an_offered_buffer_with_nan_is_named_with_what_to_do(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        model = Kept()
        model.queue[1] = math.nan
        with pytest.raises(Refused, match=r"'queue'.*persistent=False"):
            RemoteOptimizer(model, server.address)
