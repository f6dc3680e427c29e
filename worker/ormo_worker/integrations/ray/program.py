"""The actors: one that runs a program of ours, and one that keeps how many workers are wanted."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import ray

# How a program starts: it first asks the system for a SIGTERM should its parent die, however that happens, and then
# becomes the program that is meant. Else a worker would go on where Ray has given its GPU to somebody else.
_LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        code: its exit code; below 0 the signal that killed it.
        last_words: the last line that it wrote.
    """

    code: int
    last_words: str = ""


class Program:
    """A program of ours as the child of an actor, whose output is the actor's.

    A process of its own, for it has signals, exit codes and threads to itself, as it has everywhere else. The actor
    takes two calls at a time: `run` lasts as long as the program, and others come meanwhile.

    Args:
        name: what the log calls it.
        module: that Python runs.
        arguments: the words after it.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str]) -> None:
        self._name = name
        self._words = [module, *arguments]
        self._child: subprocess.Popen[str] | None = None
        self._asked = False

    def __repr__(self) -> str:
        return self._name  # stands before each line that Ray shows of it

    def run(self) -> Ended:
        """Start it and wait for its end; Ray calls this again where an actor comes to life again."""
        parent = str(os.getpid())
        command = [sys.executable, "-c", _LAUNCH, parent, "-m", *self._words]
        said = ""
        # A session of its own: a Ctrl-C at a terminal reaches `ormo-ray` alone, which stops all in order.
        with subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            encoding="utf-8",
            errors="replace",
        ) as child:
            self._child = child
            if self._asked:
                child.terminate()
            assert child.stdout is not None
            for line in child.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                said = line.strip() or said
        return Ended(child.returncode, said)

    def stop(self) -> None:
        """Have it leave as on SIGTERM: `run` returns when it has."""
        self._asked = True
        if self._child is not None:
            self._child.terminate()

    def address(self) -> str:
        """The node that it is on: an answer comes once, and as long as, it is on any."""
        node: str = ray.util.get_node_ip_address()
        return node


class Wanted:
    """How many workers a run shall have, where `ormo-ray scale` finds it."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def workers(self) -> int:
        """The number."""
        return self._workers

    def change(self, workers: int) -> int:
        """Set it; returns what it was."""
        before, self._workers = self._workers, workers
        return before
