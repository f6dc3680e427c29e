"""What the workers and the stage wrote down, read."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from chaos.evidence import Evidence, Silence, Told
from chaos.memory import Life, life_name

Spell = tuple[float, float]  # of the monotonic clock
Trouble = list[tuple[float, float, str | None]]  # spells, and whose; None for everybody's


@dataclass
class Process:
    """A worker's process.

    Attributes:
        name: of the worker.
        pid: its own.
        began, ended: when the stage started it, and saw it end.
    """

    name: str
    pid: int
    began: float
    ended: float | None = None


def read_diaries(evidence: Evidence, folder: Path) -> None:
    """Read all of a run."""
    noted = json.loads((folder / "stage.json").read_text())
    processes = [Process(**row) for row in noted["processes"]]
    answered: list[tuple[float, str]] = []  # when, and which process
    for worker in sorted({process.name for process in processes}):
        lines = list(_whole_lines(folder / f"{worker}.diary"))
        _note_gradients(evidence, worker, lines)
        trouble = merged((begin, end) for begin, end, whose in noted["trouble"] if whose in (None, worker))
        for process in processes:
            if process.name == worker:
                evidence.silences += _silences(process, lines, trouble)
        answered += [(line["at"], life_name(worker, line["pid"])) for line in lines if "acked" in line]
    evidence.memory = [_settled(Life(who, samples), answered) for who, samples in noted["memory"].items()]


def _settled(life: Life, answered: list[tuple[float, str]]) -> Life:
    """From the first answer on that it got, or gave: before that it loads what it needs, and has no model maybe."""
    begin = life.samples[0][0]
    of_it = (at for at, who in answered if at >= begin and (life.is_server or who == life.who))
    since = min(of_it, default=float("inf"))
    return Life(life.who, [(at, size) for at, size in life.samples if at >= since])


def _note_gradients(evidence: Evidence, worker: str, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        if "try" in line:
            evidence.tried[worker, line["try"]] = (line["ticket"][0], line["ticket"][1])
        elif "acked" in line:
            evidence.told.append(Told((worker, line["acked"]), line["epoch"], line["iteration"]))
        elif "refused" in line:
            evidence.refused[worker, line["refused"]] = line["reason"]


def _silences(process: Process, lines: list[dict[str, Any]], trouble: list[Spell]) -> Iterator[Silence]:
    who = life_name(f"worker {process.name}", process.pid)
    said = [line["at"] for line in lines if line["pid"] == process.pid]
    ended = [] if process.ended is None else [process.ended]
    moments = [process.began, *said, *ended]
    for at, (before, after) in enumerate(pairwise(moments)):
        yield Silence(who, _calm(before, after, trouble), starting=at == 0)


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if line.endswith(b"\n"):  # else it was killed in the middle
            yield json.loads(line)


def merged(trouble: Iterable[Spell]) -> list[Spell]:
    """The same time, without counting twice what overlaps."""
    apart: list[Spell] = []
    for since, to in sorted(trouble):
        if apart and since <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(apart[-1][1], to))
        else:
            apart.append((since, to))
    return apart


def _calm(begin: float, end: float, trouble: list[Spell]) -> float:
    return max(0.0, end - begin - sum(max(0.0, min(end, to) - max(begin, since)) for since, to in trouble))
