"""The results of a comparison: as Markdown between two markers of a text file, as pictures, and every cell as CSV."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ormo_runtime.settings import UsageError
from ormo_server.sim.plots import STYLES, Line, draw_curves, draw_delays
from ormo_server.sim.record import FinishedRun
from ormo_server.sim.reproduce.comparison import Comparison, Entry, Group, Spread
from ormo_server.sim.reproduce.suite import Cell, Cluster, Suite


def draw_clusters(comparison: Comparison, into: Path) -> list[Path]:
    """Draw every cluster; returns the pictures' paths."""
    suite, entries = comparison.suite, comparison.entries()
    pictures = []
    for cluster in suite.clusters:
        lines = _lines([entry for entry in entries if entry.cluster is cluster])
        drawn = [line for line in lines if line.method in (suite.drawn_methods or suite.methods)]
        title = f"{suite.title}: {cluster.workers} workers, {cluster.setting}"
        if drawn:
            pictures.append(draw_curves(drawn, into / f"curves-{cluster.name}.png", title))
        if lines:
            pictures.append(draw_delays(lines, into / f"delays-{cluster.name}.png", title))
    return pictures


def _lines(entries: Sequence[Entry]) -> list[Line]:
    return [
        Line(f"{entry.method}, η {entry.rate:g}", STYLES[entry.method], entry.best.runs)
        for entry in entries
        if entry.best.runs
    ]


_NOTHING = "–"
_EDGE = "†"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where results come from.

    Attributes:
        command: that makes them again.
        failed: how many cells failed.
    """

    command: str
    failed: int


def results_csv(comparison: Comparison) -> str:
    """Every cell, those on the grid included."""
    rows = [_csv_row(comparison, cell, run) for cell, run in comparison.runs.items()]
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _csv_row(comparison: Comparison, cell: Cell, run: FinishedRun) -> dict[str, object]:
    suite, summary = comparison.suite, run.summary
    cluster = suite.by_name[cell.cluster]
    is_best = cell.learning_rate == comparison.best_rate(cluster, cell.method)
    reported = "report" if is_best else "reference"
    return {
        "workers": cluster.workers,
        "setting": cluster.setting,
        "method": cell.method,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "purpose": "grid" if cell.seed == suite.grid_seed else reported,
        "diverged": comparison.has_diverged(run),
        "gradients": summary.gradients,
        "epochs": summary.epochs,
        "discarded": summary.discarded,
        "refused": summary.refused,
        "train_loss": summary.train_loss,
        "test_loss": summary.test_loss,
        "test_accuracy": summary.test_accuracy,
        "best_test_accuracy": summary.best_test_accuracy,
        "gradients_to_loss": run.gradients_to_loss(suite.target_train_loss),
        "seconds_to_accuracy": run.seconds_to_accuracy(suite.target_accuracy),
        "virtual_seconds": summary.virtual_seconds,
        "delay_mean": summary.delay.mean,
        "delay_max": summary.delay.max,
        "digest": summary.digest,
    }


def full_report(comparison: Comparison, origin: Origin) -> str:
    """Everything that the comparison says, as a Markdown page."""
    entries = comparison.entries()
    parts = [f"# {comparison.suite.title}", *_preamble(comparison, origin)]
    for cluster in comparison.suite.clusters:
        of_cluster = [entry for entry in entries if entry.cluster is cluster]
        parts += [f"## {_heading(cluster)}", _best_table(comparison.suite, of_cluster)]
        parts += _reference_part(comparison.suite, of_cluster)
        parts += ["### The grid: train loss, test accuracy in %", _grid_table(comparison, of_cluster)]
    return "\n\n".join((*parts, _notes(comparison.suite, entries))) + "\n"


def compact_report(comparison: Comparison, origin: Origin) -> str:
    """What docs/results.md shows: a table for each number of workers."""
    suite, entries = comparison.suite, comparison.entries()
    parts = _preamble(comparison, origin)
    for _, clusters in groupby(suite.clusters, key=lambda cluster: cluster.workers):
        parts.append(_compact_table(suite, entries, list(clusters)))
    return "\n\n".join((*parts, _notes(suite, entries))) + "\n"


def _preamble(comparison: Comparison, origin: Origin) -> list[str]:
    suite = comparison.suite
    one = suite.settings(suite.grid()[0])
    extras = [run.summary.model_extra or {} for run in comparison.runs.values()]
    commits = ", ".join(sorted({str(extra.get("commit")) for extra in extras}))
    torches = ", ".join(sorted({str(extra.get("torch")) for extra in extras}))
    ends = sorted({_end(suite, cluster) for cluster in suite.clusters})
    seeds = ", ".join(map(str, suite.report_seeds))
    last = "last evaluation" if suite.choice_evaluations == 1 else f"last {suite.choice_evaluations} evaluations"
    sizes = f"{' or '.join(ends)} of {one.batch_size} samples a run, β = {one.momentum:g}"
    lines = [
        f"`{origin.command}` · commit {commits} · torch {torches} · {sizes}. For each method the rate of the grid with "
        f"the lowest train loss in the {last} (seed {suite.grid_seed}); there, the final figures, mean ± sample "
        f"deviation over the seeds {seeds}."
    ]
    if origin.failed:
        lines.append(f"**{origin.failed} simulations failed and are missing.**")
    return lines


def _end(suite: Suite, cluster: Cluster) -> str:
    settings = suite.settings(Cell(cluster.name, suite.methods[0], suite.rates(cluster)[0], suite.grid_seed))
    if settings.stop_after_gradients:
        return f"{settings.stop_after_gradients:,} gradients"
    return f"{settings.epochs:g} epochs in gradients" if settings.epochs else f"{settings.stop_after_samples:,} samples"


def _heading(cluster: Cluster) -> str:
    slow = cluster.simulation.get("slow")
    return f"{cluster.workers} workers, {cluster.setting}" + (f" (slow: {slow})" if slow else "")


def _best_table(suite: Suite, entries: Sequence[Entry]) -> str:
    columns: dict[str, Callable[[Entry], str]] = {
        "method": lambda entry: entry.method,
        "η": _rate,
        "train loss": lambda entry: _loss(entry.best),
        "test accuracy, %": lambda entry: _accuracy(entry.best),
        f"gradients to loss {suite.target_train_loss:g}": lambda entry: _gradients_to_loss(suite, entry.best),
        "virtual s": lambda entry: _number(entry.best.virtual_seconds),
        f"virtual s to {suite.target_accuracy:.0%}": lambda entry: _seconds_to_accuracy(suite, entry.best),
        "delay mean, max": lambda entry: _delay(entry.best),
        "diverged": lambda entry: f"{entry.best.diverged} of {len(entry.best.runs)}",
    }
    return _markdown(columns, ([column(entry) for column in columns.values()] for entry in entries))


def _reference_part(suite: Suite, entries: Sequence[Entry]) -> list[str]:
    rate = entries[0].reference_rate
    if rate is None:
        return []
    seeds = suite.report_seeds if suite.repeat_at_reference_rate else (suite.grid_seed,)
    columns: dict[str, Callable[[Entry], str]] = {
        "method": lambda entry: entry.method,
        "train loss": lambda entry: _loss(entry.at_reference),
        "test accuracy, %": lambda entry: _accuracy(entry.at_reference),
        f"gradients to loss {suite.target_train_loss:g}": lambda entry: _gradients_to_loss(suite, entry.at_reference),
        "diverged": lambda entry: f"{entry.at_reference.diverged} of {len(entry.at_reference.runs)}",
    }
    table = _markdown(columns, ([column(entry) for column in columns.values()] for entry in entries))
    heading = f"### At the rate that suits `{suite.reference}`: η = {rate:g}, seeds {', '.join(map(str, seeds))}"
    return [heading, table]


def _grid_table(comparison: Comparison, entries: Sequence[Entry]) -> str:
    rates = comparison.suite.rates(entries[0].cluster)

    def cell(entry: Entry, rate: float) -> str:
        run = entry.grid.get(rate)
        if run is None:
            return "failed"
        if comparison.has_diverged(run):
            return "diverged"
        text = f"{run.summary.train_loss:.3g}, {100 * run.summary.test_accuracy:.1f}"
        return f"**{text}**" if rate == entry.rate else text

    rows = ([entry.method, *(cell(entry, rate) for rate in rates)] for entry in entries)
    return _markdown(["method", *(f"η = {rate:g}" for rate in rates)], rows)


def _compact_table(suite: Suite, entries: Sequence[Entry], clusters: Sequence[Cluster]) -> str:
    heads = [f"{clusters[0].workers} workers"]
    for cluster in clusters:
        heads += [
            f"{cluster.setting}: test accuracy, % (η)",
            f"gradients to loss {suite.target_train_loss:g}",
            "virtual s",
            f"accuracy at `{suite.reference}`'s η",
        ]
    by_group = {(entry.cluster.name, entry.method): entry for entry in entries}
    rows = []
    for method in suite.methods:
        row = [f"`{method}`"]
        for cluster in clusters:
            entry = by_group[cluster.name, method]
            best = entry.best
            row += [f"{_accuracy(best)} ({_rate(entry)})", _gradients_to_loss(suite, best)]
            row += [_number(best.virtual_seconds), _accuracy(entry.at_reference)]
        rows.append(row)
    return _markdown(heads, rows)


def _notes(suite: Suite, entries: Sequence[Entry]) -> str:
    notes = [
        f"Gradients to a train loss of {suite.target_train_loss:g}: at the first evaluation that is no higher, mean "
        "over the runs that get there."
    ]
    if suite.diverged_loss is not None:
        notes.append(
            f"Diverged: not finite, or a train loss of {suite.diverged_loss:g} or more (random guessing); accuracy is "
            "the mean over all runs, train loss and time over those that did not diverge."
        )
    if any(entry.at_edge for entry in entries):
        notes.append(f"{_EDGE} is the edge of the grid: a better rate may lie outside.")
    return " ".join(notes)


def _rate(entry: Entry) -> str:
    if entry.rate is None:
        return "all failed"
    return f"{entry.rate:g}{' ' + _EDGE if entry.at_edge else ''}"


def _loss(group: Group) -> str:
    if group.runs and not group.sound:
        return "diverged"
    spread = group.train_loss
    # Three figures that say something, however small the loss.
    digits = 3 if spread is None or spread.mean <= 0 else max(3, 2 - math.floor(math.log10(spread.mean)))
    return _spread(spread, 1.0, digits)


def _accuracy(group: Group) -> str:
    return _spread(group.test_accuracy, 100.0, 1)


def _gradients_to_loss(suite: Suite, group: Group) -> str:
    return _reached(group, group.reached(lambda run: run.gradients_to_loss(suite.target_train_loss)))


def _seconds_to_accuracy(suite: Suite, group: Group) -> str:
    return _reached(group, group.reached(lambda run: run.seconds_to_accuracy(suite.target_accuracy)))


def _reached(group: Group, spread: Spread | None) -> str:
    if spread is None:
        return "not reached" if group.runs else _NOTHING
    missing = f" ({spread.count} of {len(group.runs)})" if spread.count < len(group.runs) else ""
    return _number(spread) + missing


def _delay(group: Group) -> str:
    return _NOTHING if group.delay_mean is None else f"{group.delay_mean:.1f}, {group.delay_max}"


def _number(spread: Spread | None) -> str:
    return _NOTHING if spread is None else f"{spread.mean:,.0f}"


def _spread(spread: Spread | None, factor: float, digits: int) -> str:
    if spread is None:
        return _NOTHING
    mean = f"{factor * spread.mean:.{digits}f}"
    return mean if spread.deviation is None else f"{mean} ± {factor * spread.deviation:.{digits}f}"


def _markdown(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def insert(path: Path, name: str, table: str) -> None:
    """Put a table between the markers of that name, instead of what is there.

    Raises:
        UsageError: the file or the markers are missing.
    """
    before, after = _around(path, name)
    aside = path.with_name(path.name + ".part")
    aside.write_text(f"{before}\n{table.strip()}\n{after}", encoding="utf-8")
    aside.chmod(path.stat().st_mode)
    aside.replace(path)


def check(path: Path, name: str) -> None:
    """See before hours of work that the markers are there.

    Raises:
        UsageError: the file or the markers are missing.
    """
    _around(path, name)


def _around(path: Path, name: str) -> tuple[str, str]:
    start, end = f"<!-- results: {name} -->", f"<!-- end of results: {name} -->"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} can't be read: {error}") from error
    before, found_start, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise UsageError(f"{path} does not say where the results go: put the lines {start} and {end} into it")
    return before + start, end + after
