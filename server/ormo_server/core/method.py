"""A method is a preset of five independent choices; a run is a method with its numbers."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from ormo_server.core.errors import SettingsError
from ormo_server.core.rules import UPDATE_RULES, Coefficients
from ormo_server.core.schedulers import SCHEDULERS
from ormo_server.core.step_size import STEP_SCALES, LearningRate

BUCKETS = ("sum", "mean")
# In multiples of K. A hundredth leaves nothing of a step, and no delay is a million times K.
LEAST_DELAY_THRESHOLD, MOST_DELAY_THRESHOLD = 0.01, 1e6
# Numbers whose square float32 does not hold, divided by this, are still small.
LEAST_EPSILON = 1e-10


@dataclass(frozen=True, slots=True)
class Method:
    """Update rule × step scale × discard × scheduler × bucket; any product of them may be set.

    Attributes:
        rule: a key of `UPDATE_RULES`.
        scale: a key of `STEP_SCALES`.
        scheduler: a key of `SCHEDULERS`.
        discard_delay: R; a gradient with a delay of R or more is not applied (Ringmaster ASGD, Maranjyan et al.
            2025, whose authors also restart a computation as soon as it has become too late; here it runs to its end,
            and its gradient is discarded). None: every gradient is applied, unless `discard_buckets` says otherwise.
        discard_buckets: R in multiples of K as it is when the gradient comes, where R is not given.
        staleness_bound: s, which no applied gradient's delay exceeds; for the bounded-staleness scheduler, and only for
            it.
        delay_threshold: the delay, in multiples of K, up to which the delay-adaptive scale, or the factor of `fadas`,
            is 1.
        bucket: `sum`: each gradient counts in full; `mean`: as its share of the bucket, see `Scheduler.weight_in_mean`.
        name: what people call it.

    Raises:
        SettingsError: a name that is not known, R below 1, s below 0, s missing or out of place, or a delay threshold
            outside its limits.
    """

    rule: str = "ormo"
    scale: str = "constant"
    scheduler: str = "asynchronous"
    discard_delay: int | None = None
    discard_buckets: int | None = None
    staleness_bound: int | None = None
    delay_threshold: float = 2.0
    bucket: str = "sum"
    name: str = "custom"

    def __post_init__(self) -> None:
        _known("update rule", self.rule, UPDATE_RULES)
        _known("step scale", self.scale, STEP_SCALES)
        _known("scheduler", self.scheduler, SCHEDULERS)
        _known("bucket", self.bucket, BUCKETS)
        if self.bucket == "mean" and not UPDATE_RULES[self.rule].takes_mean_of_bucket:
            raise SettingsError(
                f"bucket 'mean' with the update rule {self.rule!r}, which averages by itself: use bucket 'sum'"
            )
        if not LEAST_DELAY_THRESHOLD <= self.delay_threshold <= MOST_DELAY_THRESHOLD:
            raise SettingsError(
                f"delay threshold {self.delay_threshold}: expected {LEAST_DELAY_THRESHOLD:g} to "
                f"{MOST_DELAY_THRESHOLD:g}, in multiples of K"
            )
        if self.discard_delay is not None and self.discard_delay < 1:
            raise SettingsError(f"discard delay {self.discard_delay}: expected at least 1")
        if self.discard_buckets is not None and self.discard_buckets < 1:
            raise SettingsError(f"discard delay of {self.discard_buckets} buckets: expected at least 1")
        self._check_staleness_bound()

    def _check_staleness_bound(self) -> None:
        bound, wanted = self.staleness_bound, SCHEDULERS[self.scheduler].takes_staleness_bound
        if wanted and bound is None:
            raise SettingsError(
                f"the {self.scheduler} scheduler needs a staleness bound: the largest delay that an applied gradient "
                "may have, at least K - 1 for all workers to be busy at once, 2K - 2 for equally fast ones not to wait"
            )
        if not wanted and bound is not None:
            raise SettingsError(
                f"staleness bound {bound} with the {self.scheduler} scheduler, which has none: leave it out, or choose "
                "the scheduler bounded-staleness"
            )
        if bound is not None and bound < 0:
            raise SettingsError(f"staleness bound {bound}: expected at least 0")

    def spelt_out(self) -> str:
        """The choices in words, for a method that is no preset."""
        limit = f"{self.discard_buckets}K" if self.discard_delay is None else f"{self.discard_delay}"
        choices = (
            self.rule,
            f"{self.scale} from {self.delay_threshold:g}K" if self.scale == "delay-adaptive" else self.scale,
            self.scheduler if self.staleness_bound is None else f"{self.scheduler} {self.staleness_bound}",
            "" if self.discard_limit(1) is None else f"discard from {limit}",
            "mean of buckets" if self.bucket == "mean" else "",
        )
        return " × ".join(filter(None, choices))

    @property
    def is_for_local_steps(self) -> bool:
        """Whether it is made for pseudo-gradients: each is the progress of a machine, so a bucket is their mean."""
        return self.bucket == "mean"

    def discard_limit(self, bucket_size: int) -> int | None:
        """R: a gradient with this delay or more is not applied; None if every gradient is."""
        if self.discard_delay is None and self.discard_buckets is not None:
            return self.discard_buckets * bucket_size
        return self.discard_delay


def _known(what: str, name: str, table: Collection[str]) -> None:
    if name not in table:
        raise SettingsError(f"{what} {name!r} is not known: choose one of {', '.join(table)}")


PRESETS: dict[str, Method] = {
    method.name: method
    for method in (
        # The ten that the OrMo paper compares.
        Method(name="ormo", rule="ormo"),
        Method(name="ormo-da", rule="ormo", scale="delay-adaptive"),
        Method(name="ormo-vanilla", rule="ormo-vanilla"),
        Method(name="asgd", rule="sgd"),
        Method(name="asgd-da", rule="sgd", scale="delay-adaptive", delay_threshold=1.0),
        Method(name="asgdm", rule="naive"),
        Method(name="shifted", rule="shifted"),
        Method(name="smega2", rule="smega2"),
        Method(name="ssgdm", rule="ormo", scheduler="synchronous"),
        Method(name="ssgd", rule="sgd", scheduler="synchronous"),
        # Others.
        Method(name="ormo-nesterov", rule="ormo-nesterov"),
        Method(name="ringmaster", rule="sgd", discard_buckets=2),
        Method(name="asgd-tau", rule="sgd", scale="inverse"),
        Method(name="rescaled", rule="sgd", scale="rescaled"),
        Method(name="dc-asgd", rule="dc"),
        Method(name="fadas", rule="fadas", delay_threshold=1.0),
        # For local steps.
        Method(name="local-ormo", rule="ormo-nesterov", bucket="mean"),
        Method(name="local-ormo-polyak", rule="ormo", bucket="mean"),
        Method(name="diloco", rule="ormo-nesterov", scheduler="synchronous", bucket="mean"),
        Method(name="local-sgd", rule="sgd", bucket="mean"),
        Method(name="local-sgd-poly", rule="sgd", scale="polynomial", bucket="mean"),
        Method(name="naive-nesterov", rule="naive-nesterov", bucket="mean"),
        Method(name="delayed-nesterov", rule="delayed-nesterov", bucket="mean"),
    )
}


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that decides how the state moves, besides the inputs.

    Attributes:
        method: the five choices.
        learning_rate: the schedule of η.
        momentum: β, in [0, 1).
        bucket_size: a fixed K, or None for the number of slots of the live workers.
        min_workers: no ticket of a new run is handed out before so many have joined.
        max_workers: further ones are refused.
        stop_after_gradients: the run ends at this iteration; 0 for never.
        stop_after_samples: the run ends when so many samples are counted; 0 for never.
        seed: where the workers' data seeds come from.
        delay_compensation: λ of the update rule `dc`, at least 0.
        second_momentum: β₂ of the update rule `fadas`, in [0, 1).
        epsilon: ε of it, from `LEAST_EPSILON` to 1.
        initial_second_moment: v̂₀ of it, from 0 to 1e6.
        local_steps: H: a push is the sum of up to so many steps of the worker's own optimizer; 0: a gradient.
        local_steps_by_speed: workers make fewer, the slower they are; see `pace`.
        waits_for_idle: a round waits for every worker, also for one that let its last ticket lapse, and whoever joins
            waits for the next round. No run begins like this any more; files of earlier versions do.

    Raises:
        SettingsError: a value outside its limits, or values that contradict each other.
    """

    learning_rate: LearningRate
    method: Method = field(default_factory=Method)
    momentum: float = 0.9
    bucket_size: int | None = None
    min_workers: int = 1
    max_workers: int = 64
    stop_after_gradients: int = 0
    stop_after_samples: int = 0
    seed: int = 0
    delay_compensation: float = 0.04
    second_momentum: float = 0.99
    epsilon: float = 1e-8
    initial_second_moment: float = 0.0
    local_steps: int = 0
    local_steps_by_speed: bool = False
    waits_for_idle: bool = False

    def __post_init__(self) -> None:
        self._check_coefficients()
        if self.bucket_size is not None and self.bucket_size < 1:
            raise SettingsError(f"bucket size {self.bucket_size}: expected at least 1")
        if not 1 <= self.min_workers <= self.max_workers:
            raise SettingsError(
                f"min workers {self.min_workers}, max workers {self.max_workers}: expected 1 <= min <= max"
            )
        if self.stop_after_gradients < 0 or self.stop_after_samples < 0:
            raise SettingsError("a run stops after a number of gradients or samples of at least 0 (0 for never)")
        if self.local_steps < 0:
            raise SettingsError(f"local steps {self.local_steps}: expected at least 0 (0 for gradients)")
        if self.local_steps_by_speed and not self.local_steps:
            raise SettingsError("local steps by speed in a run without local steps: set how many the fastest makes")
        if self.bucket_size is not None and not SCHEDULERS[self.method.scheduler].takes_fixed_bucket_size:
            raise SettingsError(
                f"bucket size {self.bucket_size} with the {self.method.scheduler} scheduler: its buckets are its "
                "rounds, leave the bucket size out"
            )

    def _check_coefficients(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise SettingsError(f"momentum {self.momentum}: expected at least 0 and below 1")
        if not (math.isfinite(self.delay_compensation) and self.delay_compensation >= 0):
            raise SettingsError(f"delay compensation {self.delay_compensation}: expected a finite number of at least 0")
        if not 0.0 <= self.second_momentum < 1.0:
            raise SettingsError(f"second momentum {self.second_momentum}: expected at least 0 and below 1")
        if not LEAST_EPSILON <= self.epsilon <= 1.0:
            raise SettingsError(f"epsilon {self.epsilon}: expected {LEAST_EPSILON:g} to 1")
        if not 0.0 <= self.initial_second_moment <= 1e6:
            raise SettingsError(f"initial second moment {self.initial_second_moment}: expected 0 to 1e+06")

    @property
    def coefficients(self) -> Coefficients:
        """The numbers that the update rule goes by."""
        return Coefficients(
            momentum=self.momentum,
            delay_compensation=self.delay_compensation,
            second_momentum=self.second_momentum,
            epsilon=self.epsilon,
            initial_second_moment=self.initial_second_moment,
            delay_threshold=self.method.delay_threshold,
        )


# How much memory a run needs: stated before it is taken.


_BYTES_PER_NUMBER = 4


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes beyond the interpreter, by what takes them.

    Attributes:
        state_bytes: w, the rule's vectors, and the model's buffers.
        exchange_bytes: for each exchange that may be under way one buffer of the model's size; or two, for the sum of
            local steps in int8 and parameters in bfloat16, where those are larger together.
        checkpoint_bytes: the copy that is being written.
    """

    state_bytes: int
    exchange_bytes: int
    checkpoint_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.state_bytes + self.exchange_bytes + self.checkpoint_bytes


def memory_need(run: Run, elements: int, slots: int, buffer_bytes: int = 0, scales: int = 0) -> MemoryNeed:
    """What a model needs.

    Args:
        run: the method's vectors, and whether there are local steps.
        elements: numbers that are trained.
        slots: in-flight places.
        buffer_bytes: what the model has besides.
        scales: of a gradient in int8: one for each of its blocks.
    """
    rule = UPDATE_RULES[run.method.rule]
    vectors = 1 + len(rule.vectors_of_run) + rule.vectors_per_slot * slots
    # A scheduler whose workers wait for each other keeps the parameters of the round's opening.
    vectors += SCHEDULERS[run.method.scheduler].keeps_opening
    vector_bytes = elements * _BYTES_PER_NUMBER
    state_bytes = vectors * vector_bytes + buffer_bytes
    exchange_bytes = vector_bytes + buffer_bytes
    if run.local_steps:
        # 1 byte a number up and 2 down, and the buffers in both; workers may send float32 all the same.
        exchange_bytes = max(exchange_bytes, 3 * elements + _BYTES_PER_NUMBER * scales + 2 * buffer_bytes)
    return MemoryNeed(state_bytes, slots * exchange_bytes, state_bytes)
