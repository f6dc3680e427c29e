"""What every update rule is: a formula, the vectors that it keeps, and the memory that it needs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from ormo_server.core.ids import SlotKey
from ormo_server.core.vectors import Vector, largest

# Why no gradient that is taken can make the state infinite, however many come.
#
# A float32 x with |x| ≤ B stays there when something below B/2^25 is added: that is less than half of the distance from
# B to the next float32, and rounding keeps the order of numbers. So with B = LARGEST for w, which is so far below
# float32's range (2^128) that twice it, and it in bfloat16, are finite:
#   - w moves by at most ηg/(1 − β) of the gradient and βu/(1 − β) of the momentum: both must be below LARGEST/2^26;
#   - so u must stay below (1 − β) LARGEST/2^26, and what is added to it, ηg, below (1 − β) LARGEST/2^51.
# One factor 2 more is for the norm, whose own rounding may make it a little less than an element of g.
LARGEST = 2.0**126
LARGEST_STEP = LARGEST / 2.0**52

_WHOLE = slice(None)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The numbers of a formula that stay the same throughout a run.

    Attributes:
        momentum: β, in [0, 1).
        delay_compensation: λ of `dc`, at least 0.
        second_momentum: β₂ of `fadas`, in [0, 1).
        epsilon: ε of `fadas`, above 0.
        initial_second_moment: v̂₀ of `fadas`, at least 0.
        delay_threshold: τ_c of `fadas`, in multiples of K gradients.
    """

    momentum: float
    delay_compensation: float = 0.0
    second_momentum: float = 0.99
    epsilon: float = 1e-8
    initial_second_moment: float = 0.0
    delay_threshold: float = 1.0


class Landing(NamedTuple):
    """Where one gradient lands and how much it counts.

    Attributes:
        step_size: η, the learning rate in force, times the step scale, times the weight in the bucket's mean if that is
            what counts. No rule divides again.
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
        vectors_of_run: names of the vectors of the model's size that it keeps, all 0 at first; the memory formula
            counts them.
        vectors_per_slot: how many more vectors it may keep for each slot of a live worker.
        vectors_moved: how many vectors an update must read from memory or write to it. A copy of one moves two, which
            bounds how fast the rule can be.
        keeps_deliveries: whether `ticket_delivered` does anything.
        takes_mean_of_bucket: whether gradients may come with the weight that makes a bucket's sum its mean; not where
            the rule averages by itself.
    """

    vectors_of_run: ClassVar[tuple[str, ...]] = ()
    vectors_per_slot: ClassVar[int] = 0
    vectors_moved: ClassVar[int]
    keeps_deliveries: ClassVar[bool] = False
    takes_mean_of_bucket: ClassVar[bool] = True

    def __init__(self, elements: int, coefficients: Coefficients) -> None:
        self.coefficients = coefficients
        self.vectors: dict[str, torch.Tensor] = {
            name: torch.zeros(elements, dtype=torch.float32, device="cpu") for name in self.vectors_of_run
        }
        self.counters: dict[str, int] = {}

    def stays_finite(self, params: torch.Tensor, norm: float, landing: Landing) -> bool:  # noqa: ARG002
        """Whether `apply` surely overflows nowhere with a gradient of this Euclidean norm, which no element exceeds.

        With w_0 up to `LARGEST`, η up to `step_size.HIGHEST`, and this asked of each gradient before, no delivery does
        either. A rule that adds more to a vector than ηg, or multiplies by w, must say so here.
        """
        return max(1.0, norm) * landing.step_size <= LARGEST_STEP * (1.0 - self.coefficients.momentum)

    def in_bounds(self, params: torch.Tensor) -> bool:
        """Whether this state is one that `stays_finite` counts on; a server that did not ask it may have left others.

        Any gradient may make them infinite, since what they have of momentum goes on to move w.
        """
        bound = self.largest_element()
        return largest(params) <= LARGEST and all(largest(vector) <= bound for vector in self.vectors.values())

    def largest_element(self) -> float:
        """What no element of `vectors` exceeds, by the argument of `LARGEST`."""
        return (1.0 - self.coefficients.momentum) * LARGEST / 2.0**26

    @abstractmethod
    def apply(self, params: torch.Tensor, gradient: Vector, landing: Landing) -> None:
        """Move the parameters, in place.

        Args:
            params: w, shape (d,), float32, changed in place.
            gradient: g, shape (d,), finite; read block by block, each of float32 or bfloat16, and never written.
            landing: where it counts.
        """

    def write_delivery(
        self,
        params: torch.Tensor,
        out: torch.Tensor,
        sending: Sending,  # noqa: ARG002
        part: slice = _WHOLE,
    ) -> None:
        """Write a part of what a ticketed delivery carries into `out`, shape (d,), float32 or bfloat16.

        By default that is w. Reads only what the next gradient changes, so that it may go on until then.
        """
        if part == _WHOLE:  # then slicing is most of the cost for a small model
            out.copy_(params)
        else:
            out[part].copy_(params[part])

    def ticket_handed_out(self, slot: SlotKey) -> None:  # noqa: B027
        """The slot has a new ticket whose gradient may come late; not asked in rounds, where none is."""

    def ticket_delivered(self, slot: SlotKey, sent: torch.Tensor) -> None:  # noqa: B027
        """These parameters, shape (d,), went out with the slot's ticket: keep what the formula will ask for."""

    def slot_closed(self, slot: SlotKey) -> None:  # noqa: B027
        """The slot's worker is gone: drop what was kept for it."""


def geometric_sum(ratio: float, terms: int) -> float:
    """1 + ratio + … + ratio^(terms − 1), for a ratio in [0, 1)."""
    return (1.0 - ratio**terms) / (1.0 - ratio)
