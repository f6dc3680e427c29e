"""Pictures of a comparison: for each cluster the curves of the reported runs, and the delays."""

from collections.abc import Sequence
from pathlib import Path

from ormo_server.sim.plots import STYLES, Line, draw_curves, draw_delays
from ormo_server.sim.reproduce.comparison import Comparison, Entry


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
