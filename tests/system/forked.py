"""Programs as forks of one process that has imported all they need.

They are processes like any other, with their own environment, folder, streams and exit codes. Only the imports are
saved, which take three seconds of a core: most of what the tests of whole programs would cost.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

_IMPORTED = [
    "ormo_server.cli",
    "ormo_server.console.control",
    "ormo_server.console.status",
    "ormo_server.service.server",
    "ormo_worker.cli",
    "ormo_worker.evaluation",
    "ormo_worker.local.cli",
    "ormo_worker.tasks.digits",
    "ormo_worker.training",
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_IMPORTED)


class Forked:
    """`python -m MODULE ARGUMENTS`, to be used like `subprocess.Popen`.

    Args:
        module: of the program.
        arguments: after it.
        folder: where it runs.
        log: file to which its stderr is appended.
        environment: all of it.

    Attributes:
        pid: of the process.
        stdout: what it prints, as text.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], *, folder: Path, log: Path, environment: Mapping[str, str]
    ) -> None:
        self._words = [module, *arguments]
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        with ours, theirs:
            self._process = _CONTEXT.Process(target=_run, args=(self._words, folder, log, dict(environment), theirs))
            self._process.start()
            self.stdout = os.fdopen(os.dup(ours.fileno()), "r", encoding="utf-8")
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or the signal, less than 0, that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The same, when it has ended."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self._words, timeout)
        return code

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()


def _run(words: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str], stdout: Connection) -> None:
    """What happens in the process."""
    with log.open("ab") as stderr, Path(os.devnull).open("rb") as stdin:
        for number, stream in enumerate((stdin, stdout, stderr)):
            os.dup2(stream.fileno(), number)
    stdout.close()
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["", *words[1:]]
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
