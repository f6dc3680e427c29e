"""A worker that is several processes: where each of them stands, and the program that starts them on one machine."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ormo_runtime.process import leave_if_asked

_LOG = logging.getLogger(__name__)
# Ours alone: where processes that `Processes` has started find one another. Others come by torchrun's variables.
_STORE = "_ORMO_RANKS_STORE"
_TORCHRUN = "TORCHELASTIC_RUN_ID"
_POLL_SECONDS = 0.1
# Rank 0 delivers what it has for up to 5 s, and then says good-bye; a rank that waits for a GPU sees no signal at all.
_LEAVE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Place:
    """Which of a worker's processes this one is.

    Attributes:
        rank: from 0 up; 0 speaks with the server.
        ranks: how many there are.
        local_rank: among those on this machine: which of its GPUs it takes.
        rendezvous: where they find one another, as `torch.distributed.init_process_group` is told.
    """

    rank: int
    ranks: int
    local_rank: int
    rendezvous: str

    @classmethod
    def found(cls, environment: Mapping[str, str]) -> "Place | None":
        """As torchrun, or `Processes`, has told it; None for a worker that is one process.

        `RANK` and its like alone mean nothing here: operators of clusters give them to workers that know nothing of
        each other, too.
        """
        store = environment.get(_STORE)
        if not store and _TORCHRUN not in environment:
            return None
        rank, ranks, local_rank = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return cls(rank, ranks, local_rank, store or "env://") if ranks > 1 else None


class Processes:
    """The ranks of one worker on this machine.

    Args:
        arguments: of `ormo-worker run`, for each of them.
        ranks: how many.
    """

    def __init__(self, arguments: Sequence[str], ranks: int) -> None:
        self._arguments = arguments
        self._ranks = ranks
        self._started: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """Start them, wait for their end, and return the exit code: that of the first which has failed, else 0.

        When one has failed, or a signal has come, the others are told to leave.
        """
        with tempfile.TemporaryDirectory(prefix="ormo-ranks-") as folder:
            try:
                for rank in range(self._ranks):
                    self._started.append(self._start(rank, Path(folder)))
                return self._wait()
            except KeyboardInterrupt:
                return self._interrupted()
            finally:
                for process in self._started:
                    process.kill()
                    process.communicate()

    def _start(self, rank: int, folder: Path) -> "subprocess.Popen[bytes]":
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self._ranks, "LOCAL_WORLD_SIZE": self._ranks}
        environment = os.environ | {name: str(number) for name, number in numbers.items()}
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "ormo_worker", "run", *self._arguments],
            env=environment | {_STORE: (folder / "store").as_uri()},
            stdin=subprocess.PIPE,  # nothing comes through it: it ends when this process does
            start_new_session=True,  # Ctrl-C reaches this process alone, which tells them
        )

    def _wait(self) -> int:
        while True:
            leave_if_asked()
            codes = [process.poll() for process in self._started]
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed:
                return self._end_others(failed[0], codes[failed[0]] or 0)
            if None not in codes:
                return 0
            time.sleep(_POLL_SECONDS)

    def _end_others(self, rank: int, code: int) -> int:
        how = f"with code {code}" if code > 0 else f"by signal {-code}"
        _LOG.error("rank %d of this worker's %d processes has ended %s: the others end, too", rank, self._ranks, how)
        self._stop()
        return code if code > 0 else 1

    def _interrupted(self) -> int:
        try:
            self._stop()
        except KeyboardInterrupt:  # a second signal: at once
            return 1
        # The others' connections may have ended before their signal came; that is no failure now.
        return 1 if self._started and self._started[0].returncode else 0

    def _stop(self) -> None:
        for process in self._started:
            process.send_signal(signal.SIGTERM)  # nothing happens to one that has ended
        deadline = time.monotonic() + _LEAVE_SECONDS
        while time.monotonic() < deadline and any(process.poll() is None for process in self._started):
            time.sleep(_POLL_SECONDS)


def end_with_parent() -> None:
    """In a process that `Processes` has started: leave when that program is gone, whatever has ended it."""
    if _STORE in os.environ:
        threading.Thread(target=_await_parents_end, name="ormo-parent", daemon=True).start()


def _await_parents_end() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
