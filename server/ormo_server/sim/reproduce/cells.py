"""Cells of a comparison, each simulated once, several at a time in processes of their own."""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from ormo_server.sim.config import SimSettings
from ormo_server.sim.record import SUMMARY, Directory
from ormo_server.sim.run import Plan

Jobs = Mapping[Path, SimSettings]


class ProcessKilled(Exception):
    """The process that simulated a cell came to no end of its own."""


def is_done(directory: Path, settings: SimSettings) -> bool:
    """Whether these results are there, of a simulation with these settings."""
    try:
        found = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("settings") == _written(settings)


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
    made_by = {"commit": commit, "torch": torch.__version__, "wall_seconds": time.perf_counter() - started}
    results.complete(found.record, {"settings": _written(settings), **found.summary, **made_by})


def _written(settings: SimSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude={"directory"})


def run_cells(
    jobs: Jobs, processes: int, commit: str, on_end: Callable[[Path, BaseException | None], None]
) -> dict[Path, BaseException]:
    """Simulate all cells, the longest first. One that fails leaves the others alone.

    Args:
        jobs: what to simulate, by the directory for the results.
        processes: how many at a time.
        commit: what the version of the code is called.
        on_end: is told of each cell that is done, and of each that failed with what.

    Returns:
        What went wrong, by directory.
    """
    failures: dict[Path, BaseException] = {}
    remaining = dict(sorted(jobs.items(), key=lambda job: -job[1].stop_after_gradients))

    def run_together(directories: Sequence[Path], processes: int) -> None:
        together = {each: remaining[each] for each in directories}
        with contextlib.closing(_outcomes(together, processes, commit)) as outcomes:
            for directory, error in outcomes:
                del remaining[directory]
                if error is not None:
                    failures[directory] = error
                on_end(directory, error)

    waiting = len(remaining) + 1
    while 0 < len(remaining) < waiting:
        waiting = len(remaining)
        run_together(list(remaining), processes)
    # Processes were killed, say by want of memory, and whose fault it was is not known: one by one.
    for directory in list(remaining):
        run_together([directory], 1)
        if directory in remaining:
            failures[directory] = ProcessKilled("its process was killed: is there enough memory?")
            on_end(directory, failures[directory])
    return failures


def _outcomes(jobs: Jobs, processes: int, commit: str) -> Generator[tuple[Path, BaseException | None], None, None]:
    """Each cell as it ends, and what went wrong with it. Once a process is killed, all other cells are missing."""
    with _pool(min(processes, len(jobs))) as pool:
        futures = _submit(pool, jobs, commit)
        for future in as_completed(futures):
            error = future.exception()
            if not isinstance(error, BrokenProcessPool):
                yield futures[future], error


def _submit(pool: ProcessPoolExecutor, jobs: Jobs, commit: str) -> dict[Future[None], Path]:
    # The processes start here. A Ctrl-C in a terminal goes to all of them; it is for this one to act on.
    with _ignoring_interrupts():
        return {pool.submit(run_cell, directory, settings, commit): directory for directory, settings in jobs.items()}


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are ended at once if anything is raised; a cell that is cut off has no summary."""
    # torch's threads do not survive a fork.
    spawning = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, spawning, initializer=_end_with_parent)
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise


def _end_with_parent() -> None:
    """Let this process not outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise `KeyboardInterrupt`, as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
