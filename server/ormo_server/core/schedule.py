"""Learning-rate schedules, as functions of the iteration."""

import math
from dataclasses import dataclass

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
