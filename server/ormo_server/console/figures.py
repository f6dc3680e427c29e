"""What of a status people see as figures, how fast a run is by the server's own uptime, and how numbers are written."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from ormo_protos.limits import PHASES
from ormo_protos.v1 import parameter_server_pb2 as pb

# So that a worker that takes seconds for a gradient has a rate, and a change shows soon.
_WINDOW_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Counted per second, mean over the time between two answers.

    Attributes:
        gradients, samples: of the run.
        workers: gradients of each worker that was there all the time.
    """

    gradients: float
    samples: float
    workers: dict[str, float]


def rates_between(older: pb.GetStatusResponse, newer: pb.GetStatusResponse) -> Rates | None:
    """The rates, or None if the two are not of one start of the server, or no time lies between them."""
    seconds = newer.uptime_seconds - older.uptime_seconds
    if older.iteration.epoch != newer.iteration.epoch or not 0 < seconds < math.inf:
        return None
    before = {worker.worker: worker.applied for worker in older.workers}
    return Rates(
        (newer.applied - older.applied) / seconds,
        (newer.samples - older.samples) / seconds,
        {
            worker.worker: (worker.applied - before[worker.worker]) / seconds
            for worker in newer.workers
            # One that has joined anew counts from 0.
            if worker.worker in before and worker.applied >= before[worker.worker]
        },
    )


class History:
    """The answers of the last seconds."""

    def __init__(self) -> None:
        self._answers: deque[pb.GetStatusResponse] = deque()

    def add(self, status: pb.GetStatusResponse) -> None:
        """Take the newest answer; those before a restart of the server don't count any more."""
        if self._answers and rates_between(self._answers[-1], status) is None:
            self._answers.clear()
        self._answers.append(status)
        while len(self._answers) > 2 and status.uptime_seconds - self._answers[1].uptime_seconds >= _WINDOW_SECONDS:
            self._answers.popleft()

    @property
    def newest(self) -> pb.GetStatusResponse | None:
        """The last answer."""
        return self._answers[-1] if self._answers else None

    @property
    def rates(self) -> Rates | None:
        """Between the oldest answer that is kept and the newest; None if these are one."""
        return rates_between(self._answers[0], self._answers[-1]) if self._answers else None


Facts = Mapping[str, str]


def of_the_moment(status: pb.GetStatusResponse) -> Facts:
    """What changes as training goes on."""
    waiting = status.slots_waiting
    return {
        "learning rate": f"{status.learning_rate:g}, K {status.bucket_size}",
        "loss": f"{status.loss:.4f}" if status.HasField("loss") else NOT_KNOWN,
        "evaluation": _evaluation(status),
        "delay": f"mean {status.delay_mean:.1f}, largest {status.delay_max:,}",
        "tickets": f"{status.tickets_in_flight} in flight, {waiting} slot{'s' * (waiting != 1)} waiting",
        "checkpoint": _checkpoint(status),
        "memory": memory(status.resident_bytes) if status.resident_bytes else NOT_KNOWN,
    }


def of_the_method(status: pb.GetStatusResponse) -> Facts:
    """How it trains what."""
    most = status.settings.local_steps
    return {
        "method": (
            f"{status.method}: update rule {status.update_rule}, step scale {status.step_scale} "
            f"(mean {status.step_scale_mean:.3g}), scheduler {status.scheduler}"
            + (f", up to {most:,} local steps" if most else "")
        ),
        "model": f"{status.model_parameters:,} parameters",
    }


def position(status: pb.GetStatusResponse) -> str:
    """How far the run is, and where it ends if that is set."""
    gradients, samples = status.settings.stop_after_gradients, status.settings.stop_after_samples
    iteration = f"iteration {status.iteration.number:,}" + (f" of {gradients:,}" if gradients else "")
    return f"{iteration}, {status.samples:,}" + (f" of {samples:,}" if samples else "") + " samples"


def mean_throughput(status: pb.GetStatusResponse) -> str:
    """Over the whole time since the server started: one answer tells no more."""
    per_second = status.applied / status.uptime_seconds if status.uptime_seconds > 0 else None
    discarded = f", {status.discarded:,} discarded" if status.discarded else ""
    return f"{rate(per_second)} updates/s since the server started ({status.applied:,} applied{discarded})"


def throughput(rates: Rates | None) -> str:
    """As measured."""
    if rates is None:
        return NOT_KNOWN
    return f"{rate(rates.gradients)} updates/s, {rate(rates.samples)} samples/s"


def share_done(status: pb.GetStatusResponse) -> float | None:
    """How much of the run is done, 0 to 1; None if no end is set."""
    shares = [done / end for done, end, _ in _ends(status, None)]
    return min(1.0, max(shares)) if shares else None


def seconds_left(status: pb.GetStatusResponse, rates: Rates | None) -> float | None:
    """Until the run's end, if it goes on at this rate; None if that can't be told."""
    left = [max(0, end - done) / per_second for done, end, per_second in _ends(status, rates) if per_second > 0]
    return min(left, default=None)


def _ends(status: pb.GetStatusResponse, rates: Rates | None) -> list[tuple[int, int, float]]:
    """For each end that is set: where the run is, where it ends, and its rate."""
    settings = status.settings
    both = [
        (status.iteration.number, settings.stop_after_gradients, rates.gradients if rates else 0.0),
        (status.samples, settings.stop_after_samples, rates.samples if rates else 0.0),
    ]
    return [(done, end, per_second) for done, end, per_second in both if end]


def refusals(status: pb.GetStatusResponse) -> str:
    """By reason, the most frequent first."""
    counts = sorted(status.refusals.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in counts) or "none"


def _evaluation(status: pb.GetStatusResponse) -> str:
    if not status.HasField("evaluation"):
        return NOT_KNOWN
    found = status.evaluation
    accuracy = f"accuracy {found.accuracy:.1%}, " if found.HasField("accuracy") else ""
    return f"{accuracy}loss {found.loss:.4f} at iteration {found.iteration.number:,}"


def _checkpoint(status: pb.GetStatusResponse) -> str:
    if not status.checkpoint_path:
        return "none"
    age = f", {duration(status.checkpoint_age_seconds)} ago" if status.HasField("checkpoint_age_seconds") else ""
    return f"iteration {status.checkpoint_iteration:,}{age}"


NOT_KNOWN = "–"
_STEPS = (("s", 60), ("min", 60), ("h", 24), ("d", 0))
_UNITS = ("B", "kB", "MB", "GB", "TB")


def shortened(text: str, width: int) -> str:
    """At most `width` letters of the text, from both ends: made-up worker ids differ in their last ones."""
    if len(text) <= width:
        return text
    tail = width // 2
    return f"{text[: width - tail - 1]}…{text[len(text) - tail :]}"


def phase_word(phase: int) -> str:
    """What the server is doing, in one lower-case word; a newer server may know more than this program."""
    return PHASES.get(phase, f"phase_{phase}")


def duration(seconds: float) -> str:
    """Such as 4.2 s, 3 min 20 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return NOT_KNOWN
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    smaller, number = "", round(seconds)
    for unit, size in _STEPS:
        if not size or number < size:
            return f"{number} {unit}{smaller}"
        number, rest = divmod(number, size)
        smaller = f" {rest} {unit}" if rest else ""
    raise AssertionError("the last unit has no end")


def memory(size: float) -> str:
    """Such as 273 MB, 1.5 GB."""
    unit = 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {_UNITS[unit]}" if size < 1000 else f"{size:.0f} {_UNITS[unit]}"


def rate(per_second: float | None) -> str:
    """Per second, such as 0.25, 3.4, 6,784."""
    if per_second is None:
        return NOT_KNOWN
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"
