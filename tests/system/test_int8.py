"""Sums of local steps in int8, between processes: what they cost, and what is left of them when a server is killed."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from torch import nn

from chaos.proxy import Proxy, Way
from ormo_protos.manifest import BFLOAT16
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.store.checkpoints import read_files
from ormo_worker import RemoteOptimizer
from service.wire import SMALL, WireWorker, int8_payload
from system.programs import Program, Stage, staged

H = 2
KEPT = {"local_steps": H, "update_rule": "ormo-nesterov", "journal": True, "checkpoint_seconds": 3600.0}


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    yield made
    made.close()


def bytes_of_an_exchange(address: str, proxy: Proxy, dtype: torch.dtype) -> tuple[float, float]:
    """Up and down, with two megabytes of parameters."""
    model, rounds = nn.Sequential(nn.Linear(700, 700), nn.Linear(700, 30)), 4
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    proxy.lead_to(address)
    with RemoteOptimizer(model, proxy.address, inner=inner, wire_dtype=dtype, connect_timeout=30.0) as optimizer:
        for step in range(H * (1 + rounds)):
            if step == H:
                before = dict(proxy.carried)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        up, down = ((proxy.carried[way] - before[way]) / rounds for way in (Way.TO_SERVER, Way.TO_WORKER))
    return up, down


def test_an_exchange_moves_the_share_of_float32s_bytes_that_the_pages_state(tmp_path: Path, proxy: Proxy) -> None:
    found = []
    for dtype in (torch.float32, torch.int8):
        (folder := tmp_path / str(dtype)).mkdir()
        with staged(folder) as stage:
            stage.server(local_steps=H)
            found.append(bytes_of_an_exchange(stage.address, proxy, dtype))
    (up, down), (up_int8, down_int8) = found
    assert 4 * 511_730 < up < 4.1 * 511_730
    assert up_int8 <= 0.26 * up
    assert up_int8 + down_int8 <= 0.39 * (up + down)


def pushed(stage: Stage, *, killed_after: int) -> dict[str, bytes]:
    """Six pushes of the same bytes in every run, the server killed on the way; returns all tensors of the state."""
    server = stage.server(**KEPT)
    worker: WireWorker | None = None
    for number in range(6):
        with grpc.insecure_channel(stage.address) as channel:
            if worker is None:
                worker = WireWorker(ParameterServerStub(channel), "a", start=1.0, local_steps=H)
                worker.join()
                worker.pull(dtype=BFLOAT16)
            worker.stub = ParameterServerStub(channel)
            values = torch.randn(9, generator=torch.Generator().manual_seed(number))
            coded = int8_payload(SMALL, values, buffers=True)
            result = worker.push(coded)
        assert (result.iteration.number, result.repeated) == (number + 1, False)
        if number + 1 == killed_after:
            server = killed_and_restarted(stage, server)
        with grpc.insecure_channel(stage.address) as channel:
            worker.stub = ParameterServerStub(channel)
            if number + 1 == killed_after:
                worker.request -= 1
                assert worker.push(coded).repeated, "as if its result had been lost"
            worker.pull(dtype=BFLOAT16)
    assert server.terminate() == 0
    kept = read_files(max((stage.folder / "run").glob("checkpoint-*"))).snapshot
    assert kept.fields["iteration"] == 6
    return {name: tensor.numpy().tobytes() for name, tensor in kept.tensors.items()}


def killed_and_restarted(stage: Stage, server: Program) -> Program:
    server.kill()
    return stage.server(**KEPT)


def test_a_server_killed_between_two_pushes_ends_with_the_same_bits(tmp_path: Path) -> None:
    found = []
    for killed_after in (0, 3):
        (folder := tmp_path / f"killed-after-{killed_after}").mkdir()
        with staged(folder) as stage:
            found.append(pushed(stage, killed_after=killed_after))
    assert found[0] == found[1]
    assert set(found[0]) >= {"params", "rule.momentum"}
