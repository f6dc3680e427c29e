"""What a comparison consists of, read from a TOML file."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ormo_runtime.logs import first_words
from ormo_runtime.settings import UsageError
from ormo_runtime.settings_loader import SettingsProblemsError, under_new_names
from ormo_server.core.method import PRESETS
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.sim.settings import SimSettings

# The comparison decides these for each cell.
_DECIDED = ("method", "workers", "learning_rate", "seed", "directory", "plots", "trace")


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("expected each of them once")
    return values


def _rising(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted(values))


def _preset(name: str) -> str:
    if name not in PRESETS:
        raise ValueError(f"{name!r} is not a method: choose from {', '.join(PRESETS)}")
    return name


def _undecided(simulation: dict[str, Any]) -> dict[str, Any]:
    for name in _DECIDED:
        if name in simulation:
            raise ValueError(f"{name} differs from cell to cell, so it can't be set here: leave it out")
    return simulation


Method = Annotated[str, AfterValidator(_preset)]
Methods = Annotated[tuple[Method, ...], Field(min_length=1), AfterValidator(_each_once)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rates = Annotated[tuple[Rate, ...], Field(min_length=1), AfterValidator(_each_once), AfterValidator(_rising)]
Momenta = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], ...], AfterValidator(_each_once), AfterValidator(_rising)
]
Seed = Annotated[int, Field(ge=0)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_each_once)]
Simulation = Annotated[dict[str, Any], AfterValidator(_undecided)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Cluster(_Table):
    """The machines that all methods are compared on."""

    setting: str = Field(pattern=r"^[a-z0-9-]+$", description="what the machines are like, such as heterogeneous")
    workers: int = Field(ge=1)
    methods: Methods | None = Field(None, description="instead of the suite's")
    learning_rates: Rates | None = Field(None, description="instead of the suite's, e.g. because K differs")
    simulation: Simulation = Field(
        {}, description="settings of `ormo-sim` that these cells have in addition to the suite's"
    )

    @property
    def name(self) -> str:
        """In paths and results."""
        return f"K{self.workers}-{self.setting}"


class Point(NamedTuple):
    """Where on the grid.

    Attributes:
        rate: η.
        momentum: β; None: it is the same everywhere.
    """

    rate: float
    momentum: float | None = None

    @property
    def total_move(self) -> float:
        """How far a push moves the parameters in the end, in multiples of itself: η/(1 − β); η where β is no choice."""
        return self.rate if self.momentum is None else float(f"{self.rate / (1.0 - self.momentum):.9g}")


@dataclass(frozen=True, slots=True)
class Cell:
    """One simulation.

    Attributes:
        cluster: name of the machines.
        method: a preset.
        learning_rate: η.
        seed: of the run.
        momentum: β; None: the suite's.
    """

    cluster: str
    method: str
    learning_rate: float
    seed: int
    momentum: float | None = None

    @property
    def point(self) -> Point:
        """Where on the grid it is."""
        return Point(self.learning_rate, self.momentum)

    @property
    def path(self) -> Path:
        """Where its results go, below the directory of all cells."""
        momentum = "" if self.momentum is None else f"-momentum-{self.momentum:g}"
        return Path(self.cluster, self.method, f"rate-{self.learning_rate:g}{momentum}-seed-{self.seed}")


def _each_in_suite(cluster: Cluster, methods: Methods) -> None:
    for method in cluster.methods or ():
        if method not in methods:
            raise ValueError(f"{cluster.name} has the method {method}, which is not among the suite's: add it there")


class Suite(_Table):
    """A comparison: every method on every cluster, at each rate of one grid, and again at its best rate."""

    name: str = Field(description="in commands and file names")
    title: str = Field(description="what is trained, for headings")
    methods: Methods
    drawn_methods: Methods | None = Field(None, description="those in the pictures of curves; none: all")
    clusters: tuple[Cluster, ...] = Field(min_length=1)
    learning_rates: Rates = Field(description="the grid: the same for every method; with momenta, of η/(1 - β)")
    momenta: Momenta = Field(
        (), description="β on the grid, for methods whose rule has a momentum; none: it is the simulation's"
    )
    widened: int = Field(
        0, ge=0, description="where the best is at an edge, go on beyond it, by factors of 2, this many times at most"
    )
    grid_seed: Seed = Field(0, description="of the runs on the grid, which decide on each method's rate")
    report_seeds: Seeds = Field((1, 2, 3), description="of the runs at that rate, which are reported")
    choice_evaluations: int = Field(
        1, ge=1, description="rates are compared by the mean train loss over this many last evaluations of each run"
    )
    measure: Literal["accuracy", "loss"] = Field(
        "accuracy", description="what the short table and the pictures show of the test set"
    )
    reference: str = Field("ormo", description="the method at whose rate all others are shown as well")
    repeat_at_reference_rate: bool = Field(False, description="with the reported seeds, not the grid's alone")
    target_train_loss: float = Field(gt=0, description="train loss for the 'gradients to loss' column")
    target_accuracy: float = Field(gt=0, le=1, description="test accuracy for the 'virtual s to' column")
    diverged_loss: float | None = Field(
        None,
        gt=0,
        description="a run that ends with this train loss or more counts as diverged (use the loss of random guessing)",
    )
    milestone_epochs: tuple[float, ...] = Field((), description="epochs at which η is multiplied; needs epoch_samples")
    epoch_samples: int | None = Field(None, ge=1, description="training samples, for milestone_epochs")
    simulation: Simulation = Field({}, description="settings of `ormo-sim` that all cells have")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _each_once(tuple(cluster.name for cluster in self.clusters))
        if self.grid_seed in self.report_seeds:
            raise ValueError(
                f"seed {self.grid_seed} chooses the rates, so it can't be reported as well: expected report_seeds "
                "without it"
            )
        if self.milestone_epochs and self.epoch_samples is None:
            raise ValueError("milestone_epochs needs epoch_samples, the number of training samples")
        for cluster in self.clusters:
            _each_in_suite(cluster, self.methods)
        if self.momenta and "momentum" in self.simulation:
            raise ValueError("momentum is on the grid, so it can't be set for all: leave out one of momenta and that")
        for cell in self.grid():
            self._check(cell)
        return self

    def _check(self, cell: Cell) -> None:
        try:
            settings = self.settings(cell)
        except ValidationError as error:
            raise ValueError(f"{cell.cluster}, {cell.method}: {first_problem(error)}") from None
        if not (settings.stop_after_gradients or settings.stop_after_samples or settings.epochs):
            raise ValueError(f"{cell.cluster} has no end: set stop_after_gradients or epochs among the simulation's")

    @cached_property
    def by_name(self) -> Mapping[str, Cluster]:
        """The clusters."""
        return {cluster.name: cluster for cluster in self.clusters}

    def rates(self, cluster: Cluster) -> tuple[float, ...]:
        """The grid on these machines, rising."""
        return cluster.learning_rates or self.learning_rates

    def methods_on(self, cluster: Cluster) -> tuple[str, ...]:
        """Those that are compared on these machines."""
        return cluster.methods or self.methods

    def groups(self) -> Iterator[tuple[Cluster, str]]:
        """Every cluster with every method that is compared on it."""
        return ((cluster, method) for cluster in self.clusters for method in self.methods_on(cluster))

    def grid(self) -> list[Cell]:
        """The cells that decide on the rates."""
        return [
            self.cell(cluster, method, point, self.grid_seed)
            for cluster, method in self.groups()
            for point in self.points(cluster, method)
        ]

    def points(self, cluster: Cluster, method: str) -> list[Point]:
        """The grid of a method on these machines."""
        return [self.point(move, beta) for beta in self._momenta_of(method) for move in self.rates(cluster)]

    def point(self, total_move: float, momentum: float | None) -> Point:
        """Where a push moves the parameters so far in the end."""
        # Rounded, as it names a directory.
        return Point(float(f"{total_move * (1.0 - (momentum or 0.0)):.9g}"), momentum)

    def cell(self, cluster: Cluster, method: str, point: Point, seed: int) -> Cell:
        """The run of a method on these machines at this point."""
        return Cell(cluster.name, method, point.rate, seed, point.momentum)

    def _momenta_of(self, method: str) -> tuple[float | None, ...]:
        if not self.momenta:
            return (None,)
        # Without momentum all rules are the same, up to rounding: `sgd` stands for them.
        has_momentum = "momentum" in UPDATE_RULES[PRESETS[method].rule].vectors_of_run
        return self.momenta if has_momentum else (0.0,)

    def settings(self, cell: Cell) -> SimSettings:
        """What to simulate for a cell."""
        cluster = self.by_name[cell.cluster]
        chosen = {
            "method": cell.method,
            "workers": cluster.workers,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "plots": False,
        }
        if cell.momentum is not None:
            chosen["momentum"] = cell.momentum
        settings = SimSettings(**(self.simulation | cluster.simulation | chosen))
        if not self.milestone_epochs:
            return settings
        assert self.epoch_samples is not None
        milestones = [round(epoch * self.epoch_samples / settings.batch_size) for epoch in self.milestone_epochs]
        told = settings.model_dump(include=settings.model_fields_set)
        return SimSettings(**(told | {"schedule": "milestones", "milestones": milestones}))

    def changed(self, changes: dict[str, Any]) -> "Suite":
        """The suite with other values.

        Raises:
            UsageError: they make no sense.
        """
        told = self.model_dump(include=self.model_fields_set)
        return _check_suite(told | changes, f"the suite {self.name}")


def load_suite(name: str) -> Suite:
    """The suite of that name among those that come with the package, or in that file.

    Raises:
        UsageError: there is none, or it can't be used.
    """
    known = packaged()
    if not name.endswith(".toml"):
        if name not in known:
            raise UsageError(f"there is no suite {name!r}: choose from {', '.join(known)}, or name a file FILE.toml")
        return _parse(known[name], name, f"the suite {name}")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the suite {name} can't be read: {error}") from error
    return _parse(text, Path(name).stem, f"the suite {name}")


def packaged() -> dict[str, str]:
    """The suites that come with the package: names and contents."""
    files = sorted(resources.files("ormo_server.sim").joinpath("suites").iterdir(), key=lambda file: file.name)
    return {Path(file.name).stem: file.read_text(encoding="utf-8") for file in files if file.name.endswith(".toml")}


def first_problem(error: ValidationError) -> str:
    """What is wrong, and where, in one sentence."""
    details = error.errors(include_url=False)[0]
    where = ".".join(map(str, details["loc"]))
    message = details["msg"].removeprefix("Value error, ")
    if not where:
        return message
    if details["type"] == "missing":
        return f"{where} is missing"
    if details["type"] == "extra_forbidden":
        return f"{where} is not a setting"
    return f"{where} is {details['input']!r}: {message[:1].lower()}{message[1:]}"


def _parse(text: str, name: str, what: str) -> Suite:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{what} is not valid TOML: {error}") from error
    if "name" in table:
        raise UsageError(f"{what}: the suite is named after the file: remove `name`")
    return _check_suite({"name": name, **_under_new_names(table, what)}, what)


def _under_new_names(table: dict[str, Any], what: str) -> dict[str, Any]:
    """The file with the settings of its simulations by their new names; a line on stderr for each old one."""
    sentences: dict[str, None] = {}

    def renamed(holder: Any) -> Any:
        if not isinstance(holder, dict) or not isinstance(holder.get("simulation"), dict):
            return holder  # which the suite's own checks are to complain of
        simulation, said = under_new_names(SimSettings, holder["simulation"], str, f"in {what}")
        sentences.update(dict.fromkeys(said))
        return holder | {"simulation": simulation}

    try:
        table = renamed(table)
        if isinstance(table.get("clusters"), list):
            table["clusters"] = [renamed(cluster) for cluster in table["clusters"]]
    except SettingsProblemsError as error:
        raise UsageError(error.problems[0]) from None
    for sentence in sentences:
        first_words("ormo-sim reproduce", sentence, "text")
    return table


def _check_suite(table: dict[str, Any], what: str) -> Suite:
    try:
        return Suite(**table)
    except ValidationError as error:
        raise UsageError(f"{what} can't be used: {first_problem(error)}") from error


def selected(what: str, wanted: Sequence[Any], there: Sequence[Any]) -> tuple[Any, ...]:
    """Those of a suite that were asked for, in the suite's order; all if none was.

    Raises:
        UsageError: one is not there.
    """
    missing = [value for value in wanted if value not in there]
    if missing:
        listed = ", ".join(map(str, dict.fromkeys(there)))
        raise UsageError(f"--{what} {missing[0]}: the suite does not have it: choose from {listed}")
    return tuple(value for value in there if not wanted or value in wanted)
