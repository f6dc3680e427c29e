"""What a server that comes back goes on with: the newest checkpoint, and what the journal says came after it."""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.backends.cpu import get_cpu_capability as cpu_capability

from ormo_protos.manifest import Manifest
from ormo_protos.tensors import Payload
from ormo_server.core import snapshot
from ormo_server.core.inputs import Push, SetLearningRate
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import Run
from ormo_server.core.snapshot import Snapshot
from ormo_server.journal import Reading, Record, UnsoundRecord, is_chained, is_journal, replay, told_since
from ormo_server.settings import ServerSettings
from ormo_server.store import Checkpoint, buffers_of, unsound
from ormo_server.store.checkpoints import CheckpointStore
from ormo_server.store.files import StoreError, copy_of_directory, sync
from ormo_server.trace.rows import TracedSettings

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """A run as far as it is known.

    Attributes:
        snapshot: the core's state.
        clock_seconds: the run's clock.
        complete: nothing was applied after it, so tickets in flight and kept results stay good.
        damage: one sentence if the journal goes on and can't be used further.
        doubled: one sentence if all of it is used, and some of it is there twice.
    """

    snapshot: Snapshot
    clock_seconds: float
    complete: bool
    damage: str = ""
    doubled: str = ""


def recover(
    checkpoint: Checkpoint, journal: Path, read_again: Callable[[], Checkpoint], *, newer_lost: bool = False
) -> Recovered:
    """The newest state.

    Args:
        checkpoint: the newest one that is whole; its tensors are written over.
        journal: directory of the journal.
        read_again: the same checkpoint once more.
        newer_lost: there was a newer one.

    Raises:
        StoreError: the journal can't be read, or doing again what it says has another outcome.
    """
    first = checkpoint.journal_log
    if first is None or not checkpoint.settings.get("journal", True):
        # Who wrote it kept no journal. Files of an earlier one may be left, which it tells by a number.
        told = told_since(journal, first or 0)
        damage = f"{journal} follows a checkpoint that is missing; lost: {told}" if told else ""
        return Recovered(checkpoint.snapshot, checkpoint.clock_seconds, checkpoint.drained and not told, damage)
    if newer_lost and is_journal(journal) and not is_chained(journal, first):
        damage = f"the checkpoint that {journal} begins with is not whole"  # or it is: such logs do not tell
        return Recovered(checkpoint.snapshot, checkpoint.clock_seconds, complete=False, damage=damage)
    found = _replay_all(checkpoint, Reading(journal, first, checkpoint.manifest))
    return _before_poison(read_again, journal, first) if found is None else found


def _replay_all(checkpoint: Checkpoint, reading: Reading) -> Recovered | None:
    """All that the journal says done again; None if that led to a state that is not sound."""
    started = time.perf_counter()
    machine = _resume(checkpoint)
    try:
        clock_seconds = replay(machine, reading, checkpoint.clock_seconds)
    except UnsoundRecord:
        return None
    if not is_sound(machine, checkpoint.manifest):
        return None
    taken = snapshot.take(machine)
    _LOG.info(
        "replayed %d records of the journal since iteration %d in %.2f s%s",
        reading.records,
        checkpoint.snapshot.fields["iteration"],
        time.perf_counter() - started,
        "; what a crash left after them had not been acknowledged" if reading.torn else "",
    )
    doubled = f"lines of {reading.directory} appear a second time after its end" if reading.doubled else ""
    return Recovered(taken, clock_seconds, not reading.lost, reading.lost, doubled)


def _resume(checkpoint: Checkpoint) -> StateMachine:
    # As it was when the journal was written: the settings may have changed since.
    known = {name: value for name, value in checkpoint.settings.items() if name in TracedSettings.model_fields}
    return snapshot.resume(TracedSettings(**known).run(), checkpoint.snapshot, buffers_of(checkpoint.manifest))


# A state that is not finite


def is_sound(machine: StateMachine, manifest: Manifest) -> bool:
    """Whether a state is finite, and stays so whatever is taken from now on."""
    in_bounds = machine.state.rule.in_bounds(machine.state.params)
    return in_bounds and not unsound(snapshot.take(machine, copied=False), manifest)


def _before_poison(read_again: Callable[[], Checkpoint], journal: Path, first: int) -> Recovered:
    """The state before the first record that made it unsound: all of it is looked at after each, which is rare."""
    count, culprit = _first_unsound(read_again(), journal, first)
    checkpoint = read_again()
    machine = _resume(checkpoint)
    sound = islice(Reading(journal, first, checkpoint.manifest), count)
    clock_seconds = replay(machine, sound, checkpoint.clock_seconds)
    damage = (
        f"record {count + 1} of {journal}, {_describe(culprit)}, led to NaN or infinite values, or might have: the run "
        f"continues from before it, at iteration {machine.state.iteration}, and everything after that is lost"
    )
    return Recovered(snapshot.take(machine), clock_seconds, complete=False, damage=damage)


def _first_unsound(checkpoint: Checkpoint, journal: Path, first: int) -> tuple[int, Record]:
    machine, reading = _resume(checkpoint), Reading(journal, first, checkpoint.manifest)
    last: list[Record] = []

    def until_unsound() -> Iterator[tuple[Record, Payload | None]]:
        for record, payload in reading:
            last[:] = [record]
            yield record, payload
            if not is_sound(machine, checkpoint.manifest):
                return

    with contextlib.suppress(UnsoundRecord):
        replay(machine, until_unsound(), checkpoint.clock_seconds)
    return reading.records - 1, last[0]


def _describe(record: Record) -> str:
    given = None if record.input is None else record.input.input
    if isinstance(given, Push):
        return f"the gradient of worker {given.worker!r}"
    if isinstance(given, SetLearningRate):
        return f"the learning rate {given.learning_rate:g}"
    return repr(record)


# Before and after


def settings_of_run(settings: ServerSettings, checkpoint: Checkpoint) -> ServerSettings:
    """With the delay threshold that the run began with, which older versions did not write, unless one is set."""
    begun = checkpoint.settings
    if settings.delay_threshold is not None or begun.get("method") != settings.method:
        return settings
    kept = begun.get("delay_threshold", TracedSettings.model_fields["delay_threshold"].default)
    return settings.model_copy(update={"delay_threshold": kept})


def refuse_overflowing(run: Run, checkpoint: Checkpoint) -> None:
    """Turn down a checkpoint that any gradient may make infinite: an older one may be sound.

    Raises:
        StoreError: it is not sound.
    """
    # Of another update rule it can't be told, and `restore` refuses that.
    taken = checkpoint.snapshot
    if taken.fields["rule"] != run.method.rule:
        return
    if not is_sound(snapshot.resume(run, taken, buffers_of(checkpoint.manifest)), checkpoint.manifest):
        raise StoreError(
            f"the checkpoint of iteration {taken.fields['iteration']} has values so large that any gradient may "
            "make them infinite"
        )


def warn_if_bits_may_differ(checkpoint: Checkpoint) -> None:
    """Say so if a checkpoint is of another PyTorch, or of a processor of another kind."""
    written, here = (checkpoint.torch_version, checkpoint.cpu_capability), (torch.__version__, cpu_capability())
    if written != here:
        _LOG.warning(
            "the checkpoint was written by torch %s on %s, this is torch %s on %s: results may differ in the last bits",
            *written,
            *here,
        )


def keep_aside(journal: Path, epoch: int) -> Path:
    """Copy all that a damaged journal has into a directory beside it, for people; it is on the disk when this returns.

    Raises:
        StoreError: it can't be made.
    """
    aside = journal.with_name(f"journal-damaged-{epoch:016x}")
    try:
        if journal.is_dir():
            copy_of_directory(journal, aside)
        else:
            aside.mkdir()
        sync(journal.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StoreError(
            f"the damaged journal can't be kept in {aside} ({error}): make room there or mend the disk; nothing "
            "was changed"
        ) from error
    return aside


def tell_kept(store: CheckpointStore, aside: Path, level: int) -> None:
    """Put checkpoints that can't be used beside a damaged journal, and say where both are."""
    try:
        # A checkpoint that the journal may follow would go with its elders.
        store.move_corrupt(aside)
    except OSError as error:
        _LOG.warning("corrupt checkpoints can't be moved to %s (%s)", aside, error)
    if any(aside.iterdir()):
        _LOG.log(level, "the damaged journal is kept in %s: look into it, then remove it", aside)
    else:
        aside.rmdir()
