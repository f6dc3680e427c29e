"""The machines of simulated workers: how long each takes for a gradient, how it is connected, who comes and goes."""

import csv
import math
import re
from collections.abc import Callable, Iterator, Sequence
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


_WHEN = re.compile(r"(\d+(?:\.\d+)?):(\d+)")


@dataclass(frozen=True, slots=True)
class Machine:
    """One worker's machine and its line to the server.

    Attributes:
        index: from 0 up.
        slow_factor: how many times as long it takes for a gradient.
        latency_seconds: of a message, one way.
        bytes_per_second: of its line, each way; infinity for no limit.
        times: seconds per gradient, before the slow factor.
    """

    index: int
    slow_factor: float
    latency_seconds: float
    bytes_per_second: float
    times: Iterator[float]

    @property
    def name(self) -> str:
        """The worker's id."""
        return f"worker-{self.index}"

    def next_compute_seconds(self) -> float:
        """How long the next gradient takes."""
        return self.slow_factor * next(self.times)

    def travel_seconds(self, message_bytes: int) -> float:
        """How long a message takes one way."""
        return self.latency_seconds + message_bytes / self.bytes_per_second


@dataclass(frozen=True, slots=True)
class Change:
    """Something that happens to workers at a moment.

    Attributes:
        seconds: when.
        kind: `join`, `leave` or `crash`.
        number: of workers that join; index of the worker that leaves or crashes.
    """

    seconds: float
    kind: str
    number: int


class MachinePark:
    """Makes machines one by one, each with its own speed and line.

    Args:
        compute_times: of machines that are not slow.
        slow_factors: of the machines that are there at the start; 1 for all further ones.
        latencies, bandwidths: dealt out to the machines in turn.
        seed: of the compute times.
    """

    def __init__(
        self,
        compute_times: ComputeTimes,
        slow_factors: Sequence[float],
        latencies: Sequence[float],
        bandwidths: Sequence[float],
        seed: int,
    ) -> None:
        self._compute_times = compute_times
        self._slow_factors = slow_factors
        self._latencies = latencies
        self._bandwidths = bandwidths
        self._seed = seed
        self._made = 0

    def next_machine(self) -> Machine:
        """One machine more."""
        index = self._made
        self._made += 1
        return Machine(
            index,
            self._slow_factors[index] if index < len(self._slow_factors) else 1.0,
            self._latencies[index % len(self._latencies)],
            self._bandwidths[index % len(self._bandwidths)],
            self._compute_times.of_worker(index, self._seed),
        )


def changes(kind: str, texts: Sequence[str]) -> list[Change]:
    """What happens when, from `SECONDS:NUMBER`.

    Raises:
        UsageError: a text of another form.
    """
    found = []
    for text in texts:
        match = _WHEN.fullmatch(text)
        if match is None:
            what = "how many workers" if kind == "join" else "which worker, counted from 0"
            raise UsageError(f"{kind} {text!r}: expected SECONDS:NUMBER, when and {what}, as in 120:4")
        found.append(Change(float(match.group(1)), kind, int(match.group(2))))
    return found
