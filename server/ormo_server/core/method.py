"""A method is a preset of four independent choices; a run is a method with its numbers."""

from dataclasses import dataclass, field

from ormo_server.core.errors import SettingsError
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.core.scales import STEP_SCALES
from ormo_server.core.schedule import LearningRate
from ormo_server.core.schedulers import SCHEDULERS


@dataclass(frozen=True, slots=True)
class Method:
    """Update rule × step scale × discard × scheduler; any product of them may be set.

    Attributes:
        rule: a key of `UPDATE_RULES`.
        scale: a key of `STEP_SCALES`.
        scheduler: a key of `SCHEDULERS`.
        discard_delay: R; a gradient with a delay of R or more is not applied (Ringmaster ASGD, Maranjyan et al.
            2025). None: every gradient is applied.
        name: what people call it.

    Raises:
        SettingsError: a name that is not known, or R below 1.
    """

    rule: str = "ormo"
    scale: str = "constant"
    scheduler: str = "asynchronous"
    discard_delay: int | None = None
    name: str = "custom"

    def __post_init__(self) -> None:
        _known("update rule", self.rule, UPDATE_RULES)
        _known("step scale", self.scale, STEP_SCALES)
        _known("scheduler", self.scheduler, SCHEDULERS)
        if self.discard_delay is not None and self.discard_delay < 1:
            raise SettingsError(f"discard delay {self.discard_delay}: expected at least 1")


def _known(what: str, name: str, table: object) -> None:
    assert isinstance(table, dict)
    if name not in table:
        raise SettingsError(f"{what} {name!r} is not known: choose one of {', '.join(table)}")


PRESETS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(name="ormo", rule="ormo"),
        Method(name="asgd", rule="sgd"),
        Method(name="ssgdm", rule="ormo", scheduler="synchronous"),
        Method(name="ssgd", rule="sgd", scheduler="synchronous"),
    )
}


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that decides how the state moves, besides the inputs.

    Attributes:
        method: the four choices.
        learning_rate: the schedule of η.
        momentum: β, in [0, 1).
        bucket_size: a fixed K, or None for the number of slots of the live workers.
        min_workers: no ticket of a new run is handed out before so many have joined.
        max_workers: further ones are refused.
        stop_after_gradients: the run ends at this iteration; 0 for never.
        stop_after_samples: the run ends when so many samples are counted; 0 for never.
        seed: where the workers' data seeds come from.

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

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise SettingsError(f"momentum {self.momentum}: expected at least 0 and below 1")
        if self.bucket_size is not None and self.bucket_size < 1:
            raise SettingsError(f"bucket size {self.bucket_size}: expected at least 1")
        if not 1 <= self.min_workers <= self.max_workers:
            raise SettingsError(
                f"min workers {self.min_workers}, max workers {self.max_workers}: expected 1 <= min <= max"
            )
        if self.stop_after_gradients < 0 or self.stop_after_samples < 0:
            raise SettingsError("a run stops after a number of gradients or samples of at least 0 (0 for never)")
        if self.bucket_size is not None and not SCHEDULERS[self.method.scheduler].takes_fixed_bucket_size:
            raise SettingsError(
                f"bucket size {self.bucket_size} with the {self.method.scheduler} scheduler: its buckets are its "
                "rounds, leave the bucket size out"
            )
