"""Step scales: how much of the learning rate a gradient gets, by its delay. A new one is a function and a row."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

# Two clock readings may be the same: no time counts as shorter than this.
_SHORTEST_SECONDS = 1e-9


def _of_nobody() -> Iterable[float]:
    return ()


class Timing(NamedTuple):
    """What a step scale may look at.

    Attributes:
        delay: τ, gradients applied between the ticket's parameters and this gradient.
        bucket_size: K as it is when the gradient is applied.
        delay_threshold: delay, in multiples of K, up to which the delay-adaptive scale is 1.
        seconds: T_k, from ticket to push, of this gradient.
        seconds_of_slots: T_j, the same of the last gradient of every live slot that has pushed one, this one's too. A
            function, because few scales ask.
    """

    delay: int
    bucket_size: int
    delay_threshold: float = 2.0
    seconds: float = 0.0
    seconds_of_slots: Callable[[], Iterable[float]] = _of_nobody


def constant(timing: Timing) -> float:  # noqa: ARG001
    """1: every gradient counts in full."""
    return 1.0


def delay_adaptive(timing: Timing) -> float:
    """1 up to a delay of cK, then cK/τ, where c is the threshold.

    Both sources have min(η, 1/(4Lτ)) above it. With η = 1/(4KL) that is c = 1 (Koloskova, Stich, Jaggi 2022, eq. 11,
    whose threshold is the concurrency), with η = 1/(8KL) it is c = 2 (OrMo-DA; Shi, Yang, Li 2024).
    """
    return min(1.0, timing.delay_threshold * timing.bucket_size / max(1, timing.delay))


def inverse(timing: Timing) -> float:
    """1/τ for a delay τ above 1 (staleness-aware ASGD, Zhang et al. 2016)."""
    return 1.0 / max(1, timing.delay)


def rescaled(timing: Timing) -> float:
    """T_k · mean_j(1/T_j): every slot moves the parameters alike, however often it pushes.

    Slot j pushes 1/T_j times a second, so over the updates the mean of the scale is 1. Meant for workers with data of
    their own, which would else count by their speed.
    """
    slots = list(timing.seconds_of_slots())
    if not slots:
        return 1.0
    rates = [1.0 / max(seconds, _SHORTEST_SECONDS) for seconds in slots]
    return max(timing.seconds, _SHORTEST_SECONDS) * sum(rates) / len(rates)


STEP_SCALES: dict[str, Callable[[Timing], float]] = {
    "constant": constant,
    "delay-adaptive": delay_adaptive,
    "inverse": inverse,
    "rescaled": rescaled,
}
