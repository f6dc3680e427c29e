"""The results of a comparison: as Markdown between two markers of a text file, as pictures, and every cell as CSV."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ormo_runtime.settings import UsageError
from ormo_server.sim.plots import STYLES, Line, draw_curves, draw_delays, draw_losses
from ormo_server.sim.record import FinishedRun, Row
from ormo_server.sim.reproduce.comparison import Comparison, Entry, Group, Spread
from ormo_server.sim.reproduce.suite import Cell, Cluster, Point, Suite


def draw_clusters(comparison: Comparison, into: Path) -> list[Path]:
    """Draw every cluster; returns the pictures' paths."""
    suite, entries = comparison.suite, comparison.entries()
    pictures = []
    for cluster in suite.clusters:
        lines = _lines([entry for entry in entries if entry.cluster is cluster])
        drawn = [line for line in lines if line.method in (suite.drawn_methods or suite.methods)]
        title = f"{suite.title}: {_workers(cluster)}, {cluster.setting}"
        draw = draw_losses if suite.measure == "loss" else draw_curves
        if drawn:
            pictures.append(draw(drawn, into / f"curves-{cluster.name}.png", title))
        if lines:
            pictures.append(draw_delays(lines, into / f"delays-{cluster.name}.png", title))
    return pictures


def _lines(entries: Sequence[Entry]) -> list[Line]:
    return [
        Line(f"{entry.method}, {_chosen(entry.best_point)}", STYLES[entry.method], entry.best.runs)
        for entry in entries
        if entry.best.runs
    ]


def _chosen(point: Point | None) -> str:
    if point is None:
        return "all failed"
    return f"η {point.rate:g}" + ("" if point.momentum is None else f", β {point.momentum:g}")


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
    is_best = cell.point == comparison.best_point(cluster, cell.method)
    reported = "report" if is_best else "reference"
    return {
        "workers": cluster.workers,
        "setting": cluster.setting,
        "method": cell.method,
        "learning_rate": cell.learning_rate,
        "momentum": summary.settings["momentum"],
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
        "bytes_moved": run.rows[-1].bytes_moved,
        "int8_bytes_moved": run.rows[-1].int8_bytes_moved,
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
        best_table = _loss_table if comparison.suite.measure == "loss" else _best_table
        parts += [f"## {_heading(cluster)}", best_table(comparison.suite, of_cluster)]
        parts += _reference_part(comparison.suite, of_cluster)
        parts += ["### The grid: train loss, test accuracy in %", _grid_table(comparison, of_cluster)]
    return "\n\n".join((*parts, _notes(comparison.suite, entries))) + "\n"


def compact_report(comparison: Comparison, origin: Origin) -> str:
    """What docs/results.md shows: a table for each number of workers."""
    suite, entries = comparison.suite, comparison.entries()
    parts = _preamble(comparison, origin)
    for _, clusters in groupby(suite.clusters, key=lambda cluster: cluster.workers):
        if suite.measure == "loss":
            parts.append(_short_loss_table(entries, list(clusters)))
        else:
            parts.append(_compact_table(suite, entries, list(clusters)))
    return "\n\n".join((*parts, _notes(suite, entries))) + "\n"


def _preamble(comparison: Comparison, origin: Origin) -> list[str]:
    suite = comparison.suite
    one = suite.settings(suite.grid()[0])
    extras = [run.summary.model_extra or {} for run in comparison.runs.values()]
    commits = ", ".join(sorted({str(extra.get("commit")) for extra in extras}))
    torches = ", ".join(sorted({str(extra.get("torch")) for extra in extras}))
    pythons = ", ".join(sorted({str(extra["python"]) for extra in extras if "python" in extra}))
    made_by = f"commit {commits} · torch {torches}" + (f" · Python {pythons}" if pythons else "")
    ends = sorted({_end(suite, cluster) for cluster in suite.clusters})
    seeds = ", ".join(map(str, suite.report_seeds))
    last = "last evaluation" if suite.choice_evaluations == 1 else f"last {suite.choice_evaluations} evaluations"
    if suite.momenta:
        sizes = f"{' or '.join(ends)} a run, in mini-batches of {one.batch_size}"
    else:
        sizes = f"{' or '.join(ends)} of {one.batch_size} samples a run, β = {one.momentum:g}"
    what = "rate and momentum" if suite.momenta else "rate"
    lines = [
        f"`{origin.command}` · {made_by} · {sizes}. For each method the {what} of the grid with "
        f"the lowest train loss in the {last} (seed {suite.grid_seed}); there, the final figures, mean ± sample "
        f"deviation over the seeds {seeds}."
    ]
    if origin.failed:
        lines.append(f"**{origin.failed} simulations failed and are missing.**")
    return lines


def _end(suite: Suite, cluster: Cluster) -> str:
    method = suite.methods_on(cluster)[0]
    settings = suite.settings(suite.cell(cluster, method, suite.points(cluster, method)[0], suite.grid_seed))
    if settings.stop_after_gradients:
        return f"{settings.stop_after_gradients:,} gradients"
    return f"{settings.epochs:g} epochs in gradients" if settings.epochs else f"{settings.stop_after_samples:,} samples"


def _workers(cluster: Cluster) -> str:
    return "1 worker" if cluster.workers == 1 else f"{cluster.workers} workers"


def _heading(cluster: Cluster) -> str:
    slow = cluster.simulation.get("slow")
    return f"{_workers(cluster)}, {cluster.setting}" + (f" (slow: {slow})" if slow else "")


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
    suite = comparison.suite
    planned = {point for entry in entries for point in suite.points(entry.cluster, entry.method)}
    points = sorted(planned.union(*(entry.grid for entry in entries)), key=lambda point: (point.momentum or 0, point))

    def cell(entry: Entry, point: Point) -> str:
        run = entry.grid.get(point)
        if run is None:
            return "failed" if point in suite.points(entry.cluster, entry.method) else ""
        if comparison.has_diverged(run):
            return "diverged"
        text = f"{run.summary.train_loss:.3g}, {100 * run.summary.test_accuracy:.1f}"
        return f"**{text}**" if point == entry.best_point else text

    rows = ([entry.method, *(cell(entry, point) for point in points)] for entry in entries)
    return _markdown(["method", *(_head(point) for point in points)], rows)


def _head(point: Point) -> str:
    return f"η = {point.rate:g}" + ("" if point.momentum is None else f", β = {point.momentum:g}")


def _loss_table(suite: Suite, entries: Sequence[Entry]) -> str:
    columns: dict[str, Callable[[Entry], str]] = {
        "method": lambda entry: entry.method,
        "η, β": _rate,
        "test loss": lambda entry: _test_loss(entry.best),
        "train loss": lambda entry: _loss(entry.best),
        "virtual s": lambda entry: _number(entry.best.virtual_seconds),
        "MB moved": _megabytes,
        f"gradients to train loss {suite.target_train_loss:g}": lambda entry: _gradients_to_loss(suite, entry.best),
        "delay mean, max": lambda entry: _delay(entry.best),
        "diverged": lambda entry: f"{entry.best.diverged} of {len(entry.best.runs)}",
    }
    return _markdown(columns, ([column(entry) for column in columns.values()] for entry in entries))


def _short_loss_table(entries: Sequence[Entry], clusters: Sequence[Cluster]) -> str:
    names = {cluster.name for cluster in clusters}
    found = [entry for entry in entries if entry.cluster.name in names]
    # As much as the one that took least had at its end.
    seconds, moved = (_least(found, clock) for clock in (_seconds_of, _bytes_of))
    heads = [_workers(clusters[0]), "η, β", "test loss"]
    heads += [f"in {seconds:,.0f} virtual s"] + ([f"with {moved / 1e6:,.0f} MB"] if clusters[0].workers > 1 else [])
    rows = []
    for entry in found:
        best = entry.best
        row = [f"{entry.cluster.setting}: `{entry.method}`", _rate(entry), _test_loss(best)]
        row += [_spread(best.test_loss_at(_seconds_of, seconds), 1.0, 3)]
        row += [_spread(best.test_loss_at(_bytes_of, moved), 1.0, 3)] if clusters[0].workers > 1 else []
        rows.append(row)
    return _markdown(heads, rows)


def _seconds_of(row: Row) -> float:
    return row.seconds


def _bytes_of(row: Row) -> float:
    return row.bytes_moved


def _least(entries: Sequence[Entry], clock: Callable[[Row], float]) -> float:
    return min((clock(run.rows[-1]) for entry in entries for run in entry.best.sound), default=0.0)


def _test_loss(group: Group) -> str:
    return "diverged" if group.runs and not group.sound else _spread(group.test_loss, 1.0, 3)


def _megabytes(entry: Entry) -> str:
    # A worker alone need not send anything.
    moved = entry.best.bytes_moved
    return _NOTHING if moved is None or entry.cluster.workers == 1 else f"{moved.mean / 1e6:,.0f}"


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
            entry = by_group.get((cluster.name, method))
            if entry is None:
                row += 4 * [_NOTHING]
                continue
            best = entry.best
            row += [f"{_accuracy(best)} ({_rate(entry)})", _gradients_to_loss(suite, best)]
            row += [_number(best.virtual_seconds), _accuracy(entry.at_reference)]
        rows.append(row)
    return _markdown(heads, rows)


def _notes(suite: Suite, entries: Sequence[Entry]) -> str:
    if suite.measure == "loss":
        notes = [
            "Virtual time and bytes (both ways, all workers, in float32): where a run was by the time that the "
            "quickest, or the most sparing one, of its table came to its end."
        ]
    else:
        notes = [
            f"Gradients to a train loss of {suite.target_train_loss:g}: at the first evaluation that is no higher, "
            "mean over the runs that get there."
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
    if entry.best_point is None:
        return "all failed"
    momentum = "" if entry.best_point.momentum is None else f", {entry.best_point.momentum:g}"
    return f"{entry.best_point.rate:g}{momentum}{' ' + _EDGE if entry.at_edge else ''}"


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
