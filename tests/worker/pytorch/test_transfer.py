"""Tensors between a model and a payload, straight and through a mirror of the payload on their device."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ormo_protos.manifest import BFLOAT16, FLOAT32
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_worker.pytorch.devices import Arriving
from ormo_worker.pytorch.transfer import Staging
from worker.models import Tied, line
from worker.pytorch.streams import LateStreams


def staging_of(model: nn.Module, way: str) -> Staging:
    staging = Staging(model)
    assert staging.device is None
    if way == "mirror":  # what happens on CUDA, but for page-locked memory and with all streams in step
        through_device(staging, LateStreams())
    return staging


def through_device(staging: Staging, streams: LateStreams) -> None:
    staging.device = torch.device("cpu")
    staging.streams = streams


@pytest.fixture(params=["direct", "mirror"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors])


def test_gradients_come_in_the_order_of_the_manifest_with_decay(way: str) -> None:
    model = Tied()
    staging = staging_of(model, way)
    model(torch.randn(5, 3)).sum().backward()
    model.norm.bias.grad = None
    transfer = staging.transfer(staging.payload(FLOAT32, with_buffers=False))
    transfer.payload.parameters.fill_(7.0)  # what an earlier gradient left
    transfer.gather_gradients([0.5, 0.0, 0.5])
    expected = [
        model.embedding.weight.grad + 0.5 * model.embedding.weight,
        model.norm.weight.grad,
        torch.zeros(4),  # without a gradient: zero, without decay
    ]
    assert torch.equal(transfer.payload.parameters, flat(expected))


class Several(nn.Linear):
    """A statistic, a mask and a queue, in float32 and float64, and a counter."""

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)
        self.register_buffer("running_mean", torch.tensor([1.0, 2.0]))
        self.register_buffer("running_var", torch.tensor([3.0, 4.0], dtype=torch.float64))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("queue", torch.tensor([5.0, 1 + 1e-12], dtype=torch.float64))
        self.register_buffer("pointer", torch.tensor(-1))  # which has the bits of a NaN


def test_buffers_arrive_exactly_as_they_were_sent(way: str) -> None:
    source, target = Several(), Several()
    for buffer in target.buffers():
        buffer.zero_()
    sent, received = staging_of(source, way), staging_of(target, way)
    out, back = (each.transfer(each.payload(FLOAT32, with_buffers=True)) for each in (sent, received))
    out.gather_parameters()
    back.payload.memory[:] = out.payload.memory
    assert back.load() == []
    for name, buffer in source.named_buffers():
        assert target.get_buffer(name).numpy().tobytes() == buffer.numpy().tobytes(), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_only_what_the_server_did_not_take_is_mended(way: str, bad: float) -> None:
    """For an average any infinity that the server's does not have; for what is the program's own only NaN."""
    model, servers = Several(), Several()
    incoming, from_server = staging_of(model, way), Staging(servers).snapshot()
    transfer = incoming.transfer(incoming.payload(FLOAT32, with_buffers=True))
    transfer.payload.memory[:] = from_server.memory
    model.pointer.fill_(9)
    model.running_mean.copy_(torch.tensor([7.0, 8.0]))
    model.running_var[0] = bad
    model.mask[0] = 6.0
    model.queue[0] = bad
    with torch.no_grad():
        model.weight.fill_(0.5)
    mended = transfer.load(mends=True)
    assert mended == ["running_var", "queue"] if bad != bad else ["running_var"]
    assert model.running_var.tolist() == [3.0, 4.0]
    assert model.queue.tolist() == ([5.0, 1 + 1e-12] if bad != bad else [bad, 1 + 1e-12])
    assert (model.pointer.item(), model.running_mean.tolist()) == (9, [7.0, 8.0])
    assert model.mask.tolist() == [6.0, -torch.inf]
    assert torch.equal(model.weight, servers.weight)


def test_an_infinity_that_the_server_has_too_is_not_mended(way: str) -> None:
    model = Several()
    model.running_mean[0] = -torch.inf
    staging = staging_of(model, way)
    transfer = staging.transfer(staging.payload(FLOAT32, with_buffers=True))
    transfer.payload.memory[:] = staging.snapshot().memory
    model.running_mean[1] = 9.0
    assert transfer.load(mends=True) == []
    assert model.running_mean.tolist() == [-torch.inf, 9.0]


def test_parameters_that_are_left_out_count_as_zero_although_they_have_a_gradient(way: str) -> None:
    model = nn.Linear(2, 1)
    staging = staging_of(model, way)
    model(torch.ones(1, 2)).sum().backward()
    transfer = staging.transfer(staging.payload(FLOAT32, with_buffers=False))
    transfer.gather_gradients([None, 0.0])
    assert transfer.payload.parameters.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_bfloat16_gradients_are_rounded_once(way: str, decay: float) -> None:
    model = nn.Linear(50, 50)
    staging = staging_of(model, way)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    transfer = staging.transfer(staging.payload(BFLOAT16, with_buffers=False))
    transfer.gather_gradients([decay, decay])
    exact = flat([parameter.grad + decay * parameter for parameter in model.parameters()])
    assert torch.equal(transfer.payload.parameters, exact.to(torch.bfloat16))


def test_gradients_of_a_bfloat16_model_are_summed_with_their_decay_in_float32(way: str) -> None:
    model = nn.Linear(50, 50).to(torch.bfloat16)
    staging = staging_of(model, way)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    transfer = staging.transfer(staging.payload(FLOAT32, with_buffers=False))
    transfer.gather_gradients([0.1, 0.1])
    exact = flat([parameter.grad.float() + 0.1 * parameter.float() for parameter in model.parameters()])
    torch.testing.assert_close(transfer.payload.parameters, exact)


def test_gradients_in_another_memory_format_and_sparse_ones_are_written_row_by_row(way: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.Embedding(4, 2, sparse=True))
    staging = staging_of(model, way)
    model[0].weight.grad = torch.randn(3, 2, 2, 2).to(memory_format=torch.channels_last)
    model[1](torch.tensor([2, 2])).sum().backward()
    transfer = staging.transfer(staging.payload(FLOAT32, with_buffers=False))
    transfer.gather_gradients([0.0, 0.0])
    expected = [model[0].weight.grad.contiguous(), torch.tensor([[0, 0], [0, 0], [2, 2], [0, 0]])]
    assert torch.equal(transfer.payload.parameters, flat(expected))


def test_a_model_survives_the_way_to_a_payload_and_into_another_model(way: str) -> None:
    source, target = Tied(), Tied()
    source(torch.randn(5, 3))  # moves the batch statistics
    source.mask.logical_not_()
    source.small.fill_(5)
    there, here = staging_of(source, way), staging_of(target, way)
    payload = Payload(PayloadLayout.of(there.tensors.manifest, FLOAT32, with_buffers=True, with_frozen=True))
    there.transfer(payload).gather_parameters()
    assert bytes(there.snapshot().memory) == bytes(payload.memory)
    before = dict(target.named_parameters())
    here.transfer(payload).load()
    assert all(before[name] is parameter for name, parameter in target.named_parameters())
    assert target.head.weight is target.embedding.weight
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name
        assert tensor.dtype == target.state_dict()[name].dtype


def test_without_frozen_tensors_in_the_payload_the_models_own_stay(way: str) -> None:
    model = Tied()
    staging = staging_of(model, way)
    payload = staging.payload(FLOAT32, with_buffers=True)
    payload.parameters.zero_()
    before = model.frozen.weight.clone()
    staging.transfer(payload).load()
    assert model.norm.weight.tolist() == [0.0] * 4
    assert torch.equal(model.frozen.weight, before)


def test_frozen_tensors_of_a_bfloat16_base_come_and_go_in_float32_to_the_bit(way: str) -> None:
    model = nn.Sequential(nn.Linear(5, 5).to(torch.bfloat16).requires_grad_(False), nn.Linear(5, 1))
    staging = staging_of(model, way)
    before = model[0].weight.clone()
    payload = staging.snapshot()
    assert torch.equal(payload.frozen, flat([model[0].weight, model[0].bias]))
    with torch.no_grad():
        model[0].weight.zero_()
    staging.transfer(payload).load()
    assert torch.equal(model[0].weight, before)


def test_without_buffers_in_the_payload_the_models_own_stay(way: str) -> None:
    model = nn.BatchNorm1d(2)
    staging = staging_of(model, way)
    payload = staging.payload(FLOAT32, with_buffers=False)
    payload.parameters.copy_(torch.arange(4.0))
    model.running_mean.fill_(3.0)
    staging.transfer(payload).load()
    assert model.running_mean.tolist() == [3.0, 3.0]
    assert [model.weight.tolist(), model.bias.tolist()] == [[0.0, 1.0], [2.0, 3.0]]


def test_buffers_travel_with_the_gradient(way: str) -> None:
    model = nn.BatchNorm1d(2)
    staging = staging_of(model, way)
    transfer = staging.transfer(staging.payload(BFLOAT16, with_buffers=True))
    model.running_mean.fill_(3.0)
    model.num_batches_tracked.fill_(2**40)
    transfer.gather_gradients([0.0, 0.0])
    assert transfer.payload.float_buffers.tolist() == [3.0, 3.0, 1.0, 1.0]
    assert transfer.payload.int_buffers.tolist() == [2**40]


def test_loading_needs_no_gradient_history(way: str) -> None:
    model = nn.Linear(2, 1)
    staging = staging_of(model, way)
    payload = staging.payload(FLOAT32, with_buffers=False)
    payload.parameters.fill_(1.0)
    model(torch.ones(1, 2)).sum().backward()
    staging.transfer(payload).load()
    assert model.weight.requires_grad
    assert model.weight.is_leaf
    assert model(torch.ones(1, 2)).item() == 3.0


# Copies beside the computation. Whichever stream runs ahead and however late the others are, the numbers are the same.


class Device:
    """A model with one weight, and the streams of a device that is as late as it may be."""

    def __init__(self, ahead: str, ranks: Any = None) -> None:
        self.streams = LateStreams(ahead)
        self.model = line(weight=1.0)
        self.model.weight.grad = torch.zeros(1, 1)
        self.staging = Staging(self.model, ranks=ranks)
        through_device(self.staging, self.streams)
        self.payloads = [self.staging.payload(FLOAT32, with_buffers=False) for _ in range(4)]

    def compute(self, gradient: float) -> None:
        """A gradient that is the weight plus a number."""
        assert self.model.weight.grad is not None
        with torch.no_grad():
            self.model.weight.grad.fill_(gradient)
            torch._foreach_add_([self.model.weight.grad], [self.model.weight])


@pytest.fixture(params=["", "compute", "outward", "inward"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    made = Device(request.param)
    with made.streams.queueing():
        yield made


def test_gradients_leave_one_mirror_one_after_the_other_while_the_next_is_computed(device: Device) -> None:
    copies = []
    for number, payload in enumerate(device.payloads):
        device.compute(10.0 * number)
        copies.append(device.staging.transfer(payload).begin_gradients([0.0]))
    for each in reversed(copies):
        each.wait()
    assert [payload.parameters.item() for payload in device.payloads] == [1.0, 11.0, 21.0, 31.0]


def test_parameters_can_be_overwritten_on_the_host_once_they_are_loaded(device: Device) -> None:
    incoming, outgoing = device.payloads[:2]
    for number in (2.0, 3.0):
        incoming.parameters.numpy().fill(number)
        device.staging.transfer(incoming).load()
    incoming.parameters.numpy().fill(99.0)
    device.compute(0.0)
    device.staging.transfer(outgoing).gather_gradients([0.0])
    assert outgoing.parameters.item() == 3.0


@pytest.mark.parametrize("mirror", [0, 1])
def test_each_gradient_is_that_of_the_parameters_loaded_before_it(device: Device, mirror: int) -> None:
    copies = []
    for number, payload in enumerate(device.payloads):
        delivered = device.staging.payload(FLOAT32, with_buffers=False)
        delivered.parameters.numpy().fill(float(number))
        device.staging.transfer(delivered, mirror=mirror).load()
        device.compute(10.0)
        copies.append(device.staging.transfer(payload).begin_gradients([0.0]))
    for each in copies:
        each.wait()
    assert [payload.parameters.item() for payload in device.payloads] == [10.0, 11.0, 12.0, 13.0]


def test_a_loss_arrives_as_it_was_when_it_was_asked_for(device: Device) -> None:
    loss = torch.tensor(0.0)
    with torch.no_grad():
        loss.fill_(2.5)
        arriving = device.staging.fetch(loss)
        loss.fill_(7.5)
    assert arriving.wait() == 2.5
    assert arriving.is_here()
    assert len(device.streams.kept) == 1


def test_parameters_come_in_while_the_gradient_before_is_still_computed() -> None:
    device = Device("")
    with device.streams.queueing():
        for mirror, waits in ((1, False), (0, True)):
            device.staging.transfer(device.payloads[1], mirror=mirror).load()
            device.streams.synchronize()
            device.compute(0.0)
            before = len(device.streams.compute.work)
            device.staging.transfer(device.payloads[0]).begin_gradients([0.0])
            device.staging.transfer(device.payloads[1], mirror=mirror).load()
            assert (device.streams.compute.done > before) == waits


def test_memory_that_copies_use_is_kept_for_them() -> None:
    device = Device("")
    device.staging.transfer(device.payloads[0], mirror=0)
    device.staging.transfer(device.payloads[1], mirror=1)
    assert [tensor.numel() for tensor in device.streams.kept] == [1, 0, 0, 0] * 2


@dataclass
class OnDevices:
    """A rank whose broadcasts are queued where it computes, as those of NCCL are."""

    leads: bool
    sent: list[Tensor]

    def reaches(self, device: torch.device) -> bool:
        return True

    def broadcast(self, tensor: Tensor) -> None:
        if self.leads:
            self.sent.append(torch.empty_like(tensor).copy_(tensor))
        else:
            tensor.copy_(self.sent.pop(0))

    def mean(self, value: Tensor) -> Tensor:
        return value.detach() + (1.0 if self.leads else -1.0)


@pytest.mark.parametrize("ahead", ["", "compute", "outward", "inward"])
def test_the_other_ranks_load_what_rank_0_has_loaded_from_device_to_device(ahead: str) -> None:
    sent: list[Tensor] = []
    first, other = Device(ahead, OnDevices(True, sent)), Device(ahead, OnDevices(False, sent))
    with first.streams.queueing():
        for number, payload in enumerate(first.payloads):
            payload.parameters.numpy().fill(float(number))
            first.staging.transfer(payload).load()
            payload.parameters.numpy().fill(99.0)
    first.streams.synchronize()
    seen = []
    with other.streams.queueing():
        for payload in other.payloads:  # in which nothing has come
            other.compute(10.0)
            other.staging.transfer(payload, mirror=1).load()
            other.streams.synchronize()
            seen.append((other.model.weight.item(), other.model.weight.grad.item()))  # type: ignore[union-attr]
    assert seen == [(0.0, 11.0), (1.0, 10.0), (2.0, 11.0), (3.0, 12.0)]
    assert first.model.weight.item() == 3.0


def test_a_loss_on_a_device_is_the_mean_of_the_ranks() -> None:
    for leads in (True, False):
        device = Device("", OnDevices(leads, []))
        device.staging.transfer(device.payloads[0])
        arriving = device.staging.fetch_number(torch.tensor(2.0))
        assert isinstance(arriving, Arriving)
        assert arriving.number() == (3.0 if leads else 1.0)


def test_ranks_that_send_nothing_pack_nothing() -> None:
    other = Device("", OnDevices(False, []))
    outgoing = other.staging.outgoing(FLOAT32)
    outgoing.payload.parameters.fill_(7.0)
    assert outgoing.begin_gradients([0.0]).done()
    assert outgoing.begin_moves([torch.zeros(1, 1)]).done()
    other.streams.synchronize()
    assert outgoing.payload.parameters.item() == 7.0
