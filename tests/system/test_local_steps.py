"""A server of local steps as a process of its own, killed in the middle of a run."""

from pathlib import Path
from typing import Any

import grpc
import torch

from ormo_protos.tensors import Payload
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.store.checkpoints import read_files
from service.wire import SMALL, WireWorker, payload
from system.programs import Stage, staged

H = 16
FLAGS: dict[str, Any] = {
    "method": "local-ormo",
    "local_steps": H,
    "journal": True,
    "checkpoint_seconds": 3600,
    "min_workers": 2,
}


def pseudo_gradient(number: int) -> Payload:
    """Numbers that round in every sum, so that another order or another weight shows in the last bits."""
    made = payload(SMALL, 0.0)
    made.parameters.copy_(torch.randn(made.parameters.shape, generator=torch.Generator().manual_seed(number)))
    return made


def trained(folder: Path, *, killed: bool) -> tuple[dict[str, bytes], list[int]]:
    """Two workers push in turns, one of them late; the bits at the end, and what the server says that it took."""
    folder.mkdir()
    with staged(folder) as stage:
        server = stage.server(**FLAGS)
        with grpc.insecure_channel(stage.address) as channel:
            stub = ParameterServerStub(channel)
            fast, slow = (WireWorker(stub, name, start=0.3, local_steps=H) for name in ("fast", "slow"))
            for worker in (fast, slow):
                worker.join()
            for worker in (fast, slow):
                worker.pull()
            fast.push(pseudo_gradient(1))
            fast.pull()
            fast.push(pseudo_gradient(2), local_steps=5)
            fast.pull()
        if killed:
            server.kill()
            server = stage.server(**FLAGS)
        with grpc.insecure_channel(stage.address) as channel:
            fast.stub = slow.stub = ParameterServerStub(channel)
            results = [slow.push(pseudo_gradient(3)), fast.push(pseudo_gradient(4))]
            slow.pull()
            results.append(slow.push(pseudo_gradient(5)))
        assert server.terminate() == 0
        return bits(stage), [result.iteration.number for result in results]


def bits(stage: Stage) -> dict[str, bytes]:
    newest = max((stage.folder / "run").glob("checkpoint-*"))
    kept = read_files(newest).snapshot
    counters = {name: repr(kept.fields[name]).encode() for name in ("iteration", "samples", "newest_bucket", "issue")}
    return counters | {name: tensor.numpy().tobytes() for name, tensor in kept.tensors.items()}


def test_a_server_that_is_killed_between_two_pushes_ends_at_the_same_bits_as_one_that_is_not(tmp_path: Path) -> None:
    undisturbed, killed = (trained(tmp_path / name, killed=name == "killed") for name in ("undisturbed", "killed"))
    assert killed == undisturbed
    assert killed[1] == [3, 4, 5]
    assert {"params", "rule.momentum"} <= killed[0].keys()
