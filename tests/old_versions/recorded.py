"""Runs that earlier versions left behind, one folder for each in `written/`, and how they came to be.

written/VERSION/NAME/
    settings.json      of the server
    run/               its folder after SIGKILL: a checkpoint, and a journal that goes on from there
    trace.jsonl        of the whole run
    restored/          the checkpoint that the same version wrote when it came back from `run`

All numbers are such that no product rounds, so the bits are the same whatever the processor's vector instructions.

`python -m old_versions.recorded VERSION [NAME ...]` in `tests`, with the version to keep installed, writes new folders.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import torch

from ormo_protos.manifest import BFLOAT16, BUFFER, FLOAT32, INT8, INT64, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from service.wire import WireWorker
from sim.by_ticket import ByTicket

WRITTEN = Path(__file__).parent / "written"
# Rows of a trace reach the file half a second later.
_TRACE_SECONDS = 1.5

PLAIN = Manifest.laid_out([TensorSpec("line", (5,), FLOAT32, PARAMETER)])
WITH_BUFFERS = Manifest.laid_out(
    [
        TensorSpec("line", (5,), FLOAT32, PARAMETER),
        TensorSpec("mean", (2,), FLOAT32, BUFFER),
        TensorSpec("batches", (), INT64, BUFFER),
    ]
)


def gradient_of(params: torch.Tensor, ticket: int) -> torch.Tensor:
    """Whole numbers that differ from ticket to ticket, and with the parameters."""
    return torch.sign(params) + (ticket * 7 % 5 - 2) * torch.arange(1.0, 6.0)


class Workload(ByTicket):
    """What a simulator computes that follows one of the traces."""

    def initial(self, seed: int) -> Any:
        return replace(super().initial(seed), params=torch.zeros(5))

    def gradient(self, ticket: int, params: torch.Tensor, out: torch.Tensor) -> Any:
        computed = super().gradient(ticket, params, out)
        out.copy_(gradient_of(params, ticket))
        return computed


def workload(**_: object) -> Workload:
    """As `--workload old_versions.recorded:workload` makes it."""
    return Workload()


@dataclass
class Team:
    """Workers that do what they are told, one after the other."""

    stub: ParameterServerStub
    manifest: Manifest
    dtype: int = FLOAT32
    local_steps: int = 0
    workers: dict[str, WireWorker] = field(default_factory=dict)

    def join(self, *names: str, incarnation: int = 1) -> None:
        for name in names:
            self.workers[name] = WireWorker(self.stub, name, self.manifest, incarnation, local_steps=self.local_steps)
            self.workers[name].join()

    def pull(self, names: str) -> None:
        for name in names:
            self.workers[name].pull()

    def push(self, names: str) -> None:
        for name in names:
            worker = self.workers[name]
            assert worker.ticket is not None
            buffers = len(self.manifest.tensors) > 1
            made = Payload(PayloadLayout.of_gradient(self.manifest, self.dtype, with_buffers=buffers))  # type: ignore[arg-type]
            pushed = gradient_of(worker.params, worker.ticket.number)
            if self.local_steps:
                worker.local_steps = worker.ticket.local_steps
                pushed *= worker.local_steps
            made.parameters.copy_(pushed)  # as int8 too, for they are whole and small; nothing else has scales
            made.scales.fill_(1.0)
            made.float_buffers.fill_(worker.ticket.number % 4)
            made.int_buffers.fill_(worker.ticket.number)
            worker.push(made)

    def train(self, names: str) -> None:
        """Each pushes for its ticket and gets the next."""
        for name in names:
            self.push(name)
            self.pull(name)

    def give_back(self, name: str) -> None:
        worker = self.workers[name]
        beat = pb.HeartbeatRequest(worker=name, incarnation=worker.incarnation, returned=[worker.ticket])
        self.stub.Heartbeat(beat)

    def control(self, **what: Any) -> None:
        self.stub.Control(pb.ControlRequest(**what))

    def checkpoint(self) -> None:
        self.control(checkpoint=pb.CheckpointNow())


def _asynchronous(team: Team) -> None:
    team.join("a", "b", "c")
    team.pull("abc")
    team.train("abcaabaac")
    team.checkpoint()
    team.train("abaaacb")
    team.control(set_learning_rate=pb.SetLearningRate(learning_rate=0.25))
    team.give_back("b")
    team.stub.Leave(pb.LeaveRequest(worker="c", incarnation=1))
    team.join("c", incarnation=2)  # its bucket is another one now
    team.pull("bc")
    team.train("abcbac")
    team.push("a")  # its result is kept, b's and c's tickets are out


def _synchronous(team: Team) -> None:
    team.join("a", "b", "c")
    for number in range(7):
        if number == 3:
            team.checkpoint()
        team.pull("abc")
        team.push("cab")
    team.pull("ab")
    team.push("b")  # the round is open, and c's ticket of it is not delivered


def _idle(team: Team) -> None:
    # Once rounds waited for b until it asked again, and had no place for c before the next.
    team.join("a", "b")
    team.pull("ab")
    team.push("ab")
    team.checkpoint()
    team.pull("ab")
    team.give_back("b")
    team.push("a")
    team.pull("a")
    team.push("a")
    team.join("c")
    team.pull("b")
    team.push("b")
    team.pull("ac")
    team.push("ca")
    team.pull("b")
    team.push("b")
    team.pull("a")


def _delayed(team: Team) -> None:
    # With buckets of one gradient the scales are 1, then 2/4 and 2/8: b's gradients are late by so many.
    team.join("a", "b")
    team.pull("ab")
    team.train("aaaab")
    team.checkpoint()
    team.train("aaaaaaaab")
    team.train("aaaab")


@dataclass(frozen=True)
class Recording:
    """How a run is made.

    Attributes:
        flags: of the server.
        act: what its workers do.
        manifest: of their model.
        dtype: of their gradients.
    """

    flags: dict[str, Any]
    act: Callable[[Team], None]
    manifest: Manifest = PLAIN
    dtype: int = FLOAT32


RECORDINGS = {
    "ormo": Recording({"method": "ormo"}, _asynchronous),
    "ssgdm": Recording({"method": "ssgdm", "min_workers": 3}, _synchronous),
    "idle": Recording({"method": "ssgdm", "min_workers": 2}, _idle),
    "asgd-da": Recording({"method": "asgd-da", "bucket_size": 1}, _delayed),
    "local-ormo": Recording(
        {"method": "local-ormo", "local_steps": 4, "local_steps_by_speed": True, "bucket_size": 2},
        _asynchronous,
        dtype=INT8,
    ),
    "delayed-nesterov": Recording(
        {"method": "delayed-nesterov", "local_steps": 4, "bucket_size": 2}, _asynchronous, WITH_BUFFERS, INT8
    ),
    "integer-buffers": Recording({"method": "ormo", "bucket_size": 2}, _asynchronous, WITH_BUFFERS, BFLOAT16),
}


@contextlib.contextmanager
def _killed_at_the_end(folder: Path, flags: dict[str, Any]) -> Iterator[ParameterServerStub]:
    # Paths are relative: checkpoints name them.
    given = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    words = [word for flag, value in given.items() for word in ([flag] if value is True else [flag, str(value)])]
    program = Path(sys.executable).parent / "ormo-server"
    place = ["--directory", "run", "--listen", "127.0.0.1:0", "--metrics-listen", ""]
    server = subprocess.Popen(
        [program, "serve", *place, "--journal", *words],
        stdout=subprocess.PIPE,
        cwd=folder,
        text=True,
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split("address=")[1].split()[0]
        with grpc.insecure_channel(address) as channel:
            yield ParameterServerStub(channel)
    finally:
        os.kill(server.pid, signal.SIGKILL)
        server.wait()


def write(version: str, *names: str) -> None:
    """Keep what the installed version writes; without names, of all recordings."""
    for name in names or RECORDINGS:
        recording = RECORDINGS[name]
        folder = WRITTEN / version / name
        common = {
            "learning_rate": 0.5,
            "momentum": 0.5,
            "checkpoint_seconds": 3600.0,
            "failure_timeout_seconds": 3600.0,
        }
        flags = common | recording.flags | {"checkpoints_kept": 1}
        with tempfile.TemporaryDirectory() as scratch:
            run = Path(scratch) / "run"
            with _killed_at_the_end(run.parent, flags | {"trace": "trace.jsonl"}) as stub:
                local_steps = recording.flags.get("local_steps", 0)
                recording.act(Team(stub, recording.manifest, recording.dtype, local_steps))
                time.sleep(_TRACE_SECONDS)
            shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns(".lock", "latest"))
            shutil.copy(run.parent / "trace.jsonl", folder)
            with _killed_at_the_end(run.parent, flags):
                (newest,) = run.glob("checkpoint-*")
                shutil.copytree(newest, folder / "restored")
        (folder / "settings.json").write_text(json.dumps(flags, indent=1) + "\n")


if __name__ == "__main__":
    write(*sys.argv[1:])
