"""What a server that comes back goes on with: the newest checkpoint, and what the journal says came after it."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from ormo_server.core import snapshot
from ormo_server.core.snapshot import Snapshot
from ormo_server.journal import Reading, is_journal, replay
from ormo_server.store import Checkpoint
from ormo_server.trace.rows import TracedSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """A run as far as it is known.

    Attributes:
        snapshot: the core's state.
        clock_seconds: the run's clock.
        complete: nothing was applied after it, so tickets in flight and kept results stay good.
        damage: one sentence if the journal goes on and can't be used further.
    """

    snapshot: Snapshot
    clock_seconds: float
    complete: bool
    damage: str = ""


def recovered(checkpoint: Checkpoint, journal: Path, *, newer_lost: bool = False) -> Recovered:
    """The newest state.

    Args:
        checkpoint: the newest one that is whole.
        journal: directory of the journal.
        newer_lost: there was a newer one, and the journal, if there is one, begins with that.

    Raises:
        StoreError: the journal can't be read, or doing again what it says has another outcome.
    """
    if newer_lost and is_journal(journal):
        damage = f"the checkpoint that {journal} begins with is not whole"
        return Recovered(checkpoint.snapshot, checkpoint.clock_seconds, complete=False, damage=damage)
    if checkpoint.journal_log is None:
        return Recovered(checkpoint.snapshot, checkpoint.clock_seconds, checkpoint.drained)
    started = time.perf_counter()
    # As it was when the journal was written: the settings may have changed since.
    known = {name: value for name, value in checkpoint.settings.items() if name in TracedSettings.model_fields}
    machine = snapshot.resume(TracedSettings(**known).run(), checkpoint.snapshot)
    before = machine.state.iteration
    reading = Reading(journal, checkpoint.journal_log, checkpoint.manifest)
    clock_seconds = replay(machine, reading, checkpoint.clock_seconds)
    log.info(
        "replayed %d records of the journal since iteration %d in %.2f s%s",
        reading.records,
        before,
        time.perf_counter() - started,
        "; its last line was cut short and nobody had heard of it" if reading.torn else "",
    )
    return Recovered(snapshot.take(machine), clock_seconds, not reading.lost, reading.lost)
