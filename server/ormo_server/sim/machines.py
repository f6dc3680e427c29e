"""The machines that a simulation has, how fast they are, and when they come and go."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ormo_runtime.settings import UsageError
from ormo_server.sim.compute_times import ComputeTimes

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
