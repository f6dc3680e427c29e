"""What becomes of the server's buffers when a gradient brings a worker's.

Buffers are what a model keeps besides its parameters: running statistics, counters, masks, queues. NaN never gets into
the server's, and into an average no infinity: a tensor that comes with them where the server's has others is not taken.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from ormo_server.core.vectors import all_finite, has_nan

# All elements of some buffers in their section.
_Where = slice | torch.Tensor


class Merge(Enum):
    """How a buffer is merged."""

    AVERAGE = "b + (sent - b)/K: floating-point numbers"
    MAXIMUM = "the larger of two integers"
    LAST = "what was sent, bit for bit"


@dataclass(frozen=True, slots=True)
class Buffer:
    """One buffer's place in its section, and how it is merged.

    Attributes:
        start, stop: its elements.
        merge: how.
        is_double: the section of integers has the bits of its float64.
    """

    start: int
    stop: int
    merge: Merge
    is_double: bool = False


@dataclass(frozen=True, slots=True)
class Buffers:
    """A model's buffers, each section's one after the other.

    Attributes:
        floats: float32.
        ints: int64, and float64 among them.
    """

    floats: tuple[Buffer, ...] = ()
    ints: tuple[Buffer, ...] = ()

    @classmethod
    def unnamed(cls, floats: int, ints: int) -> "Buffers":
        """So many floats that are averaged and so many integers that grow, where nobody says which belong together."""
        return cls((Buffer(0, floats, Merge.AVERAGE),), (Buffer(0, ints, Merge.MAXIMUM),))


class Merging:
    """Merges the buffers of one model; what takes long to find out is found out once."""

    def __init__(self, buffers: Buffers) -> None:
        doubles = [buffer for buffer in buffers.ints if buffer.is_double]
        integers = [buffer for buffer in buffers.ints if not buffer.is_double]
        self._floats = _Floating(buffers.floats)
        self._doubles, self._doubles_at = _Floating(_closed_up(doubles)), _where(doubles)
        self._counters_at = _where(_of(Merge.MAXIMUM, integers))
        self._some_last = bool(_of(Merge.LAST, integers))

    def merge_floats(self, held: torch.Tensor, sent: torch.Tensor, weight: float) -> bool:
        """Change the server's, shape (f,), by those that were sent.

        Args:
            held: the server's.
            sent: the worker's.
            weight: of the worker's in an average.

        Returns:
            Whether a tensor stayed as it was, since it came with NaN or infinity.
        """
        return self._floats.merge(held, sent, weight)

    def merge_ints(self, held: torch.Tensor, sent: torch.Tensor, weight: float) -> bool:
        """As `merge_floats`, shape (i,)."""
        counters, doubles = self._counters_at, self._doubles_at
        largest = None if counters is None else torch.maximum(held[counters], sent[counters])
        bits, kept = None, False
        if doubles is not None:
            bits = held[doubles].clone()
            kept = self._doubles.merge(bits.view(torch.float64), sent[doubles].view(torch.float64), weight)
        if self._some_last:
            held.copy_(sent)
        if largest is not None and counters is not None:
            held[counters] = largest
        if bits is not None and doubles is not None:
            held[doubles] = bits
        return kept


class _Floating:
    """Buffers of floating-point numbers, which lie one after the other."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        present = [buffer for buffer in buffers if buffer.stop > buffer.start]
        self._places = [slice(buffer.start, buffer.stop) for buffer in present]
        self._starts = torch.tensor([place.start for place in self._places], dtype=torch.int64, device="cpu")
        self._averaged_at = _where(_of(Merge.AVERAGE, present))
        self._some_last = bool(_of(Merge.LAST, present))

    def merge(self, held: torch.Tensor, sent: torch.Tensor, weight: float) -> bool:
        averaged = self._averaged_at
        merged = None if averaged is None else torch.lerp(held[averaged], sent[averaged], weight)
        kept: list[tuple[slice, torch.Tensor]] = []
        suspect = merged is not None and not all_finite(merged)
        if suspect or (self._some_last and has_nan(sent)):
            kept = [(place, held[place].clone()) for place in self._not_taken(held, sent)]
        if suspect:
            merged = _averaged_with_care(held[averaged], sent[averaged], weight)
        if self._some_last:
            held.copy_(sent)
        if merged is not None and averaged is not None:
            held[averaged] = merged
        for place, values in kept:
            held[place] = values
        return bool(kept)

    def _not_taken(self, held: torch.Tensor, sent: torch.Tensor) -> list[slice]:
        """The tensors that were sent with NaN, or for an average with an infinity that the server's does not have."""
        bad = sent.isnan()
        averaged = self._averaged_at
        if averaged is not None:
            bad[averaged] |= sent[averaged].isinf() & (sent[averaged] != held[averaged])
        numbers = torch.searchsorted(self._starts, bad.nonzero().flatten(), right=True) - 1
        return [self._places[number] for number in sorted(set(numbers.tolist()))]


def _averaged_with_care(held: torch.Tensor, sent: torch.Tensor, weight: float) -> torch.Tensor:
    # The difference of two finite numbers may be too large for their type; their mean is not.
    if held.dtype == torch.float32:
        merged = torch.lerp(held.double(), sent.double(), weight).float()
    else:
        merged = torch.lerp(held, sent, weight)
        merged = torch.where(merged.isfinite(), merged, held * (1 - weight) + sent * weight)
    # An infinity that the model began with has no mean with anything: it stays, or gives way to a number.
    return torch.where(held.isfinite(), merged, sent)


def _of(merge: Merge, buffers: Iterable[Buffer]) -> list[Buffer]:
    return [buffer for buffer in buffers if buffer.merge is merge]


def _closed_up(buffers: Iterable[Buffer]) -> list[Buffer]:
    """The buffers as they lie in a vector of their own."""
    end, found = 0, []
    for buffer in buffers:
        start, end = end, end + buffer.stop - buffer.start
        found.append(Buffer(start, end, buffer.merge))
    return found


def _where(buffers: Sequence[Buffer]) -> _Where | None:
    """Where they lie in their section: a slice if they follow each other, else all indices; None if there are none."""
    present = [buffer for buffer in buffers if buffer.stop > buffer.start]
    if not present:
        return None
    first, last = present[0].start, present[-1].stop
    if last - first == sum(buffer.stop - buffer.start for buffer in present):
        return slice(first, last)
    # Not a slice for each: what tensors there are many of are small, and it is the number of calls that takes time.
    return torch.cat([torch.arange(buffer.start, buffer.stop, device="cpu") for buffer in present])
