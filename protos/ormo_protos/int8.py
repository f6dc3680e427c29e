"""Numbers of one byte: int8 codes, and a float32 scale for each block. `parameter_server.proto` defines the layout.

What is coded is a *pseudo-gradient*: the code is unbiased, so that in a sum of many its error averages out, and nothing
of it has to be kept for the next one.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from ormo_protos.limits import INT8_BLOCK_ELEMENTS, INT8_LARGEST

# Below the smallest float32 that has all of its digits a scale would be too coarse, and devices disagree about it.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# A span is an operation or two, which cost as much as to spread the scales of so many blocks, number by number.
_BLOCKS_OF_A_SPAN = 16
# What is coded at a time: 1 MiB of float32 stays in a processor's cache; a GPU is slow at small pieces.
_ENCODED_AT_ONCE = {"cpu": 1 << 18}
_ENCODED_AT_ONCE_ON_DEVICE = 1 << 24
_RANDOM_BITS = 16


class Span(NamedTuple):
    """Blocks in a row that are all whole, or that are any.

    Attributes:
        start, stop: its numbers.
        first, end: its blocks.
        lengths: numbers of each of its blocks, shape (end - first,), int64; None if all are whole.
    """

    start: int
    stop: int
    first: int
    end: int
    lengths: torch.Tensor | None

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """The scales of this span's blocks, shape (end - first,), as its numbers can be multiplied by them."""
        if self.lengths is None:
            return scales.unsqueeze(1)
        return torch.repeat_interleave(scales, self.lengths, output_size=self.stop - self.start)

    def of(self, vector: torch.Tensor, start: int = 0) -> torch.Tensor:
        """This span's numbers in a vector whose first one is number `start` of all: a view, blocks in rows if whole."""
        own = vector[self.start - start : self.stop - start]
        return own.view(-1, INT8_BLOCK_ELEMENTS) if self.lengths is None else own


class Blocks:
    """Where blocks begin and end: anew at each tensor. `of` makes one object for each list of sizes.

    Args:
        sizes: elements of each tensor, in order.

    Attributes:
        count: how many there are.
        elements: of all tensors.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        elements = np.array(sizes, np.int64)
        counts = -(-elements // INT8_BLOCK_ELEMENTS)
        lengths = np.full(int(counts.sum()), INT8_BLOCK_ELEMENTS, np.int64)
        ends, filled = counts.cumsum(), counts > 0
        lengths[ends[filled] - 1] = (elements - (counts - 1) * INT8_BLOCK_ELEMENTS)[filled]
        self._bounds = np.concatenate([[0], lengths.cumsum()])
        self.count, self.elements = len(lengths), int(self._bounds[-1])
        self._spans: dict[tuple[int, int, torch.device], tuple[Span, ...]] = {}

    @classmethod
    def of(cls, sizes: tuple[int, ...]) -> "Blocks":
        """The blocks of tensors with so many elements."""
        return _blocks_of(sizes)

    def spans(self, start: int, stop: int, device: torch.device) -> tuple[Span, ...]:
        """What covers these numbers, in order. Blocks that they cut are taken for shorter ones.

        Args:
            start, stop: numbers of the whole vector.
            device: where `lengths` are wanted.
        """
        key = (start, stop, device)
        if key not in self._spans:
            self._spans[key] = tuple(self._cut(*key))
        return self._spans[key]

    def pieces(self, elements: int) -> Iterator[tuple[int, int]]:
        """Ranges of about so many numbers that cover all of them and cut no block."""
        start = 0
        while start < self.elements:
            wanted = min(start + max(elements, INT8_BLOCK_ELEMENTS), self.elements)
            stop = int(self._bounds[np.searchsorted(self._bounds, wanted, "right") - 1])
            yield start, stop
            start = stop

    def _cut(self, start: int, stop: int, device: torch.device) -> Iterator[Span]:
        if start >= stop:
            return
        first = int(np.searchsorted(self._bounds, start, "right")) - 1
        end = int(np.searchsorted(self._bounds, stop, "left"))
        bounds = self._bounds[first : end + 1].clip(start, stop)
        lengths = np.diff(bounds)
        for begin, until, whole in _runs(lengths == INT8_BLOCK_ELEMENTS):
            own = None if whole else torch.from_numpy(lengths[begin:until]).to(device)
            yield Span(int(bounds[begin]), int(bounds[until]), first + begin, first + until, own)


@cache
def _blocks_of(sizes: tuple[int, ...]) -> Blocks:
    return Blocks(sizes)


def _runs(whole: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """Ranges of blocks that are all whole, or any: too few whole ones in a row go with their neighbours."""
    edges = np.concatenate([[0], np.flatnonzero(np.diff(whole)) + 1, [len(whole)]])
    long = whole[edges[:-1]] & (np.diff(edges) >= _BLOCKS_OF_A_SPAN)
    keep = np.concatenate([[True], long[1:] | long[:-1]])
    begins = edges[:-1][keep]
    yield from zip(begins.tolist(), [*begins[1:].tolist(), len(whole)], long[keep].tolist(), strict=True)


class Int8Vector:
    """A vector of float32 that is kept as codes and scales: what is read of it is decoded, block by block.

    Args:
        codes: shape (d,), int8.
        scales: shape (s,), float32.
        blocks: which scale a code goes with.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, blocks: Blocks) -> None:
        self._codes = codes
        self._scales = scales
        self._blocks = blocks

    @property
    def shape(self) -> torch.Size:
        """(d,)."""
        return self._codes.shape

    def numel(self) -> int:
        """D."""
        return self._codes.numel()

    def __getitem__(self, part: slice) -> torch.Tensor:
        """The numbers of a part, float32, in memory of their own; the part has no steps."""
        start, stop, _ = part.indices(self.numel())
        values = torch.empty(max(0, stop - start), dtype=torch.float32, device=self._codes.device)
        for span in self._blocks.spans(start, stop, self._codes.device):
            scales = self._scales[span.first : span.end]
            torch.mul(span.of(self._codes), span.spread(scales), out=span.of(values, start))
        return values

    def split(self, elements: int) -> Iterator[torch.Tensor]:
        """All numbers in parts of so many, one part after the other, as `torch.Tensor.split`."""
        for start in range(0, self.numel(), elements):
            yield self[start : start + elements]

    def mul_(self, factor: float) -> "Int8Vector":
        """Multiply all numbers, in place, by a factor of at least 0."""
        self._scales.mul_(factor)
        return self

    @property
    def fault(self) -> str:
        """Why these bytes are no such vector, in words; empty if they are one. Walks over all of it."""
        if self.numel() and int(self._codes.amin()) < -INT8_LARGEST:
            return f"an int8 code is -128: expected -{INT8_LARGEST} to {INT8_LARGEST}"
        if self._scales.numel():
            low, high = map(float, torch.aminmax(self._scales))  # both are NaN if there is one
            if not 0 <= low <= high < float("inf"):
                return f"the scales of int8 blocks go from {low:g} to {high:g}: expected finite numbers of at least 0"
        return ""


def scales_of(sizes: Iterable[int]) -> int:
    """How many blocks tensors with so many elements have: for a model that may not even fit into memory."""
    return sum(-(-size // INT8_BLOCK_ELEMENTS) for size in sizes)


def rounding(epoch: int, ticket: int, device: torch.device) -> torch.Generator:
    """The random numbers by which the gradient of a ticket is rounded: others for each ticket, the same in a retry."""
    seed = hashlib.sha256(struct.pack("<QQ", epoch, ticket)).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(seed[:8], "little"))


def encode(
    values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, blocks: Blocks, generator: torch.Generator
) -> None:
    """Code a vector, block by block: in the mean over `generator`, what is decoded is what was coded.

        scale = absmax/127,  code = ⌊x/scale + u⌋ within ±127, u uniform in (0, 1);  all 0 where absmax is tiny

    So no number is off by more than a scale, 0 stays 0, and the largest keeps its sign: rounding may make 128 of its
    quotient, which without the bound would wrap to -128.

    Args:
        values: x, shape (d,), float32.
        codes: shape (d,), int8, on the same device as the values; is written.
        scales: shape (s,), float32, on the same device; is written. Not finite where the block's values are not.
        blocks: which values share a scale.
        generator: on the same device.
    """
    device = values.device
    at_once = _ENCODED_AT_ONCE.get(device.type, _ENCODED_AT_ONCE_ON_DEVICE)
    memory = torch.empty(min(at_once, blocks.elements), dtype=torch.float32, device=device)
    for start, stop in blocks.pieces(at_once):
        quotients = memory[: stop - start]
        for span in blocks.spans(start, stop, device):
            own = scales[span.first : span.end]
            torch.div(_largest(values, span), INT8_LARGEST, out=own)
            tiny = own < _SMALLEST_SCALE
            divisors = span.spread(own.masked_fill(tiny, float("inf")))
            own.masked_fill_(tiny, 0.0)
            torch.div(span.of(values), divisors, out=span.of(quotients, start))
        # u - 1/2 and 1/2 apart: both are multiples of 2^-17, so that sums with whole numbers up to 127 are exact.
        quotients.add_(_random(stop - start, generator), alpha=2.0**-_RANDOM_BITS)
        quotients.add_(0.5 + 2.0 ** -(_RANDOM_BITS + 1)).floor_().clamp_(-INT8_LARGEST, INT8_LARGEST)
        codes[start:stop].copy_(quotients)


def _largest(values: torch.Tensor, span: Span) -> torch.Tensor:
    """The largest absolute value of each of the span's blocks; NaN where there is one."""
    own = span.of(values)
    if span.lengths is None:
        # Measured: 6 times faster than by `abs` or `aminmax`.
        return torch.maximum(own.amax(dim=1), own.amin(dim=1).neg_())
    count = span.end - span.first
    block = torch.repeat_interleave(span.lengths, output_size=span.stop - span.start)
    return own.new_zeros(count).scatter_reduce_(0, block, own.abs(), "amax")


def _random(elements: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform in -2^15 to 2^15 - 1, shape (elements,), int16. Float32 has no more digits to spare for them at 127."""
    # Four of one draw: on a processor drawing is what coding costs most.
    drawn = torch.empty(-(-elements // 4), dtype=torch.int64, device=generator.device)
    return drawn.random_(-(2**63), None, generator=generator).view(torch.int16)[:elements]
