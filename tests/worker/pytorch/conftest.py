"""A model of one weight, and its optimizer at the fake server."""

from collections.abc import Iterator

import pytest
from torch import nn

from ormo_worker import RemoteOptimizer
from worker.fake_server import FakeServer
from worker.models import line
from worker.pytorch.loops import optimizer_of


@pytest.fixture
def model() -> nn.Linear:
    return line(weight=2.0)


@pytest.fixture
def optimizer(server: FakeServer, model: nn.Linear) -> Iterator[RemoteOptimizer]:
    with optimizer_of(model, server) as optimizer:
        yield optimizer
