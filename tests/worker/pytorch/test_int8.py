"""Sums of local steps that go out in int8: what is pushed, how often it is rounded, and servers that don't know it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ormo_protos.manifest import BFLOAT16, INT8
from ormo_worker import RemoteOptimizer
from ormo_worker.errors import OptionRefused, Refused
from ormo_worker.pytorch import optimizer as optimizer_module
from ormo_worker.pytorch import transfer
from ormo_worker.pytorch.transfer import Staging
from service.wire import served
from worker.fake_server import LOST, FakeServer
from worker.models import Tied, line
from worker.pytorch.streams import LateStreams

H = 2


@pytest.fixture
def server(server: FakeServer) -> FakeServer:
    server.local_steps, server.takes_int8 = H, True
    return server


def wide(seed: int = 0) -> nn.Linear:
    """More than a block in its weight, and a bias that begins within one."""
    torch.manual_seed(seed)
    return nn.Linear(30, 50)


def remote(model: nn.Module, server: FakeServer, **options: Any) -> RemoteOptimizer:
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    return RemoteOptimizer(
        model, server.address, inner=inner, wire_dtype=torch.int8, worker_id="w", connect_timeout=5.0, **options
    )


def push(model: nn.Module, optimizer: RemoteOptimizer, seed: int = 1) -> torch.Tensor:
    """Make the steps of one push; returns the sum of the moves."""
    drawn = torch.Generator().manual_seed(seed)
    moves = []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _ in range(H):
        gradients = [torch.randn(parameter.shape, generator=drawn) for parameter in trained]
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        moves.append(torch.cat([gradient.flatten() for gradient in gradients]))
        optimizer.step()
    return torch.stack(moves).sum(0)


def test_the_sum_of_the_moves_goes_out_in_int8_and_parameters_come_back_in_bfloat16(server: FakeServer) -> None:
    model = wide()
    with remote(model, server) as optimizer:
        moved = push(model, optimizer)
        came = optimizer._incoming[0].payload.layout.dtype
    (announced,) = server.announced
    assert (announced.dtype, came, announced.local_steps) == (INT8, BFLOAT16, H)
    assert announced.payload_bytes == 1552 + 16  # 1,550 codes; blocks of 1024, 476 and 50
    largest = torch.stack([moved[:1024].abs().max(), moved[1024:1500].abs().max(), moved[1500:].abs().max()]) / 127
    step = largest.repeat_interleave(torch.tensor([1024, 476, 50]))
    off = (server.gradients[0] - moved).abs()
    assert bool((off <= step * 1.001).all())
    assert bool((off > 0).any())
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())


def test_buffers_go_along(server: FakeServer) -> None:
    model = Tied()
    with remote(model, server) as optimizer:
        model.norm.running_mean.fill_(3.0)  # type: ignore[operator, union-attr]
        push(model, optimizer)
    assert server.announced[0].with_buffers
    assert server.model is not None
    assert (server.model.float_buffers == 3.0).sum() == 4


@pytest.mark.parametrize("in_flight", [1, 2])
def test_it_leaves_a_device_beside_the_computation(
    server: FakeServer, in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, model = LateStreams(ahead="compute"), line()

    class OnDevice(Staging):
        def __init__(self, *options: Any) -> None:
            super().__init__(*options)
            self.device, self.streams = torch.device("cpu"), streams

    monkeypatch.setattr(optimizer_module, "Staging", OnDevice)
    with streams.queueing(), remote(model, server, in_flight=in_flight) as optimizer:
        moved = [push(model, optimizer, seed=number).item() for number in range(1, 6)]
    pushed = sorted(each.item() for each in server.gradients)  # of two, either may be there first
    assert pushed == pytest.approx(sorted(moved), rel=1e-6)  # 127 times their scale


def test_a_retry_sends_the_same_bytes_and_they_are_made_once(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, encode = [], transfer.encode

    def counted(*arguments: Any) -> None:
        made.append(arguments)
        encode(*arguments)

    monkeypatch.setattr(transfer, "encode", counted)
    model = wide()
    with remote(model, server) as optimizer:
        server.told(("received", LOST), ("result", LOST))
        push(model, optimizer)
        push(model, optimizer, seed=2)
    first, second, third, fourth = server.payloads
    assert first == second == third
    assert fourth != first
    assert (len(made), server.iteration) == (2, 2)


def test_the_same_moves_for_the_same_ticket_are_rounded_alike_and_for_another_one_not(server: FakeServer) -> None:
    other = FakeServer(local_steps=H, takes_int8=True, epoch=8).start()
    try:
        for each in (server, other):
            with remote(model := wide(), each) as optimizer:
                push(model, optimizer)
                push(model, optimizer)  # of the same gradients
        later = FakeServer(local_steps=H, takes_int8=True).start()
        try:
            with remote(model := wide(), later) as optimizer:
                push(model, optimizer)
        finally:
            later.stop()
    finally:
        other.stop()
    assert later.payloads[0] == server.payloads[0]
    assert other.payloads[0] != server.payloads[0], "another epoch"
    assert server.payloads[1] != server.payloads[0], "another ticket"


def test_a_server_that_does_not_know_int8_is_left_with_a_sentence(server: FakeServer) -> None:
    server.takes_int8 = False
    with pytest.raises(Refused, match=r"does not know gradients in int8: upgrade it, or .*--wire-dtype bfloat16\)$"):
        remote(line(), server, in_flight=2)
    assert server.members == {}
    assert server.payloads == []


def test_a_run_that_comes_back_without_it_is_left_too(server: FakeServer) -> None:
    model = line()
    with remote(model, server) as optimizer:
        push(model, optimizer)
        server.takes_int8 = False
        server.forget_workers()
        with pytest.raises(Refused, match="does not know gradients in int8"):
            push(model, optimizer)
    assert server.iteration == 1


def test_without_local_steps_it_is_refused_before_anybody_is_asked(server: FakeServer) -> None:
    with pytest.raises(OptionRefused, match=r"torch.int8, which is for the sums of local steps: give an inner"):
        RemoteOptimizer(line(), server.address, wire_dtype=torch.int8)
    assert server.asked == []


def test_the_real_server_has_the_moves_within_a_scale(tmp_path: Path) -> None:
    model = wide()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    with served(tmp_path, local_steps=H, method="asgd", learning_rate=1.0) as server:
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        with RemoteOptimizer(model, server.address, inner=inner, wire_dtype=torch.int8) as optimizer:
            moved = push(model, optimizer)
        with server.host.engine.inspect() as machine:
            off = (start - moved - machine.state.params).abs()
    assert float(off.max()) <= float(moved.abs().max()) / 127 * 1.001
