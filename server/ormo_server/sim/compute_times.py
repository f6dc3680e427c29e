"""How long simulated workers take for a gradient: a distribution, or times that were measured."""

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from ormo_runtime.settings import UsageError
from ormo_server.core.inputs import Push
from ormo_server.trace import Recorded, read_trace

FORMS = "constant:MEAN, normal:MEAN,DEVIATION, lognormal:MEAN,SIGMA, exponential:MEAN or trace:FILE"
# A normal distribution has no shortest time, a machine has.
_SHORTEST_SHARE_OF_MEAN = 0.05

# Drawn one by one, numbers take ten times as long.
_DRAWN_AT_ONCE = 64

Draw = Callable[[np.random.Generator], list[float]]


@dataclass(frozen=True, slots=True)
class ComputeTimes:
    """Seconds per gradient of every worker: drawn anew for each gradient, or read one after the other.

    Attributes:
        draw: some times of a worker of average speed; None if times were measured.
        measured: for each measured worker its times in order, repeated from the start when used up.
    """

    draw: Draw | None
    measured: tuple[tuple[float, ...], ...] = ()

    def of_worker(self, index: int, seed: int) -> Iterator[float]:
        """The endless times of the worker with this index; the same for the same seed."""
        if self.draw is None:
            return cycle(self.measured[index % len(self.measured)])
        return _drawn(self.draw, np.random.default_rng((seed, index)))


def _drawn(draw: Draw, random: np.random.Generator) -> Iterator[float]:
    while True:
        yield from draw(random)


def parse(text: str) -> ComputeTimes:
    """The times that a setting such as `lognormal:1,0.3` describes.

    Raises:
        UsageError: it has none of the forms, or its file can't be used.
    """
    kind, _, rest = text.partition(":")
    if kind == "trace" and rest:
        return ComputeTimes(None, _measured(Path(rest)))
    numbers = _numbers(rest)
    if kind not in _DISTRIBUTIONS or numbers is None or len(numbers) != _DISTRIBUTIONS[kind][0]:
        raise UsageError(f"compute time {text!r}: expected {FORMS}, with a mean above 0 and a deviation of at least 0")
    return ComputeTimes(_DISTRIBUTIONS[kind][1](*numbers))


def _numbers(text: str) -> list[float] | None:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    mean, *spread = numbers
    sound = all(map(math.isfinite, numbers)) and mean > 0 and all(value >= 0 for value in spread)
    return numbers if sound else None


def _constant(mean: float) -> Draw:
    return lambda _: [mean]


def _normal(mean: float, deviation: float) -> Draw:
    shortest = _SHORTEST_SHARE_OF_MEAN * mean
    return lambda random: np.maximum(shortest, random.normal(mean, deviation, _DRAWN_AT_ONCE)).tolist()


def _lognormal(mean: float, sigma: float) -> Draw:
    # The parameter of numpy's is the mean of the logarithm; this one's is the mean of the times.
    centre = math.log(mean) - sigma**2 / 2
    return lambda random: random.lognormal(centre, sigma, _DRAWN_AT_ONCE).tolist()


def _exponential(mean: float) -> Draw:
    return lambda random: random.exponential(mean, _DRAWN_AT_ONCE).tolist()


_DISTRIBUTIONS: dict[str, tuple[int, Callable[..., Draw]]] = {
    "constant": (1, _constant),
    "normal": (2, _normal),
    "lognormal": (2, _lognormal),
    "exponential": (1, _exponential),
}


def _measured(path: Path) -> tuple[tuple[float, ...], ...]:
    """The times of each worker in a server's trace (from ticket to push) or in a CSV file `worker,seconds`."""
    times = _from_csv(path) if path.suffix == ".csv" else _from_trace(path)
    if not times:
        raise UsageError(f"the trace {path} has no gradient, and so no compute times: record a longer run")
    return tuple(tuple(values) for _, values in sorted(times.items()))


def _from_trace(path: Path) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}
    for segment in read_trace(path):
        for entry in segment.inputs:
            if isinstance(entry, Recorded) and entry.redeemed is not None and isinstance(entry.input, Push):
                seconds = entry.input.seconds - entry.redeemed.handed_out_seconds
                times.setdefault(entry.input.worker, []).append(seconds)
    return times


def _from_csv(path: Path) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                times.setdefault(_cell(row, "worker", path, number), []).append(_seconds(row, path, number))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the trace {path} can't be read: {error}") from error
    return times


def _cell(row: dict[str, str], column: str, path: Path, line: int) -> str:
    value = row.get(column)
    if value is None:
        raise UsageError(f"{path}, line {line}: expected a head line with the columns worker,seconds, and both in each")
    return value


def _seconds(row: dict[str, str], path: Path, line: int) -> float:
    text = _cell(row, "seconds", path, line)
    numbers = _numbers(text)
    if numbers is None or len(numbers) != 1:
        raise UsageError(f"{path}, line {line}: seconds is {text!r}, expected a number above 0")
    return numbers[0]
