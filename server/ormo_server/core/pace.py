"""How many local steps a worker makes for a ticket: fewer where it is slower, so that all push about equally often.

Source: Liu et al. 2024, Asynchronous Local-SGD Training for Language Modeling, arXiv 2401.09135 (dynamic local
updates). Theirs are set before the run, by measured speeds; these follow what the pushes show.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

# How much the latest push counts: a worker's other speed shows within some eight, and one step that took long, such as
# the first, is forgotten within as many.
_SMOOTHING = 0.25
# Nobody makes fewer than this share of the steps: the sum of very few hardly differs from a gradient.
_LEAST_SHARE = 1 / 8
# Two clock readings may be the same: no time counts as shorter than this.
_SHORTEST_SECONDS = 1e-9


@dataclass(frozen=True, slots=True)
class Pace:
    """What a worker's pushes showed of its speed.

    Attributes:
        steps, seconds: local steps in a push, and the time that they took, smoothed each on its own: two slots may push
            nearly at once, and a mean of quotients by that little time would be anything.
        pushed_seconds: when the last push came.
    """

    steps: float
    seconds: float
    pushed_seconds: float

    @property
    def steps_per_second(self) -> float:
        """v, the worker's speed."""
        return self.steps / max(self.seconds, _SHORTEST_SECONDS)


def after_push(before: Pace | None, local_steps: int, handed_out_seconds: float, now: float) -> Pace:
    """The pace once a push has come.

    Its time runs from the worker's push before, or from its ticket, whichever was later: what a worker waited for its
    ticket is not its own slowness.

    Args:
        before: None for the worker's first push.
        local_steps: in the push.
        handed_out_seconds: when its ticket was.
        now: by the same clock.
    """
    if before is None:
        return Pace(local_steps, now - handed_out_seconds, now)
    seconds = now - max(handed_out_seconds, before.pushed_seconds)
    return Pace(
        before.steps + _SMOOTHING * (local_steps - before.steps),
        before.seconds + _SMOOTHING * (seconds - before.seconds),
        now,
    )


def steps_for(most: int, mine: Pace | None, of_all: Iterable[Pace | None]) -> int:
    """H_w = clamp(round(H · v / v_max), H/8, H): the local steps of a worker's next ticket.

    Args:
        most: H.
        mine: None before the worker's first push: then it makes all.
        of_all: of all live workers, this one too.
    """
    if mine is None:
        return most
    fastest = max(pace.steps_per_second for pace in of_all if pace is not None)
    return min(most, max(math.ceil(most * _LEAST_SHARE), round(most * mine.steps_per_second / fastest)))
