"""One run: restores it, or finds it a model when it is new, and has it served and kept."""

import logging
import secrets
import shutil
import threading
import time
from functools import partial

import torch

from ormo_protos.manifest import FLOAT32, Manifest
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_runtime.timeouts import FailureDetection
from ormo_server.core import snapshot
from ormo_server.core.errors import BadManifest, ModelExists, NonFinite, NotAMember, NotReady
from ormo_server.core.machine import StateMachine
from ormo_server.core.rules import LARGEST
from ormo_server.core.vectors import largest
from ormo_server.journal import is_journal, told_since
from ormo_server.metrics import Metrics
from ormo_server.mirror.models import fetched
from ormo_server.service.admission import Bounds, ModelOffers, check_memory
from ormo_server.service.delivery import Copies
from ormo_server.service.engine import Engine
from ormo_server.service.files import RunFiles
from ormo_server.service.lock import RunClock
from ormo_server.service.restore import (
    Recovered,
    keep_aside,
    recover,
    refuse_overflowing,
    settings_of_run,
    tell_kept,
    warn_if_bits_may_differ,
)
from ormo_server.settings import ServerSettings
from ormo_server.store import (
    Checkpoint,
    FlatModel,
    Found,
    ModelFile,
    StoreError,
    buffers_of,
    unsound_tensors,
)
from ormo_server.store.files import listed
from ormo_server.trace.writer import TraceWriter

_LOG = logging.getLogger(__name__)

_FLOAT_BYTES = 4


class RunHost:
    """Holds the engine as soon as there is a model.

    Args:
        settings: of the server.
        metrics: what to count in.

    Attributes:
        files: of the run.
        checkpoint_bytes: of one, at most; 0 without a model.

    Raises:
        StoreError: no checkpoint is whole, the model file can't be used, or the trace can't be written.
        SettingsError: the checkpoint was written by another update rule.
        MemoryLimit: the model needs more than `memory_limit_bytes`.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.started = time.monotonic()
        self.clock = RunClock()
        self.offers = ModelOffers(FailureDetection(settings.failure_timeout_seconds).offer_seconds)
        self.checkpoint_bytes = 0
        self._run = settings.run()
        self._epoch = secrets.randbits(64)
        self.files = RunFiles(settings, metrics, self._fail)
        self._engine: Engine | None = None
        # Two workers may have sent a model, if the first one's lease ended on the way: the first to be whole is taken.
        self._building = threading.Lock()
        self._weights: ModelFile | None = None
        self._trace: TraceWriter | None = None
        # Before anybody calls: once there is a model, a thread that can't be started would break the engine.
        self._copies = Copies(metrics.traffic.stage["copy"])
        metrics.process.settings(settings.described())
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
        if not self.files.stop_writing():
            return  # a checkpoint is still being written: whatever it needs must stay as it is
        self._copies.close()
        if self._trace is not None:
            self._trace.close()
        self.files.close()

    def _fail(self, why: str) -> None:
        if self._engine is not None:
            self._engine.fail(why)

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

    @property
    def members_engine(self) -> Engine:
        """The engine, for those who say that they are its members.

        Raises:
            NotAMember: there is no model yet. Workers of a server that was started again without its files have a model
                to offer, once they join: told to come back later, as readers are, they would do so for ever.
        """
        if self._engine is None:
            raise NotAMember("this server has no model yet, and so no members: join, and it will be asked for")
        return self._engine

    # At the start

    def _begin_anew(self) -> None:
        model = self.settings.model
        weights = (
            None if model is None else fetched(model, self.settings.directory)
        )  # before the move: it may be that run's
        mirror = self.files.mirror
        mirrored = None if mirror is None else mirror.take_anew()  # before the move, too: it may be another server's
        aside = self.files.move_run_aside(time.strftime("before-%Y%m%d-%H%M%S"))
        if aside is not None:
            _LOG.info("a new run begins: the one that was in %s is kept in %s", self.settings.directory, aside)
        if mirrored is not None:
            mirrored()
        if weights is not None:
            self._load(weights)

    def _restore_or_load(self) -> None:
        newest = self.files.store.newest(partial(refuse_overflowing, self._run))
        mirror = self.files.mirror
        if newest is not None:
            if mirror is not None:
                mirror.take()
            self._restore(newest)
            return
        told = told_since(self.files.journal_directory)
        if told or is_journal(self.files.journal_directory):
            raise StoreError(
                f"{self.settings.directory} has a journal of {told or 'a run'}, and the checkpoint that it follows is "
                "missing: restore that one from a backup, or begin a new run, with --fresh or in another --directory; "
                "nothing was changed"
            )
        if mirror is not None:
            newest = mirror.restore(partial(refuse_overflowing, self._run))
            if newest is not None:
                self._restore(newest)
                mirror.forget_restored()
                return
        if self.settings.model is not None:
            self._load(fetched(self.settings.model, self.settings.directory))

    def _restore(self, newest: Found) -> None:
        checkpoint = newest.checkpoint
        settings = settings_of_run(self.settings, checkpoint)
        if settings is not self.settings:
            self.settings, self._run = settings, settings.run()
            self.metrics.process.settings(settings.described())
        self.files.last_log = checkpoint.journal_log or 0
        self._check_memory(checkpoint.manifest)
        warn_if_bits_may_differ(checkpoint)
        found = recover(checkpoint, self.files.journal_directory, newest.read_again, newer_lost=newest.skipped > 0)
        if found.damage:
            _LOG.error("the journal can be used in part only, and all tickets are void: %s", found.damage)
        if found.doubled:
            _LOG.warning("%s: everything acknowledged is before them, and is used", found.doubled)
        self.clock = RunClock(found.clock_seconds)
        machine = self._restore_machine(found, checkpoint.manifest, keep_tickets=found.complete)
        # Before the checkpoint: whatever starts after it has no need of the journal before, and removes it.
        kept = keep_aside(self.files.journal_directory, self._epoch) if found.damage or found.doubled else None
        try:
            self._write_first(machine, checkpoint.manifest, checkpoint.frozen)
        except StoreError as error:
            if kept is not None:
                shutil.rmtree(kept, ignore_errors=True)
            if self.settings.journal:
                # What is recorded from now on would follow from a state that is nowhere on disk.
                lost = "Nothing more is lost" if found.damage else "Nothing is lost"
                raise StoreError(
                    f"{error}. {lost}: the last checkpoint and {self.files.journal_directory} hold the run, leave both "
                    "as they are; the next start continues with them"
                ) from error
            _LOG.error("the restored state could not be written again, so all its tickets are void: %s", error)
            machine = self._restore_machine(found, checkpoint.manifest, keep_tickets=False)
        else:
            self.files.forget_older_journal()
            if kept is not None:
                tell_kept(self.files.store, kept, logging.ERROR if found.damage else logging.WARNING)
        self._serve(machine, checkpoint.manifest, checkpoint.frozen, fresh=False)

    def _restore_machine(self, found: Recovered, manifest: Manifest, *, keep_tickets: bool) -> StateMachine:
        buffers = buffers_of(manifest)
        machine = snapshot.restore(
            self._run, found.snapshot, epoch=self._epoch, keep_tickets=keep_tickets, buffers=buffers
        )
        _LOG.info(
            "restored iteration %d from %s (%s)",
            machine.state.iteration,
            self.settings.directory,
            "nothing was applied after it: tickets stay valid"
            if keep_tickets
            else "something may be lost: all tickets are void",
        )
        return machine

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
                "from a model without them; a buffer that need not be kept can be registered with persistent=False"
            )
        with self._building:
            self.check_wanted(worker, incarnation)
            self.files.refuse_if_not_ours()
            if self._weights is not None:
                model = self._arrange(self._weights, manifest)
            self._start(manifest, model)
        return self.engine.iteration()

    def _arrange(self, weights: ModelFile, manifest: Manifest) -> FlatModel:
        try:
            return weights.arrange(manifest)
        except StoreError as error:
            raise BadManifest(str(error)) from error

    def _start(self, manifest: Manifest, model: FlatModel) -> None:
        if largest(model.params) > LARGEST:
            raise NonFinite(
                f"the model has numbers above {LARGEST:.3g}, too large to be trained: start from a model with "
                "smaller ones"
            )
        vectors = model.params, model.float_buffers, model.int_buffers
        machine = StateMachine.fresh(self._run, *vectors, epoch=self._epoch, buffers=buffers_of(manifest))
        try:
            self._write_first(machine, manifest, model.frozen)
        except StoreError as error:
            raise NotReady(f"the model could not be stored: {error}", retry_seconds=5.0) from error
        self._serve(machine, manifest, model.frozen, fresh=True)

    def _write_first(self, machine: StateMachine, manifest: Manifest, frozen: torch.Tensor) -> None:
        started = time.perf_counter()
        journal_log = self.files.open_journal()
        # Not drained: what is pushed from now on uses up tickets that this checkpoint may hold. After a crash they must
        # not be good a second time.
        first = Checkpoint(
            snapshot.take(machine),
            manifest,
            drained=False,
            clock_seconds=self.clock(),
            settings=self.settings.recorded(),
            journal_log=journal_log,
            frozen=frozen,
        )
        self.files.write(first, started)

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
            lease_seconds=FailureDetection(self.settings.failure_timeout_seconds).lease_seconds,
            ticket_timeout=self.settings.ticket_timeout_seconds,
            bounds=Bounds(
                self.settings.max_gradient_norm,
                self.settings.over_norm == "clip",
                self.settings.max_refused_share,
            ),
            journal=self.files.journal,
            trace=self._trace,
            copies=self._copies,
            refuse_if_not_ours=self.files.refuse_if_not_ours,
        )

    # While it runs

    def checkpoint(self, *, drained: bool = False, anew: bool = False) -> bool:
        """Write a checkpoint, unless the last one has the same parameters.

        Args:
            drained: the engine is closed, so that nothing can be applied after it.
            anew: write one in any case.

        Returns:
            Whether the newest state is on disk now.
        """
        return self._engine is None or self.files.checkpoint(self._engine, self.settings, drained=drained, anew=anew)

    def relieve_journal(self) -> bool:
        """Write a checkpoint if the journal has grown to its bound.

        Returns:
            Whether it is below it now.
        """
        return not self.files.journal_is_full or self.checkpoint()
