"""Child processes with a log each, stopped by their ids and nothing else."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from ormo_runtime.logs import printable

_STOP_SECONDS = 30.0
_KIB = 1024


class Child:
    """One program of this package, run by this Python.

    Args:
        name: for messages, and of the log file.
        module: to run.
        arguments: after it.
        environment: of the program.
        log: directory for what it writes on stderr.

    Attributes:
        peak_bytes: the most memory that it had, known after its end.
    """

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.log_path = log / f"{name}.log"
        self.peak_bytes = 0
        with self.log_path.open("ab") as stderr:
            # A session of its own: Ctrl-C reaches us alone, and we stop the children in order.
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", module, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                encoding="utf-8",
                errors="replace",  # a task may print anything, and who does not read it to its end stops it
            )

    @property
    def output(self) -> IO[str]:
        """What it writes on stdout."""
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ended(self) -> int | None:
        """Its exit code, or None while it runs."""
        if self._process.returncode is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                self.peak_bytes = usage.ru_maxrss * _KIB
        return self._process.returncode

    def stop(self) -> int:
        """Ask it to end, insist after a while, and return its exit code."""
        self.ask_to_stop()
        deadline = time.monotonic() + _STOP_SECONDS
        while self.ended() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.02)
        self.output.close()
        code = self.ended()
        assert code is not None
        return code

    def ask_to_stop(self) -> None:
        """Send SIGTERM if it still runs."""
        if self.ended() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL if it still runs."""
        if self.ended() is None:
            os.kill(self.pid, signal.SIGKILL)

    def last_words(self, lines: int = 5) -> str:
        """The end of its log."""
        return "\n".join(map(printable, self.log_path.read_text(errors="replace").splitlines()[-lines:]))
