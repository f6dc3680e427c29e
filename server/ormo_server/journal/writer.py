"""Writes a journal: gradients before the engine's lock, the order of lines under it, lines and one fsync after it."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Literal

from ormo_protos.tensors import Payload
from ormo_server.core.effects import Redeemed
from ormo_server.core.errors import DiskFull, NotReady
from ormo_server.core.ids import SlotKey
from ormo_server.core.inputs import Input
from ormo_server.journal.files import LogFile, Mark, disk_full, kept_back, may_pass
from ormo_server.journal.gradients import GradientFiles, Storing
from ormo_server.journal.records import (
    LOG_NAME,
    MARK_NAME,
    Delivered,
    End,
    KeptGradient,
    Record,
    StoredGradient,
    chain_lines,
    log_path,
    next_log,
    numbered,
    opening,
    text_of,
)
from ormo_server.store.files import make_directory, sync
from ormo_server.trace.rows import Recorded

_LOG = logging.getLogger(__name__)

Fsync = Literal["always", "interval", "off"]

INTERVAL_SECONDS = 1.0
# A gradient up to here stands in its line: then one write and one fsync are all that its answer waits for. Larger ones
# are encoded for longer than that saves; and so are all where no answer waits for an fsync.
IN_LINE_BYTES: dict[Fsync, int] = {"always": 16 << 10, "interval": 0, "off": 0}
# A restart does so many entries again in some ten seconds: of small gradients there are many in few bytes.
ENTRIES_BETWEEN_CHECKPOINTS = 50_000
# While a checkpoint is written the journal goes on; beyond so many times its bound it takes no gradient.
_MOST_BOUNDS = 2
_SECONDS_BETWEEN_COMPLAINTS = 10.0


# What a line will say; None where a new log begins instead. Lines are formatted by the thread that writes them.
_Entry = tuple[Input, Redeemed | None, KeptGradient | None] | Delivered | None


class Journal:
    """Records a run's inputs.

    Three groups of methods, by when they are called: `begin` and `store` before the engine's lock is taken, since they
    write a whole gradient; `append`, `append_delivery` and `begin_log` under it, since their order is the order in
    which the core took its inputs, and they only put an entry into a queue; the rest after it, since they wait for the
    disk.

    A second lock, the commit lock, is held by the one thread that writes and syncs for all who wait. It is never taken
    under the engine's lock, and the engine's lock never under it, so that no update waits for the disk.

    Args:
        directory: the journal's own directory; made if it is missing.
        fsync: when what was written is made safe from a power cut: before every answer, once a second, or when the
            system sees fit. From a crash of the process it is safe in any case.
        max_bytes: a checkpoint is due when there is more, or `ENTRIES_BETWEEN_CHECKPOINTS`; beyond twice this no
            gradient is taken.
        on_failure: is called when the disk is broken: no answer may be given from then on.
        on_commit: is told the seconds of each write.
        after: number that the last checkpoint names. No log has it again, also where the one that it named has gone:
            else what is written now would be taken for what came after that checkpoint.

    Attributes:
        log: number of the log that lines are put in now.
        position: how many entries there are.

    Raises:
        OSError: the directory can't be used.
        RuntimeError: the system has no threads for it.
    """

    def __init__(
        self,
        directory: Path,
        fsync: Fsync,
        max_bytes: int,
        on_failure: Callable[[], object],
        on_commit: Callable[[float], object],
        after: int = 0,
    ) -> None:
        make_directory(directory)
        self._directory = directory
        self._fsync = fsync
        self._max_bytes = max_bytes
        self._on_failure = on_failure
        self._on_commit = on_commit
        self._gradients = GradientFiles(directory, waited_for=fsync == "always", in_line_bytes=IN_LINE_BYTES[fsync])
        # Changed under the engine's lock, but for `_complained`, where a lost race means one log line too many. The
        # queue has one end under each lock: a deque's `append` and `popleft` need none.
        self.log = next_log(directory, after)
        self.position = 0
        self._complained = float("-inf")
        self._taken: deque[_Entry] = deque()
        # The commit lock, and what only its holder changes. `_safe` and `_failed` are read without it, which is sound:
        # they only ever go one way.
        self._committing = threading.Lock()
        self._unwritten: deque[_Entry] = deque()
        self._written = 0
        self._safe = 0
        self._failed = self._closed = False
        self._first = self.log
        before = End.before_all(self.log)
        self._end = before.turned_over()
        self._last_line = self._end.place
        self._older_logs: dict[int, int] = {}
        # Where each log begins, and where the one does that the last checkpoint names.
        self._begun: dict[int, int] = {}
        self._forgotten = 0
        self._file = self._new_file(self.log, before)
        try:
            self._mark = Mark(directory, self.log)
        except OSError:
            self._file.close()
            log_path(directory, self.log).unlink()
            raise
        self._closing = threading.Event()
        self._syncing = threading.Thread(target=self._sync_every_second, name="journal", daemon=True)
        if fsync == "interval":
            try:
                self._syncing.start()
            except RuntimeError:
                self._file.close()
                raise

    def _new_file(self, log: int, before: End) -> LogFile:
        return LogFile(log_path(self._directory, log), opening(before), ahead=self._fsync == "always")

    # Before the lock

    def begin(self, payload: Payload) -> Storing:
        """A place for a gradient's payload, which may still be arriving; `store` ends it, or it is given up.

        Raises:
            DiskFull: there is no room for it.
        """
        with self._complaining():
            if self.size_bytes > _MOST_BOUNDS * self._max_bytes:
                why = f"it has {self.size_bytes:,} bytes, and no checkpoint could be written"
                raise disk_full(self._directory, why)
            return self._gradients.begin(payload)

    def store(self, storing: Storing) -> KeptGradient:
        """Return when it is written; it counts once its push is taken. Give it back with `release`.

        Raises:
            DiskFull: there is no room for it.
        """
        with self._complaining():
            return storing.finish()

    @contextmanager
    def _complaining(self) -> Iterator[None]:
        try:
            yield
        except DiskFull as refusal:
            self._complain(refusal)
            raise

    def _complain(self, refusal: DiskFull) -> None:
        # Every worker tries again every two seconds: one line in ten seconds is enough.
        now = time.monotonic()
        if now - self._complained >= _SECONDS_BETWEEN_COMPLAINTS:
            self._complained = now
            _LOG.error("%s", refusal)

    # Under the lock

    def append(self, given: Input, redeemed: Redeemed | None = None, stored: KeptGradient | None = None) -> int:
        """Put an input that took effect into its place in the order.

        Args:
            given: the input.
            redeemed: what became of it, if it is a push.
            stored: its gradient, or where that was written, if it is a push.

        Returns:
            The position to wait for.
        """
        if isinstance(stored, StoredGradient):
            self._gradients.pin(stored, self.log)
        return self._append((given, redeemed, stored))

    def append_delivery(self, slot: SlotKey, dtype: int) -> int:
        """Record that parameters went out which the update rule keeps.

        Args:
            slot: whose they are.
            dtype: the wire dtype they went out in.

        Returns:
            The position to wait for.
        """
        return self._append(Delivered(worker=slot[0], slot=slot[1], dtype=dtype))

    def begin_log(self) -> int:
        """Put what comes from now on into a new log; returns its number. A checkpoint of this moment names it."""
        self.log += 1
        self._append(None)
        self._begun[self.log] = self.position
        self._gradients.begin_file()
        return self.log

    def _append(self, entry: _Entry) -> int:
        self._taken.append(entry)
        self.position += 1
        return self.position

    # After the lock

    def release(self, stored: KeptGradient | None) -> None:
        """The gradient's exchange is over, whether it was taken or not."""
        if isinstance(stored, StoredGradient):
            self._gradients.release(stored)

    def wait_durable(self, position: int) -> None:
        """Return when the entries up to a position are as safe as they will be; many wait for one write.

        Raises:
            DiskFull: there is no room; nothing is lost, and a later call may do better.
            NotReady: the disk is broken.
        """
        if position <= self._safe:
            return
        with self._committing:
            # Most who waited for the lock find that the thread before them has written their entry too.
            if position <= self._safe:
                return
            started = time.perf_counter()
            self._guard(self._commit)
            self._on_commit(time.perf_counter() - started)

    def _guard(self, act: Callable[[], None]) -> None:
        """Write or sync, under the commit lock; a disk that fails for good stops the journal for good."""
        if not (self._failed or self._closed):
            try:
                return act()
            except OSError as error:
                if may_pass(error):
                    refusal = kept_back(self._directory, error)
                    self._complain(refusal)
                    raise refusal from error
                self._failed = True
                _LOG.critical("the journal in %s can't be written: %s", self._directory, error)
        if self._failed:
            self._on_failure()
        raise NotReady(f"the journal in {self._directory} can't be written: this server stops", retry_seconds=2.0)

    def _commit(self) -> None:
        # As many as are there now: others go on appending, and their entries are the next commit's.
        for _ in range(len(self._taken)):
            self._unwritten.append(self._taken.popleft())
        if self._fsync == "always":
            self._gradients.sync()  # before the lines: none may survive a power cut without the gradient it names
        self._write()
        if self._fsync == "always":
            self._file.sync()
        # Before anybody is told: an acknowledged line in a file that was removed would be gone after a restart.
        self._gradients.refuse_if_gone()
        self._file.refuse_if_gone()
        self._end = self._end.all_acknowledged()
        self._mark.move(self._last_line)
        self._safe = self._written  # last: whoever reads it acknowledges without taking the lock

    def _write(self) -> None:
        while self._unwritten:
            entries = list(takewhile(lambda entry: entry is not None, self._unwritten))
            if entries:
                # Formatted here, by the thread that waits, and not under the engine's lock. If the write fails the
                # entries stay where they are, and the next commit begins with them.
                lines, end = chain_lines(self._end, (_text_of(entry) for entry in entries if entry is not None))
                self._file.append(lines)
                self._end, self._last_line = end, end.place
            else:
                self._turn_over()
            for _ in entries or (None,):
                self._unwritten.popleft()
                self._written += 1

    def _turn_over(self) -> None:
        # A log that later ones follow is synced now, since nothing will sync it again; and the next one is made before
        # this one is closed: without room for it, this one goes on.
        if self._fsync != "off":
            self._file.sync()
        following = self._end.turned_over()
        after = self._new_file(following.log, self._end)
        self._file.close()
        self._gradients.close_idle(unsynced=self._fsync == "off")
        self._older_logs[self._end.log] = self._file.size_bytes
        self._end, self._file = following, after

    def _sync_every_second(self) -> None:
        while not self._closing.wait(INTERVAL_SECONDS):
            with self._committing:
                try:
                    self._guard(self._sync)
                except NotReady:
                    return

    def _sync(self) -> None:
        self._gradients.sync()
        self._file.sync()

    # Its size

    @property
    def size_bytes(self) -> int:
        """Bytes written since the last checkpoint."""
        return self._gradients.size_bytes + self._file.size_bytes + sum(list(self._older_logs.values()))

    @property
    def full(self) -> bool:
        """Whether a checkpoint is due."""
        entries = self.position - self._forgotten
        return self.size_bytes > self._max_bytes or entries > ENTRIES_BETWEEN_CHECKPOINTS

    def forget_before(self, log: int) -> None:
        """Remove the logs before this one, which a checkpoint now stands for, and the gradients that only they name.

        Args:
            log: number of the log that begins with the checkpoint.

        Raises:
            OSError: a file can't be taken away.
        """
        with self._committing:
            if self._closed:
                return
            gradients = self._gradients.let_go_before(log)
            self._older_logs = {number: size for number, size in self._older_logs.items() if number >= log}
        for number in [each for each in list(self._begun) if each <= log]:
            self._forgotten = self._begun.pop(number)
        logs = [path for number, path in numbered(self._directory, LOG_NAME).items() if number < log]
        marks = [path for number, path in numbered(self._directory, MARK_NAME).items() if number < self._first]
        # Logs first, oldest first: a crash in between leaves gradients that no line names, never a line without its
        # gradient.
        for path in (*logs, *gradients, *marks):
            path.unlink()
        sync(self._directory)

    def close(self) -> None:
        """Close the files; nothing can be stored, and nobody can wait, any more."""
        # The thread first: it takes the commit lock, and would sync a closed file.
        self._closing.set()
        if self._syncing.ident is not None:
            self._syncing.join()
        with self._committing:
            if not self._closed:
                self._closed = True
                self._file.close()
                self._mark.close()
        self._gradients.close()


def _text_of(entry: tuple[Input, Redeemed | None, KeptGradient | None] | Delivered) -> bytes:
    if isinstance(entry, Delivered):
        return Record(delivered=entry).text()
    given, redeemed, kept = entry
    return text_of(Recorded(given, redeemed), kept)
