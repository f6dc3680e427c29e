"""The figures as a Markdown table, as CSV and as a picture."""

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.round_trips.contenders import ELSEWHERE, ORMO, SOCKET
from benchmarks.round_trips.measure import Row

_COLUMNS = ("bytes", "workers", "contender", "trips", "seconds", "processor_seconds", "ratio", "peak_bytes")

HEADER = (
    "| model | contender | round trip, ms | × the socket's time | GB/s | CPU s/GB | server's peak, MB |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def line(row: Row) -> str:
    """A row of the table."""
    return (
        f"| {row.case} | {row.contender} | {1e3 * row.seconds_per_trip:.2f} | {_ratio(row)} | "
        f"{row.gigabytes_per_second:.2f} | {row.processor_seconds_per_gigabyte:.2f} | {row.peak_bytes / 1e6:.0f} |"
    )


def _ratio(row: Row) -> str:
    if row.contender == SOCKET:
        return "1"
    share = f", {1 / median(row.ratios):.2f} of its rate" if row.case.workers > 1 else ""
    return f"{_range(row.ratios)}{share}"


def summary(rows: Sequence[Row]) -> str:
    """A Markdown table with a line for each case and a column for each contender: times the socket's time."""
    names = list(dict.fromkeys(row.contender for row in rows if row.contender != SOCKET))
    cases = list(dict.fromkeys(row.case for row in rows))
    ratios = {(row.case, row.contender): row.ratios for row in rows}
    lines = [f"| model | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for case in cases:
        cells = (_range(ratios[case, name]) if (case, name) in ratios else "" for name in names)
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def beside_the_best(rows: Sequence[Row]) -> list[str]:
    """A line for each case: our time by that of the fastest that a user could take instead, turn by turn."""
    lines = []
    for mine in (row for row in rows if row.contender == ORMO):
        others = [row for row in rows if row.case == mine.case and row.contender in ELSEWHERE]
        if others:
            best = min(others, key=lambda row: median(row.ratios))
            beside = [own / other for own, other in zip(mine.ratios, best.ratios, strict=True)]
            lines.append(f"{mine.case}: {_range(beside)} times the time of {best.contender}, the fastest elsewhere")
    return lines


def _range(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def stages(row: Row) -> str:
    """Where an exchange's time goes, in one line."""
    parts = (f"{stage} {1e3 * seconds:.2f}" for stage, seconds in sorted(row.stages.items(), key=lambda each: -each[1]))
    return f"{row.case}, ms by stage: {', '.join(parts)}"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line for each pair."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for row in rows:
            for at, turn in enumerate(row.turns):
                ratio = row.ratios[at] if row.ratios else 1.0
                figures = [turn.trips, turn.seconds, turn.processor_seconds, ratio, row.peak_bytes]
                writer.writerow([row.case.size, row.case.workers, row.contender, *figures])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Ratios to the socket, a group of bars for each case."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys(str(row.case) for row in rows))
    names = list(dict.fromkeys(row.contender for row in rows if row.contender != SOCKET))
    figure, axes = plt.subplots(figsize=(1.5 + 1.7 * len(cases), 4.2), layout="constrained")
    width = 0.85 / max(1, len(names))
    for at, name in enumerate(names):
        mine = {str(row.case): row for row in rows if row.contender == name}
        places = [case + (at - (len(names) - 1) / 2) * width for case, label in enumerate(cases) if label in mine]
        middles = [median(mine[label].ratios) for label in cases if label in mine]
        below = [median(mine[label].ratios) - min(mine[label].ratios) for label in cases if label in mine]
        above = [max(mine[label].ratios) - median(mine[label].ratios) for label in cases if label in mine]
        axes.bar(places, middles, width, yerr=(below, above), label=name, error_kw={"lw": 0.8})
    axes.axhline(1.0, color="black", lw=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("time of a round trip, × a bare socket's")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
