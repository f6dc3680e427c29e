"""Cells of a comparison, each simulated once, several at a time in processes of their own."""

import contextlib
import json
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Self

import torch

from ormo_server.sim.plan import Plan
from ormo_server.sim.record import SUMMARY, Directory, as_written_now
from ormo_server.sim.settings import SimSettings

Jobs = Mapping[Path, SimSettings]


class ProcessKilled(Exception):
    """The process that simulated a cell came to no end of its own."""


def is_done(directory: Path, settings: SimSettings) -> bool:
    """Whether these results are there, of a simulation with these settings."""
    try:
        found = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    recorded = found.get("settings") if isinstance(found, dict) else None
    return isinstance(recorded, dict) and as_written_now(recorded) == settings.recorded()


def run_cell(directory: Path, settings: SimSettings, commit: str) -> None:
    """Simulate one cell, and write its results.

    Args:
        directory: for the results; without a summary as long as they are not complete.
        settings: of the simulation.
        commit: what the version of the code is called.
    """
    started = time.perf_counter()
    plan = Plan(settings)
    results = Directory(directory)
    with contextlib.closing(results):
        found = plan.run(results.write_row)
    made_by = {
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "wall_seconds": time.perf_counter() - started,
    }
    results.complete(found.record, {"settings": settings.recorded(), **found.summary, **made_by})


class Processes:
    """Processes that simulate cells and keep the data that they have read.

    As a context manager it ends them: at once if anything was raised, and a cell that is cut off has no summary.

    Args:
        count: how many.
        commit: what the version of the code is called.
    """

    def __init__(self, count: int, commit: str) -> None:
        self._count = count
        self._commit = commit
        self._pool: ProcessPoolExecutor | None = None
        self._others = set(multiprocessing.active_children())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()

    def run(self, jobs: Jobs, on_end: Callable[[Path, BaseException | None], None]) -> dict[Path, BaseException]:
        """Simulate cells, the longest first. One that fails leaves the others alone.

        Args:
            jobs: what to simulate, by the directory for the results.
            on_end: is told of each cell that is done, and of each that failed with what.

        Returns:
            What went wrong, by directory.
        """
        failures: dict[Path, BaseException] = {}
        remaining = dict(sorted(jobs.items(), key=lambda job: -job[1].stop_after_gradients))

        def end(directory: Path, error: BaseException | None) -> None:
            del remaining[directory]
            if error is not None:
                failures[directory] = error
            on_end(directory, error)

        waiting = len(remaining) + 1
        while 0 < len(remaining) < waiting:
            waiting = len(remaining)
            self._run_together(dict(remaining), end)
        # Processes were killed, say by want of memory, and whose fault it was is not known: one by one.
        for directory in list(remaining):
            self._run_together({directory: remaining[directory]}, end)
            if directory in remaining:
                end(directory, ProcessKilled("its process was killed: is there enough memory?"))
        return failures

    def _run_together(self, jobs: Jobs, end: Callable[[Path, BaseException | None], None]) -> None:
        """Tell of each cell that comes to its end; once a process is killed, no other does."""
        futures: dict[Future[None], Path] = {}
        try:
            self._submit(jobs, futures)
        except BrokenProcessPool:
            self._pool = None
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                self._pool = None
            else:
                end(futures[future], error)

    def _submit(self, jobs: Jobs, futures: dict[Future[None], Path]) -> None:
        # The processes start here. A Ctrl-C in a terminal goes to all of them; it is for this one to act on.
        with _interrupts_held_back():
            if self._pool is None:
                # torch's threads do not survive a fork.
                spawning = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(self._count, spawning, initializer=_end_with_parent)
            for directory, settings in jobs.items():
                futures[self._pool.submit(run_cell, directory, settings, self._commit)] = directory


def _end_with_parent() -> None:
    """Let this process not outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    # Processes that are started meanwhile never get one; here one that comes is not lost, as it would be if ignored.
    # The first of them would have multiprocessing start its tracker, which lets interrupts through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise `KeyboardInterrupt`, as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
