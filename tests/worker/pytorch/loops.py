"""Training whose gradients a test can work out."""

import weakref
from typing import Any, ClassVar

import torch
from torch import nn

from ormo_worker import RemoteOptimizer
from service.wire import eventually
from worker.fake_server import FakeServer
from worker.models import line

PATIENT_SECONDS = 30.0  # for what happens at once, but on a busy machine


def optimizer_of(model: nn.Module, server: FakeServer, **options: Any) -> RemoteOptimizer:
    return RemoteOptimizer(model, server.address, connect_timeout=5.0, **options)


def backward(model: nn.Linear, factor: float = 1.0) -> torch.Tensor:
    """A loss whose gradient is `factor`."""
    loss = model(torch.tensor([[factor]])).sum()
    loss.backward()
    return loss


class Loop:
    """A training loop for y = w x whose every gradient is the weight itself.

    Args:
        address: of the server.
        in_flight: gradients on their way.
    """

    made: ClassVar[list["weakref.ref[Loop]"]] = []

    def __init__(self, address: str, in_flight: int = 2, **options: Any) -> None:
        self.model = line(weight=2.0)
        self.optimizer = RemoteOptimizer(self.model, address, in_flight=in_flight, connect_timeout=10.0, **options)
        self.pushed: list[tuple[int | None, float]] = []
        self.made.append(weakref.ref(self))

    def step(self, factor: float = 1.0) -> None:
        self.optimizer.zero_grad()
        weight = self.model.weight.item()
        (0.5 * factor * self.model.weight.square()).sum().backward()
        self.pushed.append((self.exchanges.current, factor * weight))
        self.optimizer.step()

    def step_and_wait(self) -> None:
        """A step, and then time enough for all answers to come."""
        self.step()
        self.wait()

    def wait(self) -> None:
        waiting = self.optimizer._in_flight - 1
        eventually(lambda: waiting == 0 or self.exchanges._done.qsize() == waiting, PATIENT_SECONDS)

    @property
    def exchanges(self) -> Any:
        return self.optimizer._pipeline

    @classmethod
    def close_all(cls) -> None:
        while cls.made:
            if (loop := cls.made.pop()()) is not None:
                loop.optimizer.close()
