"""The settings of `ormo-sim reproduce`, and what they leave of a suite."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ormo_runtime.settings import Settings, UsageError
from ormo_server.sim.reproduce.suite import Suite, load_suite, packaged, selected


class ReproduceSettings(Settings):
    """Compare methods over workers, settings, learning rates and seeds; started again, it goes on where it was."""

    # What it writes to: for `ormo-server serve` ORMO_DIRECTORY has the run's checkpoints.
    flags_only: ClassVar[frozenset[str]] = frozenset({"directory", "into"})

    suite: str = Field(description=f"what to compare: {', '.join(f'`{name}`' for name in packaged())}, or a TOML file")
    processes: int = Field(0, ge=0, description="simulations at a time, one thread each; 0: as many as there are cores")
    directory: Path | None = Field(None, description="for all results; none: `runs/reproduce-SUITE`")
    into: Path | None = Field(
        None, description="a file such as docs/results.md that shows the table between two markers"
    )
    data_dir: Path | None = Field(None, description="folder with the task's data, for tasks that need one")
    device: str | None = Field(None, description="instead of the suite's: cpu, cuda or cuda:N")
    methods: tuple[str, ...] = Field((), description="only these of the suite's")
    workers: tuple[int, ...] = Field((), description="only these numbers of workers of the suite's")
    setting: tuple[str, ...] = Field((), description="only these of the suite's settings, such as `homogeneous`")
    learning_rates: tuple[float, ...] = Field((), description="the grid, instead of the suite's")
    seeds: tuple[int, ...] = Field((), description="to report on, instead of the suite's")
    gradients: int = Field(0, ge=0, description="in every run, instead of the suite's; 0: the suite's")
    commit: str = Field("", description="what to call this version of the code; none: as git says")


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
    return [{**each.model_dump(), **own_grid, "simulation": each.simulation | changes} for each in clusters]
