"""Writes a run's trace, beside the training and never in its way."""

import fcntl
import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from ormo_server.core.machine import StateMachine
from ormo_server.settings import ServerSettings
from ormo_server.store import StoreError
from ormo_server.trace.rows import OPENING, Entry, Start, TracedModel, TracedSettings, digest_of, line_of

_LOG = logging.getLogger(__name__)

# Rows reach the file about this soon.
_WRITE_SECONDS = 0.5
# What waits for the disk at most, weighed against memory: some 50 MB, and half a minute at 1000 gradients a second.
INPUTS_HELD = 65_536
# Formatting holds the interpreter: so short a spell, 0.5 ms, keeps nobody who applies a gradient waiting.
_ROWS_AT_ONCE = 50
# A disk that hangs must not keep the server from stopping.
_CLOSE_SECONDS = 5.0
# No row is as long.
_LONGEST_TAIL_BYTES = 1 << 20


class TraceWriter:
    """Appends to a trace. The caller of `append`, which holds the engine's lock, never waits for the disk.

    When the disk fails, or is too slow for what may wait in memory, the trace ends there, without a gap in it.

    Args:
        path: of the file; it is made, with its directories, or gone on with.
        on_failure: is called once if the trace ends early.

    Raises:
        StoreError: the file can't be written, is in use by another server, or is not a trace.
    """

    def __init__(self, path: Path, on_failure: Callable[[], None]) -> None:
        self._path = path
        self._on_failure = on_failure
        self._file = _open_trace(path)
        self._waiting: deque[Start | Entry] = deque()
        self._complete = True
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="trace", daemon=True)
        self._thread.start()

    def begin(self, machine: StateMachine, settings: ServerSettings, *, fresh: bool) -> None:
        """Begin a segment.

        Args:
            machine: whose inputs follow; at its start, or just restored.
            settings: the server's; of them, those of training are written down.
            fresh: whether the machine is at its start, and not restored.
        """
        state = machine.state
        start = Start(
            event="start",
            format=1,
            epoch=state.epoch,
            iteration=state.iteration,
            fresh=fresh,
            settings={
                name: value for name, value in settings.recorded().items() if name in TracedSettings.model_fields
            },
            model=TracedModel(parameters=state.params.numel(), digest=digest_of(state.params) if fresh else ""),
            time=time.time(),
            refusals=True,
        )
        self._waiting.append(start)

    def append(self, entry: Entry) -> None:
        """Write what happened: an input that took effect, or a gradient that was refused."""
        # Under the engine's lock: all real work is the thread's.
        if self._complete and len(self._waiting) < INPUTS_HELD:
            self._waiting.append(entry)
        else:
            self._complete = False

    def close(self) -> None:
        """Write what waits, and no more."""
        self._closing.set()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            _LOG.error(
                "the disk did not take the end of the trace %s within %g s: that end is missing",
                self._path,
                _CLOSE_SECONDS,
            )

    # The thread's

    def _work(self) -> None:
        try:
            closing = False
            while self._complete and not closing:
                closing = self._closing.wait(_WRITE_SECONDS)
                self._write_waiting()
            if not self._complete:
                self._fail("its disk was too slow for the inputs received")
        except Exception as error:  # noqa: BLE001 - the trace is worth less than the training
            self._fail(error)
        finally:
            self._complete = False
            self._waiting.clear()
            self._file.close()

    def _fail(self, why: object) -> None:
        self._on_failure()
        _LOG.error(
            "the trace %s ends here (%s): training continues without it; restart the server to continue the trace",
            self._path,
            why,
            exc_info=why if isinstance(why, Exception) and not isinstance(why, OSError) else None,
        )

    def _write_waiting(self) -> None:
        while self._waiting:
            count = min(len(self._waiting), _ROWS_AT_ONCE)
            self._write(b"".join(line_of(self._waiting.popleft()) for _ in range(count)))

    def _write(self, text: bytes) -> None:
        # The file has no buffer, so what a full disk took is there and nothing else is tried at the end.
        rest = memoryview(text)
        while rest:
            rest = rest[self._file.write(rest) or 0 :]


def _open_trace(path: Path) -> FileIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise StoreError(
            f"can't write the trace {path}: {error.strerror}; make it writable or choose another --trace"
        ) from error
    try:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it may be a pipe
            _claim(path, file)
            _cut_torn_line(path, file)
    except StoreError:
        file.close()
        raise
    return file


def _claim(path: Path, file: FileIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise StoreError(f"the trace {path} is in use by another server: stop it or choose another --trace") from error


def _cut_torn_line(path: Path, file: FileIO) -> None:
    """Take away what a crash left of a line, so that the next one is whole."""
    size = file.seek(0, os.SEEK_END)
    head = os.pread(file.fileno(), len(OPENING), 0)
    begin = max(0, size - _LONGEST_TAIL_BYTES)
    tail = os.pread(file.fileno(), size - begin, begin)
    lines_end = tail.rfind(b"\n") + 1
    if not OPENING.startswith(head) or (begin and not lines_end):
        raise StoreError(
            f"{path} exists and is not a trace of this version: choose another --trace, or move the file away"
        )
    file.truncate(begin + lines_end)
