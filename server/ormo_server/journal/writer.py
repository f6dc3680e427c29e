"""Writes a journal."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Literal

from ormo_protos.tensors import Payload
from ormo_server.core.effects import Redeemed
from ormo_server.core.errors import DiskFull, NotReady
from ormo_server.core.ids import SlotKey
from ormo_server.core.inputs import Input
from ormo_server.journal.files import GradientFiles, LogFile, Mark, disk_full, kept_back, may_pass
from ormo_server.journal.records import (
    LOG_NAME,
    MARK_NAME,
    Delivered,
    End,
    Record,
    StoredGradient,
    chained,
    log_path,
    next_log,
    numbered,
    opening,
)
from ormo_server.store.files import make_directory, sync
from ormo_server.trace.rows import Recorded

log = logging.getLogger(__name__)

Fsync = Literal["always", "interval", "off"]

INTERVAL_SECONDS = 1.0
# A restart does so many entries again in some ten seconds: of small gradients there are many in few bytes.
ENTRIES_BETWEEN_CHECKPOINTS = 50_000
# While a checkpoint is written the journal goes on; beyond so many times its bound it takes no gradient.
_MOST_BOUNDS = 2
_SECONDS_BETWEEN_COMPLAINTS = 10.0


# What a line will say; None where a new log begins instead. Lines are formatted by the thread that writes them.
_Entry = tuple[Input, Redeemed | None, StoredGradient | None] | Delivered | None


class Journal:
    """Records a run's inputs.

    Three groups of methods: `store` before the lock of whoever drives the core is taken, `append` to `begin_log` under
    it, and the rest after it.

    Args:
        directory: made if it is missing.
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
        RuntimeError: the system has no thread for the fsync of every second.
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
        self._gradients = GradientFiles(directory)
        # Under the engine's lock.
        self.log = next_log(directory, after)
        self.position = 0
        self._complained = float("-inf")
        self._taken: deque[_Entry] = deque()
        # One thread at a time writes for all.
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
        self._file = LogFile(log_path(directory, self.log), opening(before))
        try:
            self._mark = Mark(directory, self.log)
        except OSError:
            self._file.close()
            log_path(directory, self.log).unlink()
            raise
        self._closing = threading.Event()
        self._syncing = threading.Thread(target=self._sync_often, name="journal", daemon=True)
        if fsync == "interval":
            try:
                self._syncing.start()
            except RuntimeError:
                self._file.close()
                raise

    # Before the lock

    def store(self, payload: Payload) -> StoredGradient:
        """Write a gradient's payload; it counts once its push is taken. Give it back with `release`.

        Raises:
            DiskFull: there is no room for it.
        """
        try:
            if self.size_bytes > _MOST_BOUNDS * self._max_bytes:
                why = f"it has {self.size_bytes:,} bytes, and no checkpoint could be written"
                raise disk_full(self._directory, why)
            return self._gradients.store(payload)
        except DiskFull as refusal:
            self._complain(refusal)
            raise

    def _complain(self, refusal: DiskFull) -> None:
        # Every worker comes again every other second: one line now and then tells it.
        now = time.monotonic()
        if now - self._complained >= _SECONDS_BETWEEN_COMPLAINTS:
            self._complained = now
            log.error("%s", refusal)

    # Under the lock

    def append(self, given: Input, redeemed: Redeemed | None = None, stored: StoredGradient | None = None) -> int:
        """An input took effect.

        Args:
            given: the input.
            redeemed: what became of a push.
            stored: where a push's gradient is.

        Returns:
            The position to wait for.
        """
        if stored is not None:
            self._gradients.named(stored, self.log)
        return self._append((given, redeemed, stored))

    def append_delivery(self, slot: SlotKey, dtype: int) -> int:
        """Parameters went out that the update rule keeps; returns the position to wait for."""
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

    def release(self, stored: StoredGradient | None) -> None:
        """The gradient's exchange is over, whether it was taken or not."""
        if stored is not None:
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
            if position <= self._safe:
                return
            started = time.perf_counter()
            self._guarded(self._commit)
            self._on_commit(time.perf_counter() - started)

    def _guarded(self, act: Callable[[], None]) -> None:
        if not (self._failed or self._closed):
            try:
                return act()
            except OSError as error:
                if may_pass(error):
                    refusal = kept_back(self._directory, error)
                    self._complain(refusal)
                    raise refusal from error
                self._failed = True
                log.critical("the journal in %s can't be written: %s", self._directory, error)
        if self._failed:
            self._on_failure()
        raise NotReady(f"the journal in {self._directory} can't be written: this server stops", retry_seconds=2.0)

    def _commit(self) -> None:
        for _ in range(len(self._taken)):
            self._unwritten.append(self._taken.popleft())
        if self._fsync == "always":
            self._gradients.sync()  # first: a line must not be safe before what it names
        self._write()
        if self._fsync == "always":
            self._file.sync()
        self._gradients.refuse_if_gone()
        self._file.refuse_if_gone()
        self._end = self._end.heard()
        self._mark.move(self._last_line)
        self._safe = self._written  # last: from now on others answer without asking

    def _write(self) -> None:
        while self._unwritten:
            entries = list(takewhile(lambda entry: entry is not None, self._unwritten))
            if entries:
                lines, end = chained(self._end, (_record_of(entry).text() for entry in entries if entry is not None))
                self._file.append(lines)
                self._end, self._last_line = end, end.place
            else:
                self._turn_over()
            for _ in entries or (None,):
                self._unwritten.popleft()
                self._written += 1

    def _turn_over(self) -> None:
        if self._fsync != "off":
            self._file.sync()
        following = self._end.turned_over()
        after = LogFile(log_path(self._directory, following.log), opening(self._end))
        self._file.close()
        self._gradients.close_idle(unsynced=self._fsync == "off")
        self._older_logs[self._end.log] = self._file.size_bytes
        self._end, self._file = following, after

    def _sync_often(self) -> None:
        while not self._closing.wait(INTERVAL_SECONDS):
            with self._committing:
                try:
                    self._guarded(self._sync)
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
        """A checkpoint holds what the logs before this one say: they go, and the gradients that only they name.

        Args:
            log: that begins with the checkpoint.

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
        for path in (*logs, *gradients, *marks):
            path.unlink()
        sync(self._directory)

    def close(self) -> None:
        """Let the files go; nothing can be stored or settled any more."""
        self._closing.set()
        if self._syncing.ident is not None:
            self._syncing.join()
        with self._committing:
            if not self._closed:
                self._closed = True
                self._file.close()
                self._mark.close()
        self._gradients.close()


def _record_of(entry: tuple[Input, Redeemed | None, StoredGradient | None] | Delivered) -> Record:
    if isinstance(entry, Delivered):
        return Record(delivered=entry)
    given, redeemed, stored = entry
    return Record(input=Recorded(given, redeemed), gradient=stored)
