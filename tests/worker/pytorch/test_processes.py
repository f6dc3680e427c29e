"""One process is in the run, once: not its forks, not its copies, not what was interrupted."""

import copy
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ormo_worker import OrmoError, ParameterClient, RemoteOptimizer, manifest_of
from ormo_worker.errors import ClientClosed, OptionRefused
from service.wire import eventually
from worker.fake_server import FakeServer, refuse
from worker.models import line

PATIENT_SECONDS = 240.0  # three seconds of imports, but on a busy machine

# What a child does, between two steps of its parent.
PROGRAM = """
import gc, os, sys, torch
from torch.utils.data import DataLoader
from ormo_worker import OrmoError, RemoteOptimizer

model = torch.nn.Linear(1, 1, bias=False)
optimizer = RemoteOptimizer(model, sys.argv[1], in_flight=int(sys.argv[2]), metrics_listen="127.0.0.1:0")
optimizer.step()

class Held(torch.utils.data.Dataset):
    def __init__(self):
        self.optimizer = optimizer
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return index

def load():
    assert len(list(DataLoader(Held(), num_workers=2, multiprocessing_context="fork"))) == 4

def ends():
    sys.exit(3)

def closes():
    global optimizer
    with optimizer:
        pass
    optimizer._client.close()
    del optimizer
    gc.collect()
    os._exit(3)

def steps():
    for use in (optimizer.step, optimizer._client.pull):
        try:
            use()
        except OrmoError as error:
            assert f"process {os.getpid()} is a fork of the worker's process {os.getppid()}" in str(error), error
        else:
            os._exit(4)
    os._exit(3)

if sys.argv[3] == "load":
    load()
elif (child := os.fork()) == 0:
    globals()[sys.argv[3]]()
else:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
optimizer.step()
print("stepped", flush=True)
"""


@pytest.mark.parametrize(("child", "in_flight"), [("ends", 1), ("closes", 2), ("steps", 2), ("load", 1)])
def test_only_the_process_that_joined_leaves(server: FakeServer, child: str, in_flight: int) -> None:
    server.takes_data = True
    program = [sys.executable, "-c", PROGRAM, server.address, str(in_flight), child]
    done = subprocess.run(program, capture_output=True, text=True, timeout=PATIENT_SECONDS, check=False)
    assert (done.returncode, done.stdout) == (0, "stepped\n"), done.stderr
    assert [asked for asked in server.asked if asked in ("join", "leave")] == ["join", "join", "leave"]
    assert server.asked[-1] == "leave"
    assert server.iteration == 2


COPIES: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, pickle.dumps, lambda it: copy.deepcopy({"its": it})]


@pytest.mark.parametrize("copied", COPIES)
def test_an_optimizer_can_not_be_copied_and_its_state_can(server: FakeServer, copied: Callable[[Any], Any]) -> None:
    model = line(weight=2.0)
    with RemoteOptimizer(model, server.address, connect_timeout=5.0) as optimizer:
        with pytest.raises(OrmoError, match="a RemoteOptimizer can't be copied or pickled: it is tied to this process"):
            copied(optimizer)
        optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        copy.deepcopy(model)
        optimizer.step()
    assert server.asked.count("leave") == 1


def test_an_optimizer_that_is_made_again_for_its_model_closes_the_one_before(server: FakeServer) -> None:
    model = line(weight=2.0)
    first = RemoteOptimizer(model, server.address, connect_timeout=5.0)
    other = RemoteOptimizer(line(weight=2.0), server.address, connect_timeout=5.0)
    for again in (model, torch.compile(model, backend="eager"), nn.DataParallel(model)):
        second = RemoteOptimizer(again, server.address, connect_timeout=5.0)
        assert len(server.members) == 2
        with pytest.raises(ClientClosed, match="create a new one to continue"):
            first.step()
        second.step()
        first = second
    other.step()
    other.close()
    first.close()
    assert not server.members


def test_one_at_another_server_is_left_alone(server: FakeServer) -> None:
    elsewhere = FakeServer().start()
    model = line(weight=2.0)
    try:
        with (
            RemoteOptimizer(model, elsewhere.address, connect_timeout=5.0) as first,
            RemoteOptimizer(model, server.address, connect_timeout=5.0) as second,
        ):
            second.step()
            first.step()
    finally:
        elsewhere.stop()


def test_one_that_can_not_be_made_again_leaves_its_port_to_the_next(server: FakeServer) -> None:
    model = line(weight=2.0)
    first = RemoteOptimizer(model, server.address, connect_timeout=5.0, metrics_listen="127.0.0.1:0")
    port = first._close.peek()[2][2]._port.server_port  # type: ignore[index]
    with RemoteOptimizer(model, server.address, connect_timeout=5.0, metrics_listen=f"127.0.0.1:{port}") as second:
        second.step()


def test_one_that_could_not_be_made_is_nothing_to_close_although_its_error_is_kept(server: FakeServer) -> None:
    model = line(weight=2.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OptionRefused) as kept:  # as a notebook keeps the last one, and all objects in its frames
            RemoteOptimizer(model, server.address, metrics_listen=f"127.0.0.1:{taken.getsockname()[1]}")
        with RemoteOptimizer(model, server.address, connect_timeout=5.0) as second:
            second.step()
    assert "nothing can listen there" in str(kept.value)


def interrupt(_: Any) -> None:
    """As Ctrl-C, or a notebook's button, while the worker waits for what the server does with its request."""
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Also where the tests were started in the background, which has the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("point", ["join", "offer", "delivery"])
@pytest.mark.usefixtures("_interruptible")
def test_who_is_interrupted_while_joining_leaves(server: FakeServer, point: str) -> None:
    keeper = RemoteOptimizer(line(weight=2.0), server.address, connect_timeout=5.0) if point != "offer" else None
    server.told((point, interrupt))
    with pytest.raises(KeyboardInterrupt):
        RemoteOptimizer(line(weight=2.0), server.address, connect_timeout=5.0)
    eventually(lambda: len(server.members) == (keeper is not None), PATIENT_SECONDS)
    if keeper is not None:  # else there was no member yet
        assert server.asked[-1] == "leave"
        keeper.step()
        keeper.close()


def test_who_learns_that_the_model_is_another_leaves(server: FakeServer) -> None:
    with RemoteOptimizer(line(weight=2.0), server.address, connect_timeout=5.0):
        with pytest.raises(OrmoError, match="trains another model"):
            RemoteOptimizer(nn.Linear(3, 2), server.address, connect_timeout=5.0)
        assert len(server.members) == 1


def test_who_was_refused_has_nothing_to_leave(server: FakeServer) -> None:
    server.told(("join", refuse("PERMISSION_DENIED", "PERMISSION_DENIED")))
    client = ParameterClient(server.address, manifest_of(line()))
    with pytest.raises(OrmoError):
        client.join()
    client.close()
    assert server.asked == ["join"]
