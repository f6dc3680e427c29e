"""What every update rule is: a formula, the vectors that it keeps, and the memory that it needs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from ormo_server.core.keys import SlotKey


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The numbers of a formula that stay the same throughout a run.

    Attributes:
        momentum: β, in [0, 1).
        delay_compensation: λ of `dc`, at least 0.
    """

    momentum: float
    delay_compensation: float = 0.0


class Landing(NamedTuple):
    """Where one gradient lands and how much it counts.

    Attributes:
        step_size: η, the learning rate in force, times the step scale.
        opened_buckets: m, how far this gradient moved the newest bucket; usually 0 or 1.
        lag_buckets: l, the newest bucket (after it moved) less the gradient's.
        bucket_size: K as it is now.
        slot: the place the ticket was held in, for rules that keep a vector per slot.
    """

    step_size: float
    opened_buckets: int
    lag_buckets: int
    bucket_size: int
    slot: SlotKey


class Sending(NamedTuple):
    """What a delivery may depend on besides the rule's vectors.

    Attributes:
        learning_rate: η in force.
        bucket_size: K as it is now.
    """

    learning_rate: float
    bucket_size: int


class UpdateRule(ABC):
    """Moves the parameters by gradients. One object serves one run and owns the rule's vectors.

    Attributes:
        coefficients: the numbers of the formula.
        vectors: the rule's state by name, each of shape (d,), float32; checkpoints hold it.
        counters: the rest of the rule's state; checkpoints hold it.
        vectors_per_run: how many vectors of the model's size it keeps, for the memory formula.
        vectors_per_slot: how many more it may keep for each slot of a live worker.
        vectors_moved: how many vectors an update must read from memory or write to it. A copy of one moves two, which
            bounds how fast the rule can be.
        keeps_deliveries: whether `ticket_delivered` does anything.
    """

    vectors_per_run: ClassVar[int] = 0
    vectors_per_slot: ClassVar[int] = 0
    vectors_moved: ClassVar[int]
    keeps_deliveries: ClassVar[bool] = False

    def __init__(self, elements: int, coefficients: Coefficients) -> None:
        self.coefficients = coefficients
        self.vectors: dict[str, torch.Tensor] = self.fresh_vectors(elements)
        self.counters: dict[str, int] = {}

    def fresh_vectors(self, elements: int) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """The vectors at the start of a run."""
        return {}

    @abstractmethod
    def apply(self, params: torch.Tensor, gradient: torch.Tensor, landing: Landing) -> None:
        """Move the parameters, in place.

        Args:
            params: w, shape (d,), float32, changed in place.
            gradient: g, shape (d,), float32 or bfloat16, finite; read block by block, never written.
            landing: where it counts.
        """

    def write_delivery(
        self,
        params: torch.Tensor,
        out: torch.Tensor,
        sending: Sending,  # noqa: ARG002
        part: slice = slice(None),
    ) -> None:
        """Write a part of what a ticketed delivery carries into `out`, shape (d,), float32 or bfloat16.

        By default that is w. Reads only what the next gradient changes, so that it may go on until then.
        """
        out[part].copy_(params[part])

    def ticket_delivered(self, slot: SlotKey, sent: torch.Tensor) -> None:  # noqa: B027
        """These parameters, shape (d,), went out with the slot's ticket: keep what the formula will ask for."""

    def slot_closed(self, slot: SlotKey) -> None:  # noqa: B027
        """The slot's worker is gone: drop what was kept for it."""


def geometric_sum(ratio: float, terms: int) -> float:
    """1 + ratio + … + ratio^(terms − 1), for a ratio in [0, 1)."""
    return (1.0 - ratio**terms) / (1.0 - ratio)
