"""Pictures of finished simulations, and of runs: accuracy and loss against data and time, and delays."""

import io
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter
from PIL import Image
from pydantic import Field

from ormo_runtime.settings import Settings, UsageError
from ormo_runtime.settings_loader import load_settings
from ormo_server.sim.measured import MeasuredRun, is_measured, read_measured
from ormo_server.sim.record import FinishedRun, Row, read_run

DrawnRun: TypeAlias = FinishedRun | MeasuredRun
Quantities: TypeAlias = tuple[tuple[str, Callable[[Row], float]], ...]
Numbers = npt.NDArray[np.float64]

CURVES, DELAYS = "curves.png", "delays.png"
_DOTS_PER_INCH = 100
_WIDTH_INCHES = 10.0
# Delays go up to hundreds; more bars than this are not told apart.
_LARGEST_BAR_COUNT = 60
_LEGEND_CHARACTERS = 120
# Clocks that differ by more than this make a linear axis unreadable.
_LARGEST_LINEAR_RATIO = 4.0
# A palette makes the files three times smaller, and fewer colours would show in the bands.
_COLORS = 192
_OF_METHOD = ("method", "update_rule", "step_scale", "delay_threshold", "scheduler", "staleness_bound", "discard_delay")
_IGNORED_DIFFERENCES = frozenset((*_OF_METHOD, "seed", "directory", "plots", "target_accuracy"))


class Style(NamedTuple):
    """How a method's line looks."""

    color: str
    dashes: str | tuple[int, tuple[float, ...]] = "solid"


_DASHED, _DOTTED = (0, (5, 1.5)), (0, (1, 1.2))
_DASH_DOTTED, _DASH_DOT_DOTTED = (0, (6, 1.2, 1, 1.2)), (0, (6, 1.2, 1, 1.2, 1, 1.2))
# Colours that color-blind people tell apart (Okabe and Ito; the last one Tol's), relatives by dashes. A method looks
# the same in every picture.
STYLES = {
    "ormo": Style("#0072B2"),
    "ormo-da": Style("#0072B2", _DASHED),
    "ormo-vanilla": Style("#56B4E9"),
    "asgd": Style("#E69F00"),
    "asgd-da": Style("#E69F00", _DASHED),
    "asgd-tau": Style("#E69F00", _DOTTED),
    "asgdm": Style("#D55E00"),
    "shifted": Style("#CC79A7"),
    "smega2": Style("#009E73"),
    "ssgdm": Style("#000000"),
    "ssgd": Style("#000000", _DASHED),
    "ringmaster": Style("#999999"),
    "rescaled": Style("#999999", _DASHED),
    "dc-asgd": Style("#882255"),
    "ormo-nesterov": Style("#0072B2", _DOTTED),
    "fadas": Style("#F0E442"),
    "local-ormo": Style("#0072B2", _DASH_DOTTED),
    "local-ormo-polyak": Style("#56B4E9", _DASHED),
    "diloco": Style("#000000", _DASH_DOTTED),
    "local-sgd": Style("#E69F00", _DASH_DOTTED),
    "local-sgd-poly": Style("#E69F00", _DASH_DOT_DOTTED),
    "naive-nesterov": Style("#D55E00", _DASHED),
    "delayed-nesterov": Style("#009E73", _DASHED),
}
_OTHER_STYLES = tuple(
    Style(color, dashes)
    for dashes in ("dashdot", (0, (3, 1, 1, 1, 1, 1)), _DOTTED)
    for color in ("#332288", "#117733", "#AA4499", "#999933", "#000000")
)


@dataclass(frozen=True, slots=True)
class Line:
    """What is drawn as one line: the mean of runs that differ in nothing but their seed.

    Attributes:
        label: in the legend.
        style: of the line.
        runs: at least one.
    """

    label: str
    style: Style
    runs: tuple[DrawnRun, ...]

    @property
    def method(self) -> str:
        """What the runs train by."""
        return self.runs[0].method


@dataclass(frozen=True, slots=True)
class Curve:
    """The mean of several runs over the evaluations that all of them have, up to the first that is not finite.

    Attributes:
        x, mean: shape (evaluations,).
        low, high: the mean ± a sample's deviation, but no further down than the lowest run (a loss is not below 0); as
            the mean for a single run.
    """

    x: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers


class PlotSettings(Settings):
    """Draw finished simulations, or runs of ormo-local: those that differ only in their seed become one line."""

    flags_only: ClassVar[frozenset[str]] = frozenset({"runs", "directory"})
    renamed: ClassVar[Mapping[str, str]] = {"into": "directory"}  # which is a file for `ormo-sim reproduce`

    runs: tuple[Path, ...] = Field(
        title="Input and output", description="directories of finished simulations, or of runs of `ormo-local`"
    )
    directory: Path = Field(description="directory for the pictures")


def plot(argv: Sequence[str]) -> int:
    """The command `ormo-sim plot`."""
    settings = load_settings(PlotSettings, argv, program="ormo-sim plot")
    for path in draw(settings.runs, settings.directory):
        print(path)  # noqa: T201 - what the command is for
    return 0


def draw(runs: Sequence[Path], into: Path) -> list[Path]:
    """Draw finished simulations, or runs.

    Args:
        runs: their directories, at least one.
        into: directory for the pictures, made if it is missing.

    Returns:
        The pictures' paths.

    Raises:
        UsageError: a directory holds no finished simulation, or some hold simulations and others runs.
        OSError: a picture can't be written.
    """
    if not runs:
        raise UsageError("no run was given: name the directory of a finished simulation, or several")
    kinds = {is_measured(path) for path in runs}
    if len(kinds) > 1:
        raise UsageError("simulations and runs of ormo-local have other clocks: draw them into two directories")
    found: list[DrawnRun] = [read_measured(path) if kinds == {True} else read_run(path) for path in runs]
    settings = [run.settings for run in found]
    title = ", ".join(
        describe(name, settings[0].get(name))
        for name in ("task", "workers", "slow")
        if settings[0].get(name) and len({repr(each.get(name)) for each in settings}) == 1
    )
    lines = lines_of(found)
    if kinds == {True}:
        drawn = draw_curves(lines, into / CURVES, title, _MEASURES_OF_RUNS, _CLOCKS_OF_RUNS)
    else:
        by_loss = all(each.get("local_steps") for each in settings)
        drawn = (draw_losses if by_loss else draw_curves)(lines, into / CURVES, title)
    delays = [draw_delays(lines, into / DELAYS, title)] if any(run.delays for run in found) else []
    return [drawn, *delays]


def lines_of(runs: Sequence[DrawnRun]) -> list[Line]:
    """A line for each set of runs that differ in nothing but their seed; labels say what else differs."""
    every = [run.settings for run in runs]
    names = [name for name in every[0] if name not in _IGNORED_DIFFERENCES]
    differing = [name for name in names if len({repr(settings.get(name)) for settings in every}) > 1]
    groups: dict[str, list[DrawnRun]] = {}
    for run, settings in zip(runs, every, strict=True):
        label = ", ".join((run.method, *(describe(name, settings.get(name)) for name in differing)))
        if isinstance(run, MeasuredRun) and len(runs) > 1:  # each was evaluated at moments of its own: there is no mean
            label += f", {run.path.name}"
        groups.setdefault(label, []).append(run)
    others = cycle(_OTHER_STYLES)
    used: set[Style] = set()
    lines = []
    for label, group in groups.items():
        style = STYLES.get(group[0].method)
        if style is None or style in used:
            style = next(others)
        used.add(style)
        lines.append(Line(label, style, tuple(group)))
    return lines


def describe(name: str, value: Any) -> str:
    """A setting in words."""
    match name:
        case "task":
            return str(value)
        case "workers":
            return f"{value} workers"
        case "slow":
            return f"slow {value}" if value else "none slow"
        case "learning_rate":
            return f"η {value:g}"
    return f"{name.replace('_', ' ')} {value}"


_MEASURES: Quantities = (
    ("test accuracy", lambda row: row.test_accuracy),
    ("train loss", lambda row: row.train_loss),
)
_CLOCKS: Quantities = (
    ("epochs (passes over the training data)", lambda row: row.epochs),
    ("virtual time in seconds", lambda row: row.seconds),
)
_MEASURES_OF_RUNS: Quantities = (
    ("test accuracy", lambda row: row.test_accuracy),
    ("test loss", lambda row: row.test_loss),
)
_CLOCKS_OF_RUNS: Quantities = (
    ("samples", lambda row: row.samples),
    ("time in seconds", lambda row: row.seconds),
)


def draw_curves(
    lines: Sequence[Line], path: Path, title: str, measures: Quantities = _MEASURES, clocks: Quantities = _CLOCKS
) -> Path:
    """Test accuracy and loss against data and time, with ± deviation over seeds."""
    figure, grid = _figure(7.5, title, rows=2, columns=2)
    for panels, (measure, y) in zip(grid, measures, strict=True):
        for axes, (clock, x) in zip(panels, clocks, strict=True):
            curves = [average(line.runs, x, y) for line in lines]
            for line, curve in zip(lines, curves, strict=True):
                _draw_curve(axes, line, curve)
            axes.set(xlabel=clock, ylabel=measure)
            _scale_clock(axes, curves)
            if measure.endswith("loss"):
                _scale_loss(axes, curves)
            else:
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(figure, grid[0][0])
    return _save(figure, path)


def draw_losses(lines: Sequence[Line], path: Path, title: str) -> Path:
    """Test loss against samples, bytes and virtual time, with ± deviation over seeds."""
    figure, grid = _figure(4.5, title, columns=3)
    clocks: Quantities = (
        ("epochs (passes over the training data)", lambda row: row.epochs),
        ("bytes moved, in MB", lambda row: row.bytes_moved / 1e6),
        ("virtual time in seconds", lambda row: row.seconds),
    )
    for axes, (clock, x) in zip(grid[0], clocks, strict=True):
        curves = [average(line.runs, x, lambda row: row.test_loss) for line in lines]
        for line, curve in zip(lines, curves, strict=True):
            _draw_curve(axes, line, curve)
        axes.set(xlabel=clock, ylabel="test loss")
        _scale_clock(axes, curves)
        _cut_off_divergence(axes, curves)
    _legend(figure, grid[0][0])
    return _save(figure, path)


def average(runs: Sequence[DrawnRun], x: Callable[[Row], float], y: Callable[[Row], float]) -> Curve:
    """The mean curve of runs that were evaluated after the same numbers of gradients."""
    rows = [{row.gradients: row for row in run.rows} for run in runs]
    common = sorted(set(rows[0]).intersection(*rows[1:]))
    values = np.array([[y(of_run[gradients]) for gradients in common] for of_run in rows])
    clocks = np.array([[x(of_run[gradients]) for gradients in common] for of_run in rows])
    broken = ~np.isfinite(values).all(axis=0)
    end = int(broken.argmax()) if broken.any() else len(common)
    values, clocks = values[:, :end], clocks[:, :end]
    mean = values.mean(axis=0)
    deviation = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(end)
    low = np.maximum(mean - deviation, values.min(axis=0))
    return Curve(clocks.mean(axis=0), mean, low, mean + deviation)


def _draw_curve(axes: Axes, line: Line, curve: Curve) -> None:
    color, dashes = line.style
    axes.plot(curve.x, curve.mean, color=color, linestyle=dashes, linewidth=1.6, label=line.label)
    if len(line.runs) > 1:
        axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)


def _scale_clock(axes: Axes, curves: Sequence[Curve]) -> None:
    ends = [float(curve.x[-1]) for curve in curves if len(curve.x) and curve.x[-1] > 0]
    if ends and max(ends) > _LARGEST_LINEAR_RATIO * min(ends):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    else:
        axes.set_xlim(left=0)


def _scale_loss(axes: Axes, curves: Sequence[Curve]) -> None:
    drawn = [curve.mean for curve in curves if len(curve.mean)]
    lowest = min((float(losses.min()) for losses in drawn), default=0.0)
    if lowest <= 0:
        return
    axes.set_yscale("log")
    _cut_off_divergence(axes, curves, below=0.8, above=3.0)


def _cut_off_divergence(axes: Axes, curves: Sequence[Curve], *, below: float = 0.98, above: float = 1.1) -> None:
    """Let lines that diverge leave at the top, instead of pressing all others together."""
    drawn = [curve.mean for curve in curves if len(curve.mean)]
    if drawn:
        lowest, start = min(float(losses.min()) for losses in drawn), float(np.median([losses[0] for losses in drawn]))
        axes.set_ylim(below * lowest, min(axes.get_ylim()[1], above * start))


def draw_delays(lines: Sequence[Line], path: Path, title: str) -> Path:
    """How many gradients of a run were applied with each delay; methods with the same delays share a line."""
    figure, grid = _figure(4.5, title)
    axes = grid[0][0]
    largest = max((delay for line in lines for run in line.runs for delay in run.delays), default=0)
    width = math.ceil((largest + 1) / _LARGEST_BAR_COUNT)
    edges: Numbers = np.arange(0, largest + 1 + width, width, dtype=np.float64) - 0.5
    shared: dict[bytes, list[Line]] = {}
    for line in lines:
        shared.setdefault(_heights(line, edges).tobytes(), []).append(line)
    lines_of_method = Counter(line.method for line in lines)
    for alike in shared.values():
        color, dashes = alike[0].style
        names = [line.method if lines_of_method[line.method] == 1 else line.label for line in alike]
        label = textwrap.fill(", ".join(names), _LEGEND_CHARACTERS, break_on_hyphens=False)
        axes.stairs(_heights(alike[0], edges), edges, color=color, linestyle=dashes, linewidth=1.6, label=label)
    axes.set_yscale("log", nonpositive="clip")
    axes.set(xlabel=f"delay τ in gradients (bars of {width})", ylabel="gradients per run")
    axes.set_xlim(left=-0.5)
    _legend(figure, axes)
    return _save(figure, path)


def _heights(line: Line, edges: Numbers) -> Numbers:
    total = np.zeros(len(edges) - 1)
    for run in line.runs:
        total += np.histogram(list(run.delays), bins=edges, weights=list(run.delays.values()))[0]
    return total / len(line.runs)


def _figure(height_inches: float, title: str, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    # Without pyplot there is no global state, and nothing to close.
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), dpi=_DOTS_PER_INCH, layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.grid(visible=True, which="major", linewidth=0.5, alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max((len(line) for label in labels for line in label.split("\n")), default=1)
    columns = max(1, min(7, len(labels), _LEGEND_CHARACTERS // (longest + 8)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3)


def _save(figure: Figure, path: Path) -> Path:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(_COLORS, dither=Image.Dither.NONE)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    picture.save(aside, format="png", optimize=True)
    aside.replace(path)
    return path
