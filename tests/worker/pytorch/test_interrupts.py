"""Ctrl-C in a program that goes on, such as a notebook: it may come at any moment of a step."""

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ormo_worker import RemoteOptimizer
from worker.fake_server import FakeServer

INTERRUPTS = 200


@pytest.fixture(autouse=True)
def as_python_does() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


class Interrupting:
    """Sends one interrupt so many seconds after it was asked to."""

    def __init__(self, seconds: float) -> None:
        self.begin = threading.Event()
        self._seconds = seconds
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        self.begin.wait()
        time.sleep(self._seconds)
        os.kill(os.getpid(), signal.SIGINT)

    def join(self) -> None:
        self._thread.join()


@pytest.mark.parametrize("in_flight", [1, 2])
def test_training_goes_on_after_each_of_many_interrupts(server: FakeServer, in_flight: int) -> None:
    """One where gRPC has just taken a lock would leave it taken, and all calls of the process would wait for it."""
    model, moments = nn.Linear(1, 1), random.Random(0)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()

    with RemoteOptimizer(model, server.address, in_flight=in_flight) as optimizer:
        for _ in range(INTERRUPTS):
            interrupting = Interrupting(moments.uniform(0.0, 0.005))
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - whichever step it comes in
                interrupting.begin.set()
                while True:
                    step()
            interrupting.join()
        before = optimizer.iteration
        for _ in range(2 * in_flight):
            step()
        assert optimizer.iteration > before


def test_a_server_that_does_not_answer_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        interrupting = Interrupting(0.5)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            interrupting.begin.set()
            RemoteOptimizer(nn.Linear(1, 1), f"127.0.0.1:{silent.getsockname()[1]}", connect_timeout=60.0)
        assert time.monotonic() - began < 30.0
        interrupting.join()
