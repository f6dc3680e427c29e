"""A model with all that is awkward to store, and a run of it in mid-flight."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ormo_protos.manifest import BFLOAT16, BUFFER, FLOAT32, FLOAT64, INT64, PARAMETER, Manifest, TensorSpec
from ormo_server.core import snapshot
from ormo_server.core.inputs import Gradient, Join, Push, Request
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import PRESETS, Run
from ormo_server.core.step_size import LearningRate
from ormo_server.store import Checkpoint, CheckpointStore, FlatModel
from ormo_server.store.files import SUMS_FILE, write_sums

LARGEST_EPOCH = 2**64 - 1
DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int64: INT64, torch.float64: FLOAT64}


class Net(nn.Module):
    """Batch norm, tied weights, a bfloat16 parameter and buffer, a scalar, an integer buffer and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.coarse = nn.Parameter(torch.randn(4, 2).to(torch.bfloat16))
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.register_buffer("counts", torch.arange(6).view(2, 3))
        self.register_buffer("scale", torch.randn(2).to(torch.bfloat16))
        self.register_buffer("nothing", torch.zeros(0, 3))


def manifest_of(model: nn.Module) -> Manifest:
    first: dict[int, str] = {}
    specs = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        named = first.setdefault(id(tensor), name)
        role = PARAMETER if isinstance(tensor, nn.Parameter) else BUFFER
        alias_of = "" if named == name else named
        specs.append(TensorSpec(name, tuple(tensor.shape), DTYPES[tensor.dtype], role, alias_of=alias_of))
    return Manifest.laid_out(specs)


def flat_of(model: nn.Module) -> FlatModel:
    manifest = manifest_of(model)
    flat = FlatModel.empty(manifest)
    for spec in manifest.tensors:
        flat.view(spec).copy_(model.state_dict()[spec.name])
    return flat


def run(preset: str = "ormo") -> Run:
    return Run(LearningRate(0.1), PRESETS[preset])


def machine_of(flat: FlatModel, preset: str = "ormo") -> StateMachine:
    """A run with a redeemed ticket whose result is kept, one in flight, one undelivered if it can be, and a replaced
    incarnation."""
    machine = StateMachine.fresh(run(preset), flat.params, flat.float_buffers, flat.int_buffers, epoch=LARGEST_EPOCH)
    machine.step(Join(0.1, "anna", 2**63 + 5, 1))
    machine.step(Join(0.2, "bert", 1, 1))
    machine.step(Join(0.3, "bert", 2, 1))
    machine.step(Request(0.4, "anna", 2**63 + 5, 0, 1))
    ticket = next(ticket for ticket in machine.state.tickets.values() if ticket.slot == ("anna", 0))
    push = Push(0.7, "anna", 2**63 + 5, 0, 2, ticket.number, ticket.epoch, samples=32)
    machine.step(push, Gradient(torch.randn_like(flat.params)))
    machine.step(Request(0.1 + 0.7, "bert", 2, 0, 1))
    return machine


def checkpoint_of(model: nn.Module, **fields: Any) -> Checkpoint:
    """A checkpoint of a run that started from this model; `fields` replace those of the snapshot."""
    taken = snapshot.take(machine_of(flat_of(model)))
    taken.fields.update(fields)
    return Checkpoint(taken, manifest_of(model), drained=True, clock_seconds=12.3, settings={"momentum": 0.9})


def at(iteration: int) -> Checkpoint:
    return checkpoint_of(nn.Linear(2, 1), iteration=iteration)


def iterations(store: CheckpointStore) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in store.paths()]


def reseal(directory: Path) -> None:
    """Make the checksums fit again after a change, as a writer with a bug would."""
    names = sorted(path.name for path in directory.iterdir() if path.name != SUMS_FILE)
    write_sums(directory, names)
