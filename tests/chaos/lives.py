"""What the server's files say, read, and whether they say the same."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from chaos.evidence import Applied, Evidence
from ormo_server.core import snapshot
from ormo_server.core.inputs import Push
from ormo_server.core.machine import StateMachine
from ormo_server.core.snapshot import Snapshot
from ormo_server.journal import Reading, replay
from ormo_server.journal.records import GRADIENTS_NAME, LOG_NAME, Record, numbered
from ormo_server.store import StoreError, buffers_of
from ormo_server.store.checkpoints import STATE_FILE, Checkpoint, read_files
from ormo_server.store.files import SUMS_FILE
from ormo_server.store.models import DOCUMENT_FILE, MODEL_FILE
from ormo_server.trace.rows import TracedSettings

_FILES = (DOCUMENT_FILE, MODEL_FILE, STATE_FILE, SUMS_FILE)


def read_lives(evidence: Evidence, archive: Path, *, journal: bool) -> None:
    """What the server's files say, and whether they say the same."""
    applied: list[Applied] = []
    before: Snapshot | None = None
    drained = False
    for life in sorted(archive.iterdir()):
        checkpoints = _checkpoints(evidence, life)
        if not checkpoints:
            continue
        first, last = checkpoints[0], checkpoints[-1]
        epoch = first.snapshot.fields["epoch"]
        if epoch in evidence.starts:
            continue  # it died before it had written anything of its own
        evidence.starts[epoch] = first.snapshot.fields["iteration"]
        if before is not None:
            _compare_start(evidence, life, before, first, keep_tickets=journal or drained)
        before, drained = last.snapshot, last.drained
        if journal:
            before = snapshot.take(_follow(evidence, life, checkpoints, applied))
        evidence.end = last.snapshot.fields["iteration"]
        evidence.parameters = last.snapshot.tensors["params"].tolist()
    if journal:
        evidence.applied = applied


def _compare_start(evidence: Evidence, life: Path, before: Snapshot, first: Checkpoint, *, keep_tickets: bool) -> None:
    """A life goes on from the end of the one before: all that its journal says, else its newest checkpoint."""
    begun, ended = first.snapshot.fields["iteration"], before.fields["iteration"]
    if begun != ended:
        evidence.differences.append(f"{life.name} began at iteration {begun}, and {ended} was on the disk")
    epoch = first.snapshot.fields["epoch"]
    buffers = buffers_of(first.manifest)
    machine = snapshot.restore(_run(first), _copied(before), epoch=epoch, keep_tickets=keep_tickets, buffers=buffers)
    _compare(evidence, f"the start of {life.name}", snapshot.take(machine), first.snapshot)


def _follow(evidence: Evidence, life: Path, checkpoints: list[Checkpoint], applied: list[Applied]) -> StateMachine:
    """Do again what came after each checkpoint, up to the next; returns the state at the end of this life."""
    for at, checkpoint in enumerate(checkpoints):
        following = checkpoints[at + 1] if at + 1 < len(checkpoints) else None
        machine = snapshot.resume(_run(checkpoint), _copied(checkpoint.snapshot), buffers_of(checkpoint.manifest))
        where = f"{life.name}, after iteration {checkpoint.snapshot.fields['iteration']}"
        if following is not None and following.journal_log == checkpoint.journal_log:
            continue
        with tempfile.TemporaryDirectory(dir=life) as folder:
            assert checkpoint.journal_log is not None
            _link(life / "journal", Path(folder), checkpoint.journal_log, following.journal_log if following else None)
            reading = Reading(Path(folder), checkpoint.journal_log, checkpoint.manifest)
            try:
                replay(machine, _noted(reading, machine, applied), checkpoint.clock_seconds)
            except StoreError as error:
                evidence.differences.append(f"{where}: {error}")
        if reading.lost or reading.doubled or (reading.torn and following is not None):
            evidence.differences.append(f"{where}: the journal is not whole: {reading.lost or 'torn, or doubled'}")
        if following is not None:
            _compare(evidence, where, snapshot.take(machine), following.snapshot)
    return machine


def _noted(reading: Reading, machine: StateMachine, applied: list[Applied]) -> Iterator[tuple[Record, Any]]:
    for record, payload in reading:
        given, redeemed = record.input or (None, None)
        if isinstance(given, Push) and redeemed is not None:
            name = (given.worker, given.samples)
            applied.append(Applied(name, given.ticket_key, redeemed.iteration_after, redeemed.discarded))
        yield record, payload


def _link(journal: Path, folder: Path, first: int, end: int | None) -> None:
    logs = {number: path for number, path in numbered(journal, LOG_NAME).items() if number >= first}
    for number, path in logs.items():
        if end is None or number < end:
            os.link(path, folder / path.name)
    for path in numbered(journal, GRADIENTS_NAME).values():
        os.link(path, folder / path.name)


def _checkpoints(evidence: Evidence, life: Path) -> list[Checkpoint]:
    """Those that this life wrote, in order: their epoch is that of the last one."""
    found = []
    paths = sorted(life.glob("checkpoint-*"))
    for path in paths:
        try:
            found.append(read_files(path))
        except StoreError as error:
            # Of one that the server was removing there may be links to some of its files only; never of the newest.
            if path == paths[-1] or all((path / name).exists() for name in _FILES):
                evidence.differences.append(f"{life.name}: {error}")
            continue
        if _weight(path) != found[-1].snapshot.tensors["params"].numpy().tobytes():
            evidence.differences.append(f"{life.name}: the model of {path.name} is not that of its state")
    newest = found[-1].snapshot.fields["epoch"] if found else 0
    return [checkpoint for checkpoint in found if checkpoint.snapshot.fields["epoch"] == newest]


def _weight(checkpoint: Path) -> bytes:
    """The model as people load it."""
    return bytes(load_file(checkpoint / MODEL_FILE)["weight"].numpy().tobytes())


def _run(checkpoint: Checkpoint) -> Any:
    known = {name: value for name, value in checkpoint.settings.items() if name in TracedSettings.model_fields}
    return TracedSettings(**known).run()


def _copied(taken: Snapshot) -> Snapshot:
    return Snapshot({name: tensor.clone() for name, tensor in taken.tensors.items()}, taken.fields)


def _compare(evidence: Evidence, where: str, expected: Snapshot, found: Snapshot) -> None:
    fields = [json.loads(json.dumps(taken.fields)) for taken in (expected, found)]
    names = [name for name in fields[0] if fields[0][name] != fields[1].get(name)]
    names += [
        name
        for name, tensor in expected.tensors.items()
        if name not in found.tensors or tensor.numpy().tobytes() != found.tensors[name].numpy().tobytes()
    ]
    if names or set(expected.tensors) != set(found.tensors):
        evidence.differences.append(f"{where}: {', '.join(names)} differ from what the files before it lead to")
