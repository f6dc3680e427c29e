"""Keeps a mirror of a run: takes it at the start, restores from it, and copies checkpoints while the run goes on."""

import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ormo_server.metrics.families import MirrorMetrics
from ormo_server.mirror.buckets import Bucket, BucketError
from ormo_server.mirror.copies import Copy, copies, copy_in, fetch_newest, prune
from ormo_server.mirror.identity import Writer, new_writer, read_writer, write_writer
from ormo_server.mirror.lease import LEASE, RENEWALS, HeldError, Lease, LostError, Record, read_record
from ormo_server.store.checkpoints import Checkpoint, CheckpointStore, Found
from ormo_server.store.files import StoreError

_LOG = logging.getLogger(__name__)

_RESTORING = ".restoring"
# Between tries to copy a checkpoint that could not be.
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
# To give the mirror back, of the time that a stop has.
_RELEASE_SECONDS = 5.0
# How often a lease that may be dead is looked at, in the time that it has.
_LOOKS = 10


class Mirroring:
    """The mirror of one run. Nothing that goes wrong with it once the run is served ever stops the run.

    One of `take` (the directory has a run), `take_anew` (it is to have a new one) and `restore` (it has none) comes
    first, then `start`; `notice` whenever a checkpoint is on the disk.

    Args:
        bucket: of the mirror.
        directory: of the run, which this process has locked.
        store: of its checkpoints.
        keep: how many of the last copies stay.
        lease_seconds: of silence after which another server may take the mirror.
        metrics: what to count in.
    """

    def __init__(
        self,
        bucket: Bucket,
        directory: Path,
        store: CheckpointStore,
        keep: int,
        lease_seconds: float,
        metrics: MirrorMetrics,
    ) -> None:
        self._bucket = bucket
        self._directory = directory
        self._store = store
        self._keep = keep
        self._metrics = metrics
        self._lease = Lease(bucket, Writer(""), lease_seconds)
        self._iteration: Callable[[], int | None] = lambda: None
        # Names of checkpoints that are not in the mirror, and when they were written; the oldest first.
        self._missing: deque[tuple[str, float]] = deque()
        self._changed = threading.Condition()
        self._finishing = self._ended = self._gave_up = False
        self._works = False  # on a copy, or on the removal of what it makes superfluous
        self._copying = threading.Thread(target=self._copy_all, name="mirror", daemon=True)
        self._leasing = threading.Thread(target=self._keep_lease, name="mirror-lease", daemon=True)
        metrics.behind(self._behind_seconds)

    # At the start

    def take(self) -> None:
        """Have the mirror for the run that is in the directory; it can wait for a bucket that is away.

        Raises:
            HeldError: another server has it.
            StoreError: the directory can't be written to.
        """
        writer = read_writer(self._directory)
        if writer is None:
            writer = new_writer()
            write_writer(self._directory, writer)
        self._take_or_later(writer)

    def take_anew(self) -> Callable[[], None]:
        """Have the mirror for a new run; copies of the one before stay where they are, and are no longer used.

        Returns:
            What is to be called once the directory is free for it.

        Raises:
            HeldError: another server has it.
        """
        writer = new_writer(before=self._name_before())
        self._take_or_later(writer)
        return lambda: write_writer(self._directory, writer)

    def _name_before(self) -> str:
        known = read_writer(self._directory)
        return known.name if known else ""

    def _take_or_later(self, writer: Writer) -> None:
        try:
            self._take_patiently(writer)
        except BucketError as error:
            self._metrics.failures.inc()
            _LOG.error("the mirror can't be used: %s; training goes on without copies, and it is tried again", error)
            self._leasing.start()

    def _take_patiently(self, writer: Writer) -> Record | None:
        """Take the lease; if its writer may be dead, wait to see."""
        self._lease.writer = writer
        shutil.rmtree(self._directory / _RESTORING, ignore_errors=True)
        told = False
        while True:
            try:
                record = self._lease.take()
            except HeldError as error:
                if not error.seconds:
                    raise
                if not told:
                    _LOG.warning("%s; if it is dead, the mirror is free in %.1f s: waiting", error, error.seconds)
                told = True
                time.sleep(min(error.seconds, self._lease.lease_seconds / _LOOKS))
                continue
            self._tell_replaced(record)
            # Now: what a start has yet to do may take longer than a lease lasts.
            self._leasing.start()
            return record

    def _tell_replaced(self, record: Record | None) -> None:
        writer = self._lease.writer
        if record is not None and record.writer not in (writer.name, writer.before, *writer.continues):
            _LOG.warning(
                "%s was the mirror of another run, by %s: its copies stay in the folder %s there, and no start "
                "restores from them any more",
                self._bucket.address,
                record.server,
                record.writer,
            )

    def restore(self, refuse: Callable[[Checkpoint], object]) -> Found | None:
        """Have the mirror for a directory without a run, and bring the newest whole checkpoint from it.

        Args:
            refuse: raises a StoreError for a checkpoint that the run must not go on with.

        Returns:
            The checkpoint, in a folder that `forget_restored` removes; None if there never was a run.

        Raises:
            BucketError: the mirror can't be read, so nobody knows whether there was a run.
            HeldError: another server has it.
            StoreError: there was a run, and nothing of it can be used.
        """
        try:
            return self._restore(refuse)
        except BucketError as error:
            raise BucketError(
                f"{error}. {self._directory} has no run, and whether the mirror has one can't be seen, so no new run "
                "begins: start again when the mirror can be read, or begin a new run with --fresh"
            ) from error

    def _restore(self, refuse: Callable[[Checkpoint], object]) -> Found | None:
        found, there = read_record(self._bucket), copies(self._bucket)
        if found is None and there:
            raise StoreError(
                f"{self._bucket.address} has checkpoints, but no {LEASE} that says whose: copy the folder of one into "
                f"{self._directory} by hand to go on with it, or begin a new run with --fresh"
            )
        of_run = found[0].lineage if found else ()
        with_copies = {copy.writer for copy in there}
        lineage = tuple(writer for writer in of_run if writer in with_copies or writer == of_run[0])
        writer = new_writer(lineage, self._name_before())
        record = self._take_patiently(writer)
        if (record.writer if record else "") != (of_run[0] if of_run else ""):
            raise BucketError(f"{self._bucket.address} became another server's while it was read")
        # Before anything of the run is in the directory: without it, that would be a run of its own.
        write_writer(self._directory, writer)
        if record is None:
            return None
        got = fetch_newest(self._bucket, lineage, self._directory / _RESTORING, refuse)
        if got is None:
            _refuse_if_begun(self._bucket, record)
            return None
        copy, checkpoint = got
        _tell_restored(self._bucket, record, copy, checkpoint)
        return checkpoint

    def forget_restored(self) -> None:
        """What was brought is in a checkpoint of our own."""
        shutil.rmtree(self._directory / _RESTORING, ignore_errors=True)

    def start(self, iteration: Callable[[], int | None]) -> None:
        """Begin to copy.

        Args:
            iteration: the newest of the run; None before it has a model.
        """
        self._iteration = iteration
        self._copying.start()

    # While it runs

    def notice(self, checkpoint: Path) -> None:
        """A checkpoint is whole on the disk."""
        with self._changed:
            self._missing.append((checkpoint.name, time.monotonic()))
            self._changed.notify_all()

    def _behind_seconds(self) -> float:
        with self._changed:
            return time.monotonic() - self._missing[0][1] if self._missing else 0.0

    def _copy_all(self) -> None:
        while self._wait_for_work():
            pause = _FIRST_PAUSE_SECONDS
            while not self._copy_newest(pause):
                if not self._wait_to_try_again(pause):
                    return
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._works = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or (self._missing and self._lease.held), _LONGEST_PAUSE_SECONDS)
            self._works = True
            return not self._ended

    def _wait_to_try_again(self, seconds: float) -> bool:
        with self._changed:
            # At the end there is one more try, at once.
            self._gave_up = self._finishing
            self._changed.notify_all()
            if not self._gave_up:
                self._changed.wait_for(lambda: self._ended or self._finishing, seconds)
            return not (self._ended or self._gave_up)

    def _copy_newest(self, pause: float) -> bool:
        """Copy the newest checkpoint; says whether nothing is left to be done for now."""
        started = time.monotonic()
        with self._changed:
            asked = len(self._missing)
        try:
            with self._store.newest_kept() as path:
                if not self._lease.held:
                    return True
                if path is not None:
                    copy_in(self._bucket, self._lease.writer.name, path, self._refuse_if_not_held)
            self._forget_missing(asked)
            if path is None:
                return True
            self._metrics.copied(int(path.name.rpartition("-")[2]))
            _LOG.info("%s is in the mirror after %.2f s", path.name, time.monotonic() - started)
            self._refuse_if_not_held()
            self._forget_old()
        except StoreError as error:
            self._metrics.failures.inc()
            _LOG.error("copying to the mirror failed, and is tried again in %.0f s: %s", pause, error)
            return False
        except Exception:  # noqa: BLE001 - without this thread nothing would be copied any more
            self._metrics.failures.inc()
            _LOG.exception("copying to the mirror failed, and is tried again in %.0f s", pause)
            return False
        return True

    def _forget_missing(self, count: int) -> None:
        with self._changed:
            for _ in range(count):
                self._missing.popleft()
            self._changed.notify_all()

    def _forget_old(self) -> None:
        writer = self._lease.writer
        left = prune(self._bucket, (writer.name, *writer.continues), self._keep)
        if left != writer.continues:
            self._lease.writer = Writer(writer.name, left, writer.before)

    def _refuse_if_not_held(self) -> None:
        if not self._lease.held:
            raise BucketError(f"{self._bucket.address}/{LEASE} could not be renewed in time: another may have it")

    # The lease

    def _keep_lease(self) -> None:
        failed = False
        pause = self._lease.lease_seconds / RENEWALS
        while not self._ended_within(pause):
            try:
                self._tend_lease()
            except LostError as error:
                self._metrics.failures.inc()
                _LOG.error("%s; until a restart no more checkpoints are copied, and training goes on", error)
                return
            except Exception as error:  # noqa: BLE001 - without this thread the lease would end
                self._metrics.failures.inc()
                if not failed:
                    _LOG.error("the mirror can't be kept ours for now: %s; training goes on, tried again", error)
                failed = True
                continue
            if failed:
                _LOG.info("%s is ours again", self._bucket.address)
            failed = False
            with self._changed:
                self._changed.notify_all()
        self._give_back()

    def _ended_within(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._ended, seconds)

    def _tend_lease(self) -> None:
        if self._lease.taken:
            self._lease.renew(self._iteration())
        else:
            self._tell_replaced(self._lease.take())

    def _give_back(self) -> None:
        if not (self._finishing and self._lease.held):
            return
        try:
            self._lease.renew(self._iteration(), released=True)
        except StoreError as error:
            _LOG.warning("the mirror could not be given back: %s", error)

    # At the end

    def finish(self, seconds: float) -> None:
        """Copy the last checkpoint, and let another server have the mirror, if that goes within this time."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._finishing = True
            self._changed.notify_all()
            self._changed.wait_for(
                # Old copies are gone by then, too: once the lease is given back, they are another's to remove.
                lambda: not (self._missing or self._works) or self._gave_up or not self._lease.held,
                seconds - _RELEASE_SECONDS,
            )
            left = [name for name, _ in self._missing]
        if left:
            _LOG.error("%s is not in the mirror: the next start with this directory copies it", left[-1])
        self.close()
        self._leasing.join(max(deadline - time.monotonic(), _RELEASE_SECONDS))

    def close(self) -> None:
        """Copy nothing more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def _refuse_if_begun(bucket: Bucket, record: Record) -> None:
    if record.iteration:
        raise StoreError(
            f"{bucket.address} is the mirror of a run that had iteration {record.iteration} at {record.written_at}, "
            "and has no checkpoint of it: bring one back from a backup, or begin a new run with --fresh"
        )


def _tell_restored(bucket: Bucket, record: Record, copy: Copy, found: Found) -> None:
    iteration = found.checkpoint.snapshot.fields["iteration"]
    said = f"restored iteration {iteration} from {bucket.address} ({copy.name})"
    if record.released and record.iteration <= iteration:
        _LOG.warning("%s: %s ended with it, so none is missing", said, record.server)
        return
    first = iteration + 1
    known = f"iterations {first} to {record.iteration}" if record.iteration > iteration else f"none from {first} on"
    _LOG.error(
        "%s. Not there are %s, which %s had at %s%s; the mirror has checkpoints only, no journal",
        said,
        known,
        record.server,
        record.written_at,
        "" if record.released else f", and what it applied after that, which it told every {_every(record):g} s",
    )


def _every(record: Record) -> float:
    return record.lease_seconds / RENEWALS
