"""What a gradient is multiplied by: the learning rate, as a function of the iteration, and its share by delay."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ormo_server.core.errors import SettingsError

KINDS = ("constant", "milestones", "cosine")
# Of η. Nobody trains by a smaller or a larger one: it is a slip of the hand, and update rules count on the upper one.
LOWEST, HIGHEST = 1e-15, 1e6


@dataclass(frozen=True, slots=True)
class Tuning:
    """The operator's word on the learning rate, while the run goes on.

    Attributes:
        peak: η after the warm-up.
        instead_of: what the settings said then. Once they say something else, they are newer than this.
    """

    peak: float
    instead_of: float


@dataclass(frozen=True, slots=True)
class LearningRate:
    """The learning rate η at every iteration; a linear warm-up may go before any kind.

    Attributes:
        peak: η after the warm-up, from `LOWEST` to `HIGHEST`.
        kind: `constant`; `milestones`: times `factor` at each of `milestones`; `cosine`: down to `final` over
            `cosine_gradients`.
        warmup_gradients: η rises linearly from peak/warmup to peak over so many gradients; 0 for none.
        milestones: rising iterations.
        factor: in (0, 1] usually; above 0. η is at most `HIGHEST` after the last milestone, too.
        cosine_gradients: iteration at which the cosine ends; it stays at `final` after it.
        final: where the cosine ends, from 0 to `HIGHEST`.

    Raises:
        SettingsError: a value outside its limits.
    """

    peak: float
    kind: str = "constant"
    warmup_gradients: int = 0
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    cosine_gradients: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        if not LOWEST <= self.peak <= HIGHEST:
            raise SettingsError(f"learning rate {self.peak}: expected {LOWEST:g} to {HIGHEST:g}")
        if self.kind not in KINDS:
            raise SettingsError(f"schedule {self.kind!r} is not known: choose one of {', '.join(KINDS)}")
        if self.kind == "milestones" and list(self.milestones) != sorted(set(self.milestones)):
            raise SettingsError(f"milestones {self.milestones}: expected rising iterations, each once")
        if self.kind == "milestones" and not self.milestones:
            raise SettingsError("schedule 'milestones' needs at least one milestone")
        if self.kind == "cosine" and self.cosine_gradients <= self.warmup_gradients:
            raise SettingsError(
                f"a cosine over {self.cosine_gradients} gradients after a warm-up of {self.warmup_gradients}: the "
                "cosine must end after the warm-up"
            )
        if self.warmup_gradients < 0:
            raise SettingsError(f"a warm-up of {self.warmup_gradients} gradients: expected at least 0")
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise SettingsError(f"milestone factor {self.factor}: expected a finite number above 0")
        # By logarithms, as the power itself may be too large for a float.
        if math.log(self.peak) + len(self.milestones) * math.log(self.factor) > math.log(HIGHEST):
            raise SettingsError(
                f"learning rate {self.peak} times {self.factor} at each of {len(self.milestones)} milestones: expected "
                f"at most {HIGHEST:g} at the end"
            )
        if not 0 <= self.final <= HIGHEST:
            raise SettingsError(f"final learning rate {self.final}: expected 0 to {HIGHEST:g}")

    def at(self, iteration: int) -> float:
        """η at iteration t ≥ 0."""
        if iteration < self.warmup_gradients:
            return self.peak * (iteration + 1) / self.warmup_gradients
        if self.kind == "milestones":
            return self.peak * self.factor ** sum(iteration >= milestone for milestone in self.milestones)
        if self.kind == "cosine":
            return self._cosine(iteration)
        return self.peak

    def _cosine(self, iteration: int) -> float:
        span = self.cosine_gradients - self.warmup_gradients
        progress = min(1.0, (iteration - self.warmup_gradients) / span)
        return self.final + (self.peak - self.final) * (1.0 + math.cos(math.pi * progress)) / 2.0


# Step scales: how much of the learning rate a gradient gets, by its delay. A new one is a function and a row.


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


def polynomial(timing: Timing) -> float:
    """(1 + τ)^(−1/2) (Xie, Koyejo, Gupta: Asynchronous Federated Optimization, arXiv 1903.03934, a = 1/2)."""
    return 1.0 / math.sqrt(1.0 + timing.delay)


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
    "polynomial": polynomial,
    "rescaled": rescaled,
}
