"""A state machine whose inputs go into a journal, as those of the engine do."""

import json
from pathlib import Path
from typing import Any

import torch

from core.driving import Driver
from core.scripts import SIZE, START
from ormo_protos.int8 import Int8Vector
from ormo_protos.manifest import BFLOAT16, BUFFER, FLOAT32, INT64, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_server.core import snapshot
from ormo_server.core.effects import Effects, Granted
from ormo_server.core.inputs import Gradient, Input
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import Run
from ormo_server.core.snapshot import Snapshot
from ormo_server.journal import Fsync, Journal, Reading, Storing, replay
from ormo_server.store import buffers_of
from service.wire import int8_payload

MANIFEST = Manifest.laid_out(
    [
        TensorSpec("weight", (SIZE,), FLOAT32, PARAMETER),
        TensorSpec("mean", (2,), FLOAT32, BUFFER),
        TensorSpec("count", (), INT64, BUFFER),
    ]
)
MUCH = 1 << 30


def journal_in(directory: Path, fsync: Fsync = "off", max_bytes: int = MUCH, **calls: Any) -> Journal:
    return Journal(directory, fsync, max_bytes, calls.get("on_failure", int), calls.get("on_commit", float))


def payload_of(gradient: Gradient, manifest: Manifest = MANIFEST) -> Payload:
    if isinstance(gradient.values, Int8Vector):
        return int8_payload(manifest, gradient.values[:])
    dtype = BFLOAT16 if gradient.values[:0].dtype == torch.bfloat16 else FLOAT32
    payload = Payload(PayloadLayout.of(manifest, dtype, with_buffers=gradient.float_buffers is not None))
    assert isinstance(gradient.values, torch.Tensor)
    payload.parameters.copy_(gradient.values)
    if gradient.float_buffers is not None and gradient.int_buffers is not None:
        payload.float_buffers.copy_(gradient.float_buffers)
        payload.int_buffers.copy_(gradient.int_buffers)
    return payload


class RecordedMachine(StateMachine):
    """As the engine drives it: bytes first, then the input, then its line."""

    journal: Journal
    manifest = MANIFEST

    def _begin(self, gradient: Gradient) -> Storing:
        return self.journal.begin(payload_of(gradient, self.manifest))

    def step(self, given: Input, gradient: Gradient | None = None) -> Effects:
        stored = None if gradient is None else self.journal.store(self._begin(gradient))
        try:
            effects = super().step(given, gradient)
            if effects.changed:
                self.journal.append(given, effects.redeemed, stored)
            return effects
        finally:
            self.journal.release(stored)

    def write_delivery(self, granted: Granted, out: torch.Tensor) -> None:
        super().write_delivery(granted, out)
        if self.state.rule.keeps_deliveries:
            self.journal.append_delivery(granted.slot, BFLOAT16 if out.dtype == torch.bfloat16 else FLOAT32)


def recorded(run: Run, journal: Journal, manifest: Manifest = MANIFEST) -> Driver:
    """The driver of a fresh machine that is recorded from its first input on."""
    floats, ints = torch.zeros(manifest.sizes["float_buffers"]), torch.zeros(manifest.sizes["int_buffers"]).long()
    machine = RecordedMachine.fresh(run, START.clone(), floats, ints, epoch=7, buffers=buffers_of(manifest))
    assert isinstance(machine, RecordedMachine)
    machine.journal, machine.manifest = journal, manifest
    return Driver(machine)


def checkpoint(driver: Driver) -> tuple[Snapshot, int]:
    """What a checkpoint of this moment would hold, and the log that begins with it."""
    assert isinstance(driver.machine, RecordedMachine)
    taken = snapshot.take(driver.machine)
    return Snapshot(taken.tensors, json.loads(json.dumps(taken.fields))), driver.machine.journal.begin_log()


def fresh_copy(taken: Snapshot) -> Snapshot:
    return Snapshot({name: tensor.clone() for name, tensor in taken.tensors.items()}, taken.fields)


def replayed(
    run: Run, taken: Snapshot, directory: Path, log: int, manifest: Manifest = MANIFEST
) -> tuple[StateMachine, Reading]:
    """The machine that comes back, and how the journal was read."""
    machine = snapshot.resume(run, fresh_copy(taken), buffers_of(manifest))
    reading = Reading(directory, log, manifest)
    replay(machine, reading, 0.0)
    return machine, reading
