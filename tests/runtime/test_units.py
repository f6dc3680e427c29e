"""The name of every number that is set says what it counts."""

from typing import get_args

import pytest
from pydantic import ByteSize, Field

from ormo_runtime.settings import Settings
from runtime.programs_settings import CLASSES

# What a number may be of. One of these words is in its name.
UNITS = frozenset(
    """
    seconds bytes gradients steps samples epochs workers readers slots processes threads checkpoints rates seeds
    gpus cpus restarts
    """.split()  # noqa: SIM905
)
# Numbers without a unit, or of a kind that the documentation has a word for.
WITHOUT = {
    "the update rule's own": {"momentum", "learning_rate", "final_learning_rate", "weight_decay", "milestone_factor"}
    | {"delay_compensation", "max_gradient_norm", "second_momentum", "epsilon", "initial_second_moment"}
    | {"inner_lr"},
    "of 1": {"max_refused_share", "target_accuracy", "inner_warmup"},
    "a factor": {"slow_factor"},
    "delays, which are counted in gradients, or in K, by definition": {"staleness_bound", "discard_delay"}
    | {"delay_threshold"},
    "names of the algorithm that checkpoints, traces and results have": {"bucket_size", "milestones", "batch_size"},
    "gradients under way; also an argument in Python": {"in_flight"},
    "how many workers have them": {"worker_series"},
    "where random numbers begin": {"seed"},
    "a number that names": {"server_port"},
}


def without_unit(cls: type[Settings]) -> set[str]:
    """The numbers of these settings whose name does not say what they are of."""
    known = frozenset().union(*WITHOUT.values())
    numbers = {name for name, info in cls.model_fields.items() if _numbers(info.annotation)}
    return {name for name in numbers - known if not UNITS & set(name.split("_"))}


def _numbers(annotation: object) -> bool:
    return annotation in (int, float, ByteSize) or any(map(_numbers, get_args(annotation)))


@pytest.mark.parametrize("cls", CLASSES)
def test_every_number_has_its_unit_in_its_name(cls: type[Settings]) -> None:
    assert without_unit(cls) == set()


def test_a_number_without_a_unit_is_found() -> None:
    class Added(Settings):
        patience: float = Field(1.0, description="seconds")
        bound: int | None = Field(None, description="of bytes")
        sizes: tuple[int, ...] = Field((), description="of what")
        limit: ByteSize = Field(ByteSize(1), description="of memory")
        wait_seconds: float = Field(1.0, description="fine")
        name: str = Field("", description="no number")

    assert without_unit(Added) == {"patience", "bound", "sizes", "limit"}


def test_what_needs_no_unit_is_still_a_setting() -> None:
    assert frozenset().union(*WITHOUT.values()) <= {name for cls in CLASSES for name in cls.model_fields}
