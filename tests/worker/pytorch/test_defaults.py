"""A program's default device and dtype are for its own tensors: the run's are the same bits."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from ormo_server.sim import plan
from ormo_server.sim.settings import SimSettings
from ormo_worker import RemoteOptimizer
from ormo_worker.tasks import digits
from ormo_worker.tasks.batches import batches, evaluation_batches
from ormo_worker.tasks.images import Colours, ImageTensors
from service.wire import served
from worker.models import Tied
from worker.peculiar import Peculiar, points


@contextmanager
def defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    """As set by a program; may be used within itself."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):  # what `set_default_device` does, too, until it is called again
            yield
    finally:
        torch.set_default_dtype(before)


def others() -> AbstractContextManager[None]:
    """Defaults that are not ours: "meta" stands in for a GPU, and what comes to lie there has no values at all."""
    return defaults("meta", torch.float64)


class Named(Peculiar):
    """A task that sees to it itself that it does not depend on the defaults."""

    def build_model(self) -> nn.Module:
        with defaults("cpu", torch.float32):
            return super().build_model()

    def train_set(self) -> Dataset[Any]:
        with defaults("cpu", torch.float32):
            return super().train_set()

    def test_set(self) -> Dataset[Any]:
        with defaults("cpu", torch.float32):
            return super().test_set()


# Made before the defaults are set, as by a program that sets them later. 8 samples of 3 numbers.
INPUTS = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))


def trained(folder: Path, in_flight: int) -> dict[str, Tensor]:
    """The model after three steps on a server in this process."""
    torch.manual_seed(0)
    with defaults("cpu", torch.float32):
        model = Tied()
    with (
        served(folder, method="smega2", slots_per_worker=2) as server,
        RemoteOptimizer(model, server.address, in_flight=in_flight, connect_timeout=10.0) as optimizer,
    ):
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(INPUTS).square().mean()
            loss.backward()
            optimizer.step(loss=loss)
        assert optimizer.refusals.total() == 0
    return model.state_dict()


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_worker_and_its_server_train_as_without_them(tmp_path: Path, in_flight: int) -> None:
    expected = trained(tmp_path / "without", in_flight)
    with others():
        found = trained(tmp_path / "with", in_flight)
    if in_flight == 1:  # with two, whose parameters come first is the network's affair
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def simulated(method: str) -> Tensor:
    plan._workload.cache_clear()
    settings = SimSettings(
        method=method, task="worker.pytorch.test_defaults:Named", workers=3, batch_size=8, stop_after_gradients=12
    )
    return plan.Plan(settings).run().training.machine.state.params


@pytest.mark.parametrize("method", ["ormo", "asgdm", "shifted", "smega2", "dc-asgd", "ssgdm"])
def test_a_simulation_trains_as_without_them(method: str) -> None:
    expected = simulated(method)
    with others():
        assert torch.equal(simulated(method), expected)


def drawn() -> list[Tensor]:
    """Batches from every kind of data set that is ours to read."""
    images = (INPUTS.repeat(1, 64).view(8, 3, 8, 8) * 40 + 128).clamp(0, 255).to(torch.uint8)
    coloured = ImageTensors(images, INPUTS[:, 0].long(), Colours((0.5, 0.25, 0.125), (0.25, 0.25, 0.25)))
    in_turn = Subset(points_on_the_cpu(), range(8))  # read by a loader
    streams = [batches(each, 4, seed=3) for each in (coloured, in_turn, digits.Digits().train_set())]
    found = [tensor for stream in streams for tensor in (*next(stream), *next(stream))]
    return found + [tensor for batch in evaluation_batches(in_turn, 4, 6) for tensor in batch]


def points_on_the_cpu() -> Dataset[Any]:
    with defaults("cpu", torch.float32):
        return points(10, seed=1)


def test_batches_are_drawn_as_without_them() -> None:
    expected = drawn()
    with others():
        found = drawn()
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
