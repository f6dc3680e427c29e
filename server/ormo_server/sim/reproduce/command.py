"""The command `ormo-sim reproduce`: its settings, what they leave of a suite, and what is run."""

import contextlib
import os
import shlex
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ormo_runtime.logs import printable
from ormo_runtime.settings import Settings, UsageError
from ormo_runtime.settings_loader import load_settings
from ormo_server.sim.record import FinishedRun, read_run
from ormo_server.sim.reproduce import report
from ormo_server.sim.reproduce.cells import Jobs, Processes, interrupted_by_sigterm, is_done
from ormo_server.sim.reproduce.comparison import Comparison
from ormo_server.sim.reproduce.report import Origin, compact_report, draw_clusters, full_report, results_csv
from ormo_server.sim.reproduce.suite import Cell, Cluster, Suite, load_suite, packaged, selected
from ormo_server.sim.settings import SimSettings
from ormo_server.store.files import DirectoryLock, StoreError

CELLS, RESULTS, TABLE, FIGURES, FAILURES = "cells", "results.csv", "table.md", "figures", "failures.txt"
_SOME_FAILED_EXIT_CODE = 1
_PROGRAM = "ormo-sim reproduce"
# Cells take minutes: the time left comes from all of them, not from the last half minute.
_SPEED_SECONDS = 3600.0


def reproduce(argv: Sequence[str]) -> int:
    """Run what a suite says, and show what came of it.

    Returns:
        0; 1 if a simulation failed.

    Raises:
        UsageError: the suite, a choice from it, the markers or the data are not right.
        KeyboardInterrupt: on Ctrl-C and SIGTERM; what is complete stays.
    """
    settings = load_settings(ReproduceSettings, argv, program=_PROGRAM)
    suite = chosen(settings)
    if settings.into is not None:
        report.check(settings.into, suite.name)
    directory = settings.directory or Path("runs", f"reproduce-{suite.name}")
    processes = settings.processes or os.cpu_count() or 1
    with _held(directory), interrupted_by_sigterm():
        reproduction = Reproduction(suite, directory, processes, settings.commit or _commit())
        try:
            comparison = reproduction.compare()
        except KeyboardInterrupt:
            reproduction.console.print("interrupted: run the same command again to resume")
            raise
        reproduction.report(comparison, shlex.join([*_PROGRAM.split(), *argv]), settings.into)
    return _SOME_FAILED_EXIT_CODE if reproduction.failures else 0


class Reproduction:
    """One comparison, from its suite to its tables and pictures.

    Args:
        suite: what to compare.
        directory: for all results.
        processes: how many simulations at a time.
        commit: what the version of the code is called.
    """

    def __init__(self, suite: Suite, directory: Path, processes: int, commit: str) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.failures: dict[Path, BaseException] = {}
        self._suite = suite
        self._directory = directory
        self._processes = processes
        self._commit = commit
        self._runs: dict[Cell, FinishedRun] = {}
        self._tried: set[Cell] = set()

    def compare(self) -> Comparison:
        """Run the grid, go on beyond its edges as far as the suite says, then run the best rates with new seeds.

        Raises:
            UsageError: no cell of the grid could run.
        """
        comparison = Comparison(self._suite, self._runs)
        with Processes(self._processes, self._commit) as processes:
            self._run("grid", self._suite.grid(), processes)
            if not self._runs:
                raise UsageError(f"none of the simulations could run; the first: {next(iter(self.failures.values()))}")
            while beyond := [cell for cell in comparison.cells_beyond_edges() if cell not in self._tried]:
                self._run("beyond the grid's edges", beyond, processes)
            self._run("best rates", comparison.report_cells(), processes)
        return comparison

    def _run(self, phase: str, cells: Sequence[Cell], processes: Processes) -> None:
        self._tried.update(cells)
        directories = {cell: self._directory / CELLS / cell.path for cell in cells}
        jobs = {}
        for cell, directory in directories.items():
            settings = self._suite.settings(cell)
            if _finished(directory, settings) is None:
                jobs[directory] = settings
        self.console.print(f"{phase}: {len(cells)} simulations, {len(cells) - len(jobs)} of them done before")
        with self._progress(phase, jobs) as on_end:
            self.failures |= processes.run(jobs, on_end)
        failed = self.failures.keys()
        self._runs |= {cell: read_run(path) for cell, path in directories.items() if path not in failed}

    @contextlib.contextmanager
    def _progress(self, phase: str, jobs: Jobs) -> Iterator[Callable[[Path, BaseException | None], None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]} of {task.fields[cells]} done, {task.fields[failed]} failed"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        sizes = {directory: settings.stop_after_gradients or 1 for directory, settings in jobs.items()}
        done, failed = 0, 0
        with Progress(*columns, console=self.console, transient=True, speed_estimate_period=_SPEED_SECONDS) as progress:
            task = progress.add_task(phase, total=sum(sizes.values()), cells=len(jobs), done=0, failed=0)

            def on_end(directory: Path, error: BaseException | None) -> None:
                nonlocal done, failed
                done, failed = done + (error is None), failed + (error is not None)
                progress.update(task, advance=sizes[directory], done=done, failed=failed)
                name = directory.relative_to(self._directory / CELLS)
                if error is not None:
                    self.console.print(f"{name} failed: {type(error).__name__}: {printable(error)}", markup=False)
                elif not self.console.is_terminal:
                    self.console.print(f"{done + failed} of {len(jobs)}: {name}")

            yield on_end

    def report(self, comparison: Comparison, command: str, into: Path | None) -> None:
        """Write tables and pictures, and say where they are."""
        origin = Origin(command, len(self.failures))
        directory = self._directory
        _write(directory / RESULTS, results_csv(comparison))
        _write(directory / TABLE, full_report(comparison, origin))
        draw_clusters(comparison, directory / FIGURES)
        if into is not None:
            report.insert(into, self._suite.name, compact_report(comparison, origin))
        self._report_failures()
        for entry in comparison.entries():
            if entry.at_edge:
                where = f"{entry.cluster.name}, {entry.method}"
                self.console.print(f"{where}: the best rate, {entry.rate:g}, is at an edge of the grid")
        self.console.print(f"results: {directory / TABLE}, {directory / RESULTS}, {directory / FIGURES}")

    def _report_failures(self) -> None:
        path = self._directory / FAILURES
        if not self.failures:
            path.unlink(missing_ok=True)
            return
        texts = [f"{where}\n{''.join(traceback.format_exception(error))}" for where, error in self.failures.items()]
        _write(path, "\n".join(texts))
        self.console.print(f"{len(self.failures)} simulations failed: see {path}")


def _finished(directory: Path, settings: SimSettings) -> FinishedRun | None:
    if not is_done(directory, settings):
        return None
    try:
        return read_run(directory)
    except UsageError:
        return None


def _write(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    try:
        lock = DirectoryLock(directory)
    except StoreError as error:
        raise UsageError(str(error)) from error
    try:
        yield
    finally:
        lock.release()


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - nothing of it is input
    return found.stdout.strip() or "unknown"


class ReproduceSettings(Settings):
    """Compare methods over workers, settings, learning rates and seeds; started again, it resumes where it was."""

    # What it writes to: for `ormo-server serve` ORMO_DIRECTORY has the run's checkpoints.
    flags_only: ClassVar[frozenset[str]] = frozenset({"directory", "into"})

    suite: str = Field(
        title="What is compared",
        description=f"what to compare: {', '.join(f'`{name}`' for name in packaged())}, or a TOML file",
    )
    methods: tuple[str, ...] = Field((), description="only these of the suite's")
    workers: tuple[int, ...] = Field((), description="only these numbers of workers of the suite's")
    setting: tuple[str, ...] = Field((), description="only these of the suite's settings, such as `homogeneous`")
    learning_rates: tuple[float, ...] = Field((), description="the grid, instead of the suite's")
    seeds: tuple[int, ...] = Field((), description="to report on, instead of the suite's")
    gradients: int = Field(0, ge=0, description="in every run, instead of the suite's; 0: the suite's")

    data_dir: Path | None = Field(
        None, title="How it is computed", description="folder with the task's data, for tasks that need one"
    )
    device: str | None = Field(None, description="instead of the suite's: cpu, cuda or cuda:N")
    processes: int = Field(0, ge=0, description="simulations at a time, one thread each; 0: as many as there are cores")

    directory: Path | None = Field(None, title="Output", description="for all results; none: `runs/reproduce-SUITE`")
    into: Path | None = Field(
        None, description="a file such as docs/results.md that shows the table between two markers"
    )
    commit: str = Field("", description="label for this code version; none: git's commit")


def chosen(settings: ReproduceSettings) -> Suite:
    """The suite with what the command line says.

    Raises:
        UsageError: there is no such suite, or it lacks what was chosen from it.
    """
    suite = load_suite(settings.suite)
    methods = selected("methods", settings.methods, suite.methods)
    changes: dict[str, Any] = {"methods": methods, "clusters": _chosen_clusters(settings, suite)}
    if suite.drawn_methods is not None:
        changes["drawn_methods"] = tuple(name for name in suite.drawn_methods if name in methods) or None
    if settings.seeds:
        changes["report_seeds"] = settings.seeds
    if settings.learning_rates:
        changes["learning_rates"] = settings.learning_rates
    return suite.changed(changes)


def _chosen_clusters(settings: ReproduceSettings, suite: Suite) -> list[dict[str, Any]]:
    workers = selected("workers", settings.workers, [cluster.workers for cluster in suite.clusters])
    kinds = selected("setting", settings.setting, [cluster.setting for cluster in suite.clusters])
    clusters = [cluster for cluster in suite.clusters if cluster.workers in workers and cluster.setting in kinds]
    if not clusters:
        raise UsageError(f"the suite {suite.name} has no machines that match both --workers and --setting")
    changes: dict[str, Any] = {}
    if settings.data_dir is not None:
        # Results are found again from any directory.
        changes["data_dir"] = str(settings.data_dir.absolute())
    if settings.device is not None:
        changes["device"] = settings.device
    if settings.gradients:
        changes |= {"stop_after_gradients": settings.gradients, "stop_after_samples": 0, "epochs": None}
    own_grid = {"learning_rates": None} if settings.learning_rates else {}
    methods = selected("methods", settings.methods, suite.methods)
    return [
        {**each.model_dump(), **own_grid, **_own_methods(each, methods), "simulation": each.simulation | changes}
        for each in clusters
        if each.methods is None or set(each.methods) & set(methods)
    ]


def _own_methods(cluster: Cluster, chosen: Sequence[str]) -> dict[str, Any]:
    if cluster.methods is None:
        return {}
    return {"methods": tuple(method for method in cluster.methods if method in chosen)}
