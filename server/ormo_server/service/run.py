"""One run and its place on disk: restores it, finds it a model when it is new, and checkpoints it."""

import logging
import secrets
import shutil
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ormo_protos.manifest import FLOAT32, Manifest
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_runtime.logs import Fields
from ormo_runtime.timeouts import FailureDetection
from ormo_server.core import snapshot
from ormo_server.core.errors import BadManifest, DiskFull, ModelExists, NonFinite, NotReady
from ormo_server.core.machine import StateMachine
from ormo_server.core.rules import LARGEST
from ormo_server.core.vectors import largest
from ormo_server.journal import Journal, is_journal, next_log, told_since
from ormo_server.metrics import Metrics
from ormo_server.service.admission import Bounds
from ormo_server.service.delivery import Copies
from ormo_server.service.engine import Engine
from ormo_server.service.lock import RunClock
from ormo_server.service.offers import ModelOffers, check_memory
from ormo_server.service.restore import (
    Recovered,
    keep_aside,
    recovered,
    refuse_overflowing,
    settings_of_run,
    tell_kept,
    warn_if_bits_may_differ,
)
from ormo_server.settings import ServerSettings
from ormo_server.store import (
    Checkpoint,
    CheckpointStore,
    DirectoryLock,
    FlatModel,
    Found,
    ModelFile,
    NotFinite,
    StoreError,
    buffers_of,
    size_bytes,
    unsound_tensors,
)
from ormo_server.store.files import listed
from ormo_server.trace.writer import TraceWriter

log = logging.getLogger(__name__)

_HARMLESS = "the next checkpoint tries again"
# For the one that is under way, on a disk that may be slow or hang.
_CLOSE_SECONDS = 30.0
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class LastCheckpoint:
    """Where the newest checkpoint is, what it holds, and when it was written by the monotonic clock."""

    path: Path
    epoch: int
    iteration: int
    written_at: float


class RunHost:
    """Holds the engine as soon as there is a model.

    Args:
        settings: of the server.
        metrics: what to count in.

    Attributes:
        last_checkpoint: the newest one; None before the first.
        checkpoint_bytes: of one, at most; 0 without a model.

    Raises:
        StoreError: no checkpoint is whole, the model file can't be used, or the trace can't be written.
        SettingsError: the checkpoint was written by another update rule.
        MemoryLimit: the model needs more than `memory_limit`.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.started = time.monotonic()
        self.clock = RunClock()
        self.offers = ModelOffers(FailureDetection(settings.failure_timeout).offer_seconds)
        self.last_checkpoint: LastCheckpoint | None = None
        self.checkpoint_bytes = 0
        self._run = settings.run()
        self._epoch = secrets.randbits(64)
        self._directory_lock = DirectoryLock(settings.directory)
        self._store = CheckpointStore(settings.directory, keep=settings.checkpoints_kept)
        self._engine: Engine | None = None
        self._building = threading.Lock()
        self._writing = threading.Lock()
        self._weights: ModelFile | None = None
        self._trace: TraceWriter | None = None
        self._journal: Journal | None = None
        # That checkpoints name while there is no journal: above those of one that was there before.
        self._number_without_journal: int | None = None
        self._last_log = 0
        # Before anybody calls: once there is a model, a thread that can't be started would break the engine.
        self._copies = Copies(metrics.traffic.stage["copy"])
        self._drained = self._closed = False
        metrics.process.settings(settings.described())
        metrics.checkpoints.every(settings.checkpoint_seconds)
        metrics.journal.size(lambda: 0 if self._journal is None else self._journal.size_bytes)
        try:
            if settings.trace is not None:
                self._trace = TraceWriter(settings.trace, metrics.upkeep.failures.labels("trace").inc)
            if settings.fresh:
                self._begin_anew()
            else:
                self._restore_or_load()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Finish the trace and the journal, and let another server have the directory."""
        directory = self.settings.directory
        if not self._writing.acquire(timeout=_CLOSE_SECONDS):
            # It would go on in files that are another server's by then.
            log.error("a checkpoint is still being written: %s stays locked while this process lives", directory)
            return
        self._closed = True
        self._writing.release()
        self._copies.close()
        if self._trace is not None:
            self._trace.close()
        if self._journal is not None:
            self._journal.close()
        self._directory_lock.release()

    def refuse_if_not_ours(self) -> None:
        """To be called before anybody is told of anything: it would not be found again.

        Raises:
            NotReady: the directory was removed, moved or replaced, or another server may have it. This one stops.
        """
        if self._closed or self._directory_lock.holds:
            return
        why = (
            f"{self.settings.directory}, or the file .lock in it, was removed, moved or replaced, so that nothing "
            "would be found there again"
        )
        if self._engine is not None:
            self._engine.fail(why)
        raise NotReady(f"{why}: this server stops; leave the directory alone while one runs", retry_seconds=2.0)

    @property
    def has_model(self) -> bool:
        """Whether training can go on."""
        return self._engine is not None

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            NotReady: there is no model yet.
        """
        if self._engine is None:
            raise NotReady("this server has no model yet: a worker that joins will be asked for one", retry_seconds=0.5)
        return self._engine

    # At the start

    def _begin_anew(self) -> None:
        model = self.settings.model
        weights = None if model is None else ModelFile.load(model)  # before the move: it may be that run's
        aside = self._directory_lock.move_run_aside(time.strftime("before-%Y%m%d-%H%M%S"))
        if aside is not None:
            log.info("a new run begins: the one that was in %s is kept in %s", self.settings.directory, aside)
        if weights is not None:
            self._load(weights)

    def _restore_or_load(self) -> None:
        newest = self._store.newest(partial(refuse_overflowing, self._run))
        if newest is not None:
            self._restore(newest)
            return
        told = told_since(self._journal_directory)
        if told or is_journal(self._journal_directory):
            raise StoreError(
                f"{self.settings.directory} has a journal of {told or 'a run'}, and the checkpoint that it follows is "
                "missing: bring that one back from a backup, or begin anew, with --fresh or in another --directory; "
                "nothing was changed"
            )
        if self.settings.model is not None:
            self._load(ModelFile.load(self.settings.model))

    def _restore(self, newest: Found) -> None:
        checkpoint = newest.checkpoint
        settings = settings_of_run(self.settings, checkpoint)
        if settings is not self.settings:
            self.settings, self._run = settings, settings.run()
            self.metrics.process.settings(settings.described())
        self._last_log = checkpoint.journal_log or 0
        self._check_memory(checkpoint.manifest)
        warn_if_bits_may_differ(checkpoint)
        found = recovered(checkpoint, self._journal_directory, newest.read_again, newer_lost=newest.skipped > 0)
        if found.damage:
            log.error("the journal can be used in part only, and all tickets are void: %s", found.damage)
        if found.doubled:
            log.warning("%s: all that was acknowledged comes before them, and is used", found.doubled)
        self.clock = RunClock(found.clock_seconds)
        machine = self._restored(found, checkpoint.manifest, keep_tickets=found.complete)
        # Before the checkpoint: whatever starts after it has no need of the journal before, and removes it.
        kept = keep_aside(self._journal_directory, self._epoch) if found.damage or found.doubled else None
        try:
            self._write_first(machine, checkpoint.manifest, checkpoint.frozen)
        except StoreError as error:
            if kept is not None:
                shutil.rmtree(kept, ignore_errors=True)
            if self.settings.journal:
                # What is recorded from now on would follow from a state that is nowhere on disk.
                lost = "Nothing more is lost" if found.damage else "Nothing is lost"
                raise StoreError(
                    f"{error}. {lost}: the last checkpoint and {self._journal_directory} hold the run, leave both as "
                    "they are; the next start goes on with them"
                ) from error
            log.error("the restored state could not be written anew, so all its tickets are void: %s", error)
            machine = self._restored(found, checkpoint.manifest, keep_tickets=False)
        else:
            self._forget_older_journal()
            if kept is not None:
                tell_kept(self._store, kept, logging.ERROR if found.damage else logging.WARNING)
        self._serve(machine, checkpoint.manifest, checkpoint.frozen, fresh=False)

    def _restored(self, found: Recovered, manifest: Manifest, *, keep_tickets: bool) -> StateMachine:
        buffers = buffers_of(manifest)
        machine = snapshot.restore(
            self._run, found.snapshot, epoch=self._epoch, keep_tickets=keep_tickets, buffers=buffers
        )
        log.info(
            "restored iteration %d from %s (%s)",
            machine.state.iteration,
            self.settings.directory,
            "nothing came after it: tickets stay good"
            if keep_tickets
            else "something may be lost: all tickets are void",
        )
        return machine

    # The journal

    @property
    def _journal_directory(self) -> Path:
        return self.settings.directory / "journal"

    @property
    def _journal_is_full(self) -> bool:
        return self._journal is not None and self._journal.full

    def _open_journal(self) -> None:
        if self._journal is not None:
            return
        if not self.settings.journal:
            if self._last_log or self._journal_directory.exists():
                # So that files of the one before are known to be older, and those of a later one to be newer.
                self._number_without_journal = next_log(self._journal_directory, self._last_log)
            return
        try:
            self._journal = Journal(
                self._journal_directory,
                self.settings.journal_fsync,
                int(self.settings.journal_max_bytes),
                self._journal_failed,
                self.metrics.journal.commit_seconds.observe,
                self._last_log,
            )
        except (OSError, RuntimeError) as error:
            raise StoreError(
                f"the journal in {self._journal_directory} can't be written ({error}): make room there or mend the disk"
            ) from error

    def _journal_failed(self) -> None:
        if self._engine is not None:
            self._engine.fail(f"the journal in {self._journal_directory} can't be written")

    def _forget_older_journal(self) -> None:
        """The state is in a checkpoint now."""
        older = self._journal_directory
        try:
            if self._journal is not None:
                self._journal.forget_before(self._journal.log)
            elif older.exists():
                shutil.rmtree(older)
        except (OSError, StoreError) as error:
            log.warning("files of the journal before can't be removed (%s): %s", error, _HARMLESS)

    def relieve_journal(self) -> bool:
        """Write a checkpoint if the journal has grown to its bound.

        Returns:
            Whether it is below it now.
        """
        return not self._journal_is_full or self.checkpoint()

    def _load(self, weights: ModelFile) -> None:
        if weights.manifest is None:
            # A plain state_dict does not say in which order the model has its tensors: the first worker will.
            self._weights = weights
            return
        self._check_memory(weights.manifest)
        self._start(weights.manifest, weights.arrange(weights.manifest))

    # A new model

    def check_wanted(self, worker: str, incarnation: int) -> None:
        """Nothing, if it is this worker whose model is waited for.

        Raises:
            ModelExists: there is a model already.
            NotWanted: this worker was not asked for it.
        """
        self.refuse_second_model()
        self.offers.renew(worker, incarnation, self.clock())

    def refuse_second_model(self) -> None:
        """Nothing, if there is no model yet.

        Raises:
            ModelExists: there is.
        """
        if self._engine is not None:
            raise ModelExists("this server has a model already: join again to get its manifest")

    def begin_offer(self, manifest: Manifest) -> PayloadLayout:
        """How an offered model's bytes will lie; `room_for` gives them a place.

        Raises:
            MemoryLimit: the model is too large.
        """
        self._check_memory(manifest)
        return PayloadLayout.of(manifest, FLOAT32, with_buffers=True, with_frozen=True)

    def accept_model(self, worker: str, incarnation: int, manifest: Manifest, payload: Payload) -> tuple[int, int]:
        """Start the run from an offered model that has come whole; it is in a checkpoint when this returns.

        Returns:
            (epoch, iteration) at the start.

        Raises:
            ModelExists, NotWanted: as `check_wanted`.
            NonFinite: NaN in the model, or infinity in a parameter.
            BadManifest: the server starts from a file, and it is another model's.
            NotReady: the checkpoint could not be written, or nobody would find it.
        """
        model = FlatModel(payload.parameters, payload.float_buffers, payload.int_buffers, payload.frozen)
        bad = unsound_tensors(model.state_dict(manifest), manifest)
        if bad:
            raise NonFinite(
                f"the model that worker {worker!r} offers has NaN, or infinity in a parameter: {listed(bad)}. Start "
                "from a sound one; a buffer that need not be kept can be registered with persistent=False"
            )
        with self._building:
            self.check_wanted(worker, incarnation)
            self.refuse_if_not_ours()
            if self._weights is not None:
                model = self._arranged(self._weights, manifest)
            self._start(manifest, model)
        return self.engine.iteration()

    def _arranged(self, weights: ModelFile, manifest: Manifest) -> FlatModel:
        try:
            return weights.arrange(manifest)
        except StoreError as error:
            raise BadManifest(str(error)) from error

    def _start(self, manifest: Manifest, model: FlatModel) -> None:
        if largest(model.params) > LARGEST:
            raise NonFinite(
                f"the model has numbers above {LARGEST:.3g}, so that none can be added: start from a sound one"
            )
        vectors = model.params, model.float_buffers, model.int_buffers
        machine = StateMachine.fresh(self._run, *vectors, epoch=self._epoch, buffers=buffers_of(manifest))
        try:
            self._write_first(machine, manifest, model.frozen)
        except StoreError as error:
            raise NotReady(f"the model could not be stored: {error}", retry_seconds=5.0) from error
        self._serve(machine, manifest, model.frozen, fresh=True)

    def _write_first(self, machine: StateMachine, manifest: Manifest, frozen: torch.Tensor) -> None:
        # Not drained: what is pushed from now on uses up tickets that this checkpoint may hold. After a crash they must
        # not be good a second time.
        started = time.perf_counter()
        self._open_journal()
        first = Checkpoint(
            snapshot.take(machine),
            manifest,
            drained=False,
            clock_seconds=self.clock(),
            settings=self.settings.recorded(),
            journal_log=self._number_without_journal if self._journal is None else self._journal.log,
            frozen=frozen,
        )
        self._note_checkpoint(self._store.write(first), machine.state.epoch, machine.state.iteration, started)

    def _check_memory(self, manifest: Manifest) -> None:
        need = check_memory(self.settings, self._run, manifest)
        self.metrics.process.needs(need)
        # It has two files with the frozen tensors.
        self.checkpoint_bytes = need.checkpoint_bytes + 2 * 4 * manifest.sizes["frozen"]

    def _serve(self, machine: StateMachine, manifest: Manifest, frozen: torch.Tensor, *, fresh: bool) -> None:
        if self._trace is not None:
            self._trace.begin(machine, self.settings, fresh=fresh)
        self._engine = Engine(
            machine,
            manifest,
            frozen,
            self.clock,
            self.metrics,
            lease_seconds=FailureDetection(self.settings.failure_timeout).lease_seconds,
            ticket_timeout=self.settings.ticket_timeout,
            bounds=Bounds(
                self.settings.max_gradient_norm,
                self.settings.over_norm == "clip",
                self.settings.max_refused_share,
            ),
            journal=self._journal,
            trace=self._trace,
            copies=self._copies,
            refuse_if_not_ours=self.refuse_if_not_ours,
        )

    @property
    def journaled(self) -> bool:
        """Whether inputs are kept as they come."""
        return self._journal is not None

    # Checkpoints

    def checkpoint(self, *, drained: bool = False, anew: bool = False) -> bool:
        """Write a checkpoint, unless the last one has the same parameters.

        Args:
            drained: the engine is closed, so that nothing can be applied after it.
            anew: write one in any case.

        Returns:
            Whether the newest state is on disk now.
        """
        if self._engine is None:
            return True
        with self._writing:
            if self._drained or self._closed:
                return self._drained
            last = self.last_checkpoint
            as_before = last is not None and (last.epoch, last.iteration) == self._engine.iteration()
            if as_before and not drained and not anew and not self._journal_is_full:
                return True
            written = self._write_current(self._engine, drained=drained)
            self._drained = drained and written
            return written

    def _write_current(self, engine: Engine, *, drained: bool) -> bool:
        started = time.perf_counter()
        try:
            state, clock_seconds, log_begun = engine.snapshot()
            journal_log = self._number_without_journal if log_begun is None else log_begun
            engine.wait_durable()  # the log that it names must be there, and the directory ours
            settings = self.settings.recorded()
            checkpoint = Checkpoint(
                state, engine.manifest, drained, clock_seconds, settings, journal_log, frozen=engine.frozen
            )
            path = self._store.write(checkpoint)
        except (StoreError, NotReady, DiskFull, MemoryError) as error:
            self.metrics.checkpoints.failures.inc()
            log.error("no checkpoint was written, the earlier ones stay: %s", error)
            if isinstance(error, NotFinite):
                engine.fail("the model, or its momentum, has NaN or infinite values")
            return False
        self._forget_journal_before(log_begun)
        seconds = self._note_checkpoint(path, state.fields["epoch"], state.fields["iteration"], started)
        about = Fields(iteration=state.fields["iteration"], seconds=seconds, path=str(path))
        log.info("checkpoint %s in %.2f s", path, seconds, extra=about)
        return True

    def _forget_journal_before(self, log_number: int | None) -> None:
        if self._journal is None or log_number is None:
            return
        try:
            self._journal.forget_before(log_number)
        except OSError as error:
            log.warning("files of the journal that are no longer needed can't be removed (%s): %s", error, _HARMLESS)

    def _note_checkpoint(self, path: Path, epoch: int, iteration: int, started: float) -> float:
        seconds = time.perf_counter() - started
        self.last_checkpoint = LastCheckpoint(path, epoch, iteration, time.monotonic())
        self.metrics.checkpoints.written(iteration, size_bytes(path), seconds)
        return seconds
