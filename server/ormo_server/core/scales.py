"""Step scales: how much of the learning rate a gradient gets, by its delay. A new one is a function and a row."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """What a step scale may look at.

    Attributes:
        delay: τ, gradients applied between the ticket's parameters and this gradient.
        bucket_size: K as it is when the gradient is applied.
    """

    delay: int
    bucket_size: int


def constant(timing: Timing) -> float:  # noqa: ARG001
    """1: every gradient counts in full."""
    return 1.0


def delay_adaptive(timing: Timing) -> float:
    """1 up to a delay of 2K, then 2K/τ: the paper's min(η, 1/(4Lτ)) with η = 1/(8KL) (OrMo-DA)."""
    return min(1.0, 2.0 * timing.bucket_size / max(1, timing.delay))


def inverse(timing: Timing) -> float:
    """1/τ for a delay τ above 1 (staleness-aware ASGD, Zhang et al. 2016)."""
    return 1.0 / max(1, timing.delay)


STEP_SCALES: dict[str, Callable[[Timing], float]] = {
    "constant": constant,
    "delay-adaptive": delay_adaptive,
    "inverse": inverse,
}
