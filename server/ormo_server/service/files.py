"""A run's place on the disk: who may use it, its checkpoints, and the journal of what came since the last."""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ormo_runtime.logs import Fields
from ormo_server.core.errors import DiskFull, NotReady
from ormo_server.journal import Journal, next_log
from ormo_server.metrics import Metrics
from ormo_server.mirror.buckets import bucket_at
from ormo_server.mirror.mirroring import Mirroring
from ormo_server.service.engine import Engine
from ormo_server.settings import ServerSettings
from ormo_server.store import Checkpoint, CheckpointStore, DirectoryLock, NotFinite, StoreError, size_bytes

_LOG = logging.getLogger(__name__)

_HARMLESS = "the next checkpoint tries again"
# For a checkpoint that is being written, to a disk that may be slow or hang.
_CLOSE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class LastCheckpoint:
    """Where the newest checkpoint is, what it holds, and when it was written by the monotonic clock."""

    path: Path
    epoch: int
    iteration: int
    written_at: float


class RunFiles:
    """The directory of a run.

    Checkpoints are written one at a time, by whichever thread asks: the one that writes them every so often, the one
    that keeps the journal small, an operator's call, or the drain.

    Args:
        settings: of the server, as it was started.
        metrics: what to count in.
        on_failure: is told, in a sentence, why nothing can be kept any more.

    Attributes:
        store: of the checkpoints.
        mirror: where checkpoints are copied to; None without one.
        journal: what inputs are recorded in; None until it is opened, and without one.
        last_checkpoint: the newest one; None before the first.
        last_log: the log of the journal that the checkpoint names which the run goes on from; 0 for none.

    Raises:
        StoreError: the directory can't be used, or another server has it.
        SettingsError: the address of the mirror can't be used.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics, on_failure: Callable[[str], None]) -> None:
        self.store = CheckpointStore(settings.directory, keep=settings.checkpoints_kept)
        self.journal: Journal | None = None
        self.last_checkpoint: LastCheckpoint | None = None
        self.last_log = 0
        self._settings = settings
        self._metrics = metrics
        self._on_failure = on_failure
        self._lock = DirectoryLock(settings.directory)
        self.mirror = None if settings.mirror is None else self._make_mirror(settings.mirror)
        self._writing = threading.Lock()
        self._drained = self._closed = False
        # The log that checkpoints name while there is no journal: above those of one that was there before.
        self._log_without_journal: int | None = None
        metrics.checkpoints.every(settings.checkpoint_seconds)
        metrics.journal.size(lambda: 0 if self.journal is None else self.journal.size_bytes)

    def _make_mirror(self, address: str) -> Mirroring:
        settings = self._settings
        # The silence after which a worker counts as dead is also what a writer's is.
        return Mirroring(
            bucket_at(address),
            settings.directory,
            self.store,
            settings.checkpoints_kept,
            settings.failure_timeout_seconds,
            self._metrics.mirror,
        )

    def stop_writing(self) -> bool:
        """Write no checkpoint from now on; says whether none is being written any more."""
        if not self._writing.acquire(timeout=_CLOSE_SECONDS):
            # It would go on in files that are another server's by then.
            directory = self._settings.directory
            _LOG.error("a checkpoint is still being written: %s stays locked while this process lives", directory)
            return False
        self._closed = True
        self._writing.release()
        return True

    def close(self) -> None:
        """Finish the journal, and let another server have the directory; after `stop_writing`."""
        if self.mirror is not None:
            self.mirror.close()
        if self.journal is not None:
            self.journal.close()
        self._lock.release()

    def refuse_if_not_ours(self) -> None:
        """To be called before anybody is told of anything: it would not be found again.

        Raises:
            NotReady: the directory was removed, moved or replaced, or another server may have it. This one stops.
        """
        if self._closed or self._lock.holds:
            return
        why = (
            f"{self._settings.directory}, or the file .lock in it, was removed, moved or replaced, so that nothing "
            "would be found there again"
        )
        self._on_failure(why)
        raise NotReady(f"{why}: this server stops; leave the directory alone while one runs", retry_seconds=2.0)

    def move_run_aside(self, name: str) -> Path | None:
        """Move what is in the directory into one of this name in it; None if there is nothing."""
        return self._lock.move_run_aside(name)

    # The journal

    @property
    def journal_directory(self) -> Path:
        """Where the journal is, if there is one."""
        return self._settings.directory / "journal"

    @property
    def journal_is_full(self) -> bool:
        """Whether it has grown to the bound at which a checkpoint is due."""
        return self.journal is not None and self.journal.full

    def open_journal(self) -> int | None:
        """Open the journal, if the run keeps one.

        Returns:
            The log that a checkpoint of this moment names.

        Raises:
            StoreError: it can't be written.
        """
        if self.journal is None and self._settings.journal:
            self.journal = self._make_journal()
        elif self.journal is None and (self.last_log or self.journal_directory.exists()):
            # So that files of the one before are known to be older, and those of a later one to be newer.
            self._log_without_journal = next_log(self.journal_directory, self.last_log)
        return self._log_without_journal if self.journal is None else self.journal.log

    def _make_journal(self) -> Journal:
        try:
            return Journal(
                self.journal_directory,
                self._settings.journal_fsync,
                int(self._settings.journal_max_bytes),
                lambda: self._on_failure(f"the journal in {self.journal_directory} can't be written"),
                self._metrics.journal.commit_seconds.note,
                self.last_log,
            )
        except (OSError, RuntimeError) as error:
            raise StoreError(
                f"the journal in {self.journal_directory} can't be written ({error}): make room there or mend the disk"
            ) from error

    def forget_older_journal(self) -> None:
        """The state is in a checkpoint now: remove what came before."""
        older = self.journal_directory
        try:
            if self.journal is not None:
                self.journal.forget_before(self.journal.log)
            elif older.exists():
                shutil.rmtree(older)
        except (OSError, StoreError) as error:
            _LOG.warning("old journal files can't be removed (%s): %s", error, _HARMLESS)

    # Checkpoints

    def write(self, checkpoint: Checkpoint, started: float) -> float:
        """Write a checkpoint.

        Args:
            checkpoint: what to write.
            started: when its making began, by `time.perf_counter`.

        Returns:
            Seconds since then.

        Raises:
            StoreError: it can't be written, or must not be.
        """
        path, fields = self.store.write(checkpoint), checkpoint.snapshot.fields
        seconds = time.perf_counter() - started
        self.last_checkpoint = LastCheckpoint(path, fields["epoch"], fields["iteration"], time.monotonic())
        self._metrics.checkpoints.written(fields["iteration"], size_bytes(path), seconds)
        if self.mirror is not None:
            self.mirror.notice(path)
        return seconds

    def checkpoint(self, engine: Engine, settings: ServerSettings, *, drained: bool, anew: bool) -> bool:
        """Write a checkpoint of a run that is being served, unless the last one has the same parameters.

        Args:
            engine: of the run.
            settings: in force.
            drained: the engine is closed, so that nothing can be applied after it.
            anew: write one in any case.

        Returns:
            Whether the newest state is on disk now.
        """
        with self._writing:
            if self._drained or self._closed:
                return self._drained
            last = self.last_checkpoint
            as_before = last is not None and (last.epoch, last.iteration) == engine.iteration()
            if as_before and not drained and not anew and not self.journal_is_full:
                return True
            written = self._write_current(engine, settings, drained=drained)
            self._drained = drained and written
            return written

    def _write_current(self, engine: Engine, settings: ServerSettings, *, drained: bool) -> bool:
        started = time.perf_counter()
        try:
            state, clock_seconds, log_begun = engine.snapshot()
            journal_log = self._log_without_journal if log_begun is None else log_begun
            # The log that it names must be there, and the directory ours, before the checkpoint is.
            engine.wait_durable()
            recorded = settings.recorded()
            current = Checkpoint(
                state, engine.manifest, drained, clock_seconds, recorded, journal_log, frozen=engine.frozen
            )
            seconds = self.write(current, started)
        except (StoreError, NotReady, DiskFull, MemoryError) as error:
            self._metrics.checkpoints.failures.inc()
            _LOG.error("no checkpoint was written, the earlier ones stay: %s", error)
            if isinstance(error, NotFinite):
                engine.fail("the model, or its momentum, has NaN or infinite values")
            return False
        assert self.last_checkpoint is not None
        path = self.last_checkpoint.path
        self._forget_journal_before(log_begun)
        about = Fields(iteration=state.fields["iteration"], seconds=seconds, path=str(path))
        _LOG.info("checkpoint %s in %.2f s", path, seconds, extra=about)
        return True

    def _forget_journal_before(self, log_number: int | None) -> None:
        if self.journal is None or log_number is None:
            return
        try:
            self.journal.forget_before(log_number)
        except OSError as error:
            _LOG.warning("journal files that are no longer needed can't be removed (%s): %s", error, _HARMLESS)
