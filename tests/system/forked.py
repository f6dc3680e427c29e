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

import torch

_IMPORTED = [
    "ormo_server.cli",
    "ormo_server.console.status",
    "ormo_server.service.server",
    "ormo_server.sim.cli",
    "ormo_server.sim.plan",
    "ormo_worker.cli",
    "ormo_worker.evaluation",
    "ormo_worker.local.cli",
    "ormo_worker.tasks.digits",
    "ormo_worker.training",
    "torch._dynamo",  # by the first optimizer of a process, in more than a second
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(_IMPORTED)


class Forked:
    """`python -m MODULE ARGUMENTS`, or `python SCRIPT ARGUMENTS`, to be used like `subprocess.Popen`.

    What is to happen when an interpreter ends (`atexit`) does not.

    Args:
        program: the name of its module, or its script.
        arguments: after it.
        folder: where it runs.
        log: file to which its stderr is appended.
        environment: all of it.

    Attributes:
        pid: of the process.
        stdout: what it prints, as text.
    """

    def __init__(
        self, program: str | Path, arguments: Sequence[str], *, folder: Path, log: Path, environment: Mapping[str, str]
    ) -> None:
        self._words = [program, *arguments]
        ours, theirs = CONTEXT.Pipe(duplex=False)
        with ours, theirs:
            self._process = CONTEXT.Process(target=_run, args=(self._words, folder, log, dict(environment), theirs))
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


def ran(
    script: Path, *arguments: str, environment: Mapping[str, str] = os.environ, seconds: float = 60.0
) -> "subprocess.CompletedProcess[str]":
    """`python SCRIPT ARGUMENTS` in the script's folder, to its end."""
    log = script.with_suffix(".log")
    program = Forked(script, arguments, folder=script.parent, log=log, environment=environment)
    try:
        with program.stdout:
            printed = program.stdout.read()
        return subprocess.CompletedProcess([script, *arguments], program.wait(seconds), printed, log.read_text())
    finally:
        program.kill()


def _run(
    words: Sequence[str | Path], folder: Path, log: Path, environment: Mapping[str, str], stdout: Connection
) -> None:
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
    if "OMP_NUM_THREADS" in environment:  # else it has as many as when it was imported, which spin for one another
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    program, *arguments = words
    sys.argv = ["", *map(str, arguments)]
    if isinstance(program, Path):
        sys.path.insert(0, str(program.parent))
        runpy.run_path(str(program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
