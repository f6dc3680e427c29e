"""How a worker's buffers become the server's, against plain Python numbers."""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ormo_server.core.buffers import Buffer, Buffers, Merge, Merging

NAN, INF = math.nan, math.inf
LARGEST = torch.finfo(torch.float32).max
LARGEST_DOUBLE = torch.finfo(torch.float64).max


@dataclass(frozen=True)
class Kind:
    """What a tensor is: how it is merged, and in which type."""

    merge: Merge
    dtype: torch.dtype


KINDS = [
    Kind(Merge.AVERAGE, torch.float32),
    Kind(Merge.LAST, torch.float32),
    Kind(Merge.AVERAGE, torch.float64),
    Kind(Merge.LAST, torch.float64),
    Kind(Merge.MAXIMUM, torch.int64),
    Kind(Merge.LAST, torch.int64),
]
FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.5, LARGEST, -LARGEST, 2.0**-149, INF, -INF, NAN]), st.floats(width=32)
)
DOUBLES = st.one_of(st.sampled_from([1 + 1e-12, LARGEST_DOUBLE, -LARGEST_DOUBLE, INF, NAN]), st.floats())
# -1 has the bits of a NaN.
INTEGERS = st.one_of(st.sampled_from([-1, 0, 1]), st.integers(-(2**63), 2**63 - 1))
NUMBERS = {torch.float32: FLOATS, torch.float64: DOUBLES, torch.int64: INTEGERS}


@dataclass(frozen=True)
class Tensor:
    """A buffer as the server has it, and as it was sent."""

    kind: Kind
    held: list[float]
    sent: list[float]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    kind = draw(st.sampled_from(KINDS))
    size = draw(st.integers(0, 4))
    held = [value if value == value else 0.5 for value in draw(_lists(kind, size))]  # the server's have no NaN
    same = draw(st.booleans())
    return Tensor(kind, held, held if same else draw(_lists(kind, size)))


def _lists(kind: Kind, size: int) -> st.SearchStrategy[list[float]]:
    return st.lists(NUMBERS[kind.dtype], min_size=size, max_size=size)


def merged(model: list[Tensor], size: int) -> tuple[list[list[float]], bool]:
    """What the server has after a push, for a K of `size`, and whether it says that it kept something."""
    sections: dict[bool, list[Buffer]] = {True: [], False: []}
    vectors: dict[bool, list[list[torch.Tensor]]] = {True: [], False: []}
    ends = {True: 0, False: 0}
    for each in model:
        is_float = each.kind.dtype == torch.float32
        start = ends[is_float]
        ends[is_float] += len(each.held)
        is_double = each.kind.dtype == torch.float64
        sections[is_float].append(Buffer(start, ends[is_float], each.kind.merge, is_double))
        both = [torch.tensor(values, dtype=each.kind.dtype) for values in (each.held, each.sent)]
        vectors[is_float].append([vector.view(torch.int64) if is_double else vector for vector in both])
    merging = Merging(Buffers(tuple(sections[True]), tuple(sections[False])))
    flat = {
        is_float: [
            torch.cat([torch.empty(0, dtype=torch.float32 if is_float else torch.int64), *parts])
            for parts in (zip(*found, strict=True) if found else ((), ()))
        ]
        for is_float, found in vectors.items()
    }
    before = [flat[True][1].clone(), flat[False][1].clone()]
    kept = merging.merge_floats(*flat[True], 1 / size)
    kept |= merging.merge_ints(*flat[False], 1 / size)
    assert [bits(one) for one in before] == [bits(flat[True][1]), bits(flat[False][1])], "what was sent is only read"
    left = {is_float: list(torch.split(held, [b.stop - b.start for b in sections[is_float]]))
            for is_float, (held, _) in flat.items()}  # fmt: skip
    found = []
    for each in model:
        part = left[each.kind.dtype == torch.float32].pop(0)
        found.append((part.view(torch.float64) if each.kind.dtype == torch.float64 else part).tolist())
    return found, kept


def bits(vector: torch.Tensor) -> bytes:
    return vector.numpy().tobytes()


def expected(tensor: Tensor, size: int) -> tuple[list[float], bool]:
    """What plain numbers give, and whether the server keeps its own."""
    pairs = list(zip(tensor.held, tensor.sent, strict=True))
    match tensor.kind.merge:
        case Merge.MAXIMUM:
            return [max(pair) for pair in pairs], False
        case Merge.LAST:
            bad = any(math.isnan(sent) for sent in tensor.sent)
            return (tensor.held if bad else tensor.sent), bad
    if any(not math.isfinite(sent) and sent != held for held, sent in pairs):
        return tensor.held, True
    return [_mean(held, sent, size) for held, sent in pairs], False


def _mean(held: float, sent: float, size: int) -> float:
    # An infinity that is held is the same that was sent, or gives way to a number.
    if not math.isfinite(held):
        return sent
    return float(Fraction(held) + (Fraction(sent) - Fraction(held)) / size)


@settings(max_examples=400, deadline=None)
@given(model=st.lists(tensors(), max_size=6), size=st.sampled_from([1, 2, 3, 8]))
def test_each_buffer_is_merged_by_its_own_policy_whatever_lies_beside_it(model: list[Tensor], size: int) -> None:
    found, kept = merged(model, size)
    told = [expected(tensor, size) for tensor in model]
    assert kept == any(one for _, one in told)
    for tensor, got, (want, was_kept) in zip(model, found, told, strict=True):
        if tensor.kind.merge is Merge.AVERAGE and not was_kept:
            single = tensor.kind.dtype == torch.float32
            scale = max((abs(x) for x in tensor.held + tensor.sent if math.isfinite(x)), default=0.0)
            rounding = max(scale * (3e-7 if single else 1e-15), 1e-44)
            for one, other in zip(got, want, strict=True):
                assert one == other or abs(one - other) <= rounding
        else:
            assert list(map(_exact, got)) == list(map(_exact, want))
        assert not any(math.isnan(number) for number in got)


def _exact(number: float) -> bytes | int:
    """Zeros have signs."""
    return number if isinstance(number, int) else struct.pack("d", number)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(width=32, allow_nan=False, allow_infinity=False),
                       st.floats(width=32, allow_nan=False, allow_infinity=False)), max_size=6),
    st.lists(st.tuples(INTEGERS, INTEGERS), max_size=6),
    st.sampled_from([1, 2, 3, 8]),
)  # fmt: skip
def test_without_policies_the_bits_are_those_of_earlier_versions(
    floats: list[tuple[float, float]], ints: list[tuple[int, int]], size: int
) -> None:
    weight = 1 / size
    held, sent = (torch.tensor([pair[i] for pair in floats]) for i in (0, 1))
    before = torch.lerp(held, sent, weight)  # as they did it
    if not before.isfinite().all():
        before = torch.lerp(held.double(), sent.double(), weight).float()
    own, others = (torch.tensor([pair[i] for pair in ints], dtype=torch.int64) for i in (0, 1))
    largest = torch.maximum(own, others)
    merging = Merging(Buffers.unnamed(len(floats), len(ints)))
    assert not merging.merge_floats(held, sent, weight)
    assert not merging.merge_ints(own, others, weight)
    assert (bits(held), bits(own)) == (bits(before), bits(largest))


def average(*values: float) -> Callable[[float], Tensor]:
    return lambda sent: Tensor(KINDS[0], list(values), [sent] * len(values))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_statistic_that_is_not_finite_keeps_its_own_tensor_and_no_other(bad: float) -> None:
    model = [average(1.0, 2.0)(4.0), Tensor(KINDS[0], [3.0, 5.0], [bad, 7.0]), Tensor(KINDS[1], [0.0], [9.0])]
    assert merged(model, 2) == ([[2.5, 3.0], [3.0, 5.0], [9.0]], True)


def test_an_infinity_that_the_server_has_is_no_reason_to_keep_anything() -> None:
    model = [Tensor(KINDS[0], [-INF, 1.0], [-INF, 2.0]), Tensor(KINDS[1], [1.0], [INF]), average(INF)(3.0)]
    assert merged(model, 2) == ([[-INF, 1.5], [INF], [3.0]], False)


def test_a_double_at_both_ends_has_a_finite_mean() -> None:
    model = [Tensor(KINDS[2], [LARGEST_DOUBLE, 1.0, LARGEST_DOUBLE], [-LARGEST_DOUBLE, 2.0, LARGEST_DOUBLE])]
    assert merged(model, 3)[0][0][1:] == [4 / 3, LARGEST_DOUBLE]
    assert merged(model, 3)[0][0][0] == pytest.approx(LARGEST_DOUBLE / 3)


def test_a_mask_beside_statistics_leaves_these_their_own_rounding() -> None:
    held, sent = [0.1, 0.2, 0.3], [0.7, -0.3, 0.9]
    alone, _ = merged([Tensor(KINDS[0], held, sent)], 3)
    beside, _ = merged([Tensor(KINDS[1], [-INF, 0.0], [-INF, 0.0]), Tensor(KINDS[0], held, sent)], 3)
    assert beside[1] == alone[0]
