"""Numbers of one byte: what the contract says that they mean, and what rounding to them may and may not do."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ormo_protos import int8
from ormo_protos.int8 import Blocks, Int8Vector, encode, rounding, scales_of
from ormo_protos.limits import MAX_ELEMENTS
from ormo_protos.manifest import BUFFER, FLOAT32, INT8, INT64, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Payload, PayloadError, PayloadLayout

CPU = torch.device("cpu")
TINY = torch.finfo(torch.float32).tiny
# Around a block's end, many whole blocks in a row, and few.
SIZES = st.sampled_from([0, 1, 7, 1023, 1024, 1025, 3 * 1024, 17 * 1024, 17 * 1024 + 5])


def model_of(*sizes: int) -> Manifest:
    tensors = [TensorSpec(f"w{number}", (size,), FLOAT32, PARAMETER) for number, size in enumerate(sizes)]
    alias = TensorSpec("tied", (sizes[0],), FLOAT32, PARAMETER, alias_of="w0")
    buffers = [TensorSpec("f", (1,), FLOAT32, BUFFER), TensorSpec("i", (1,), INT64, BUFFER)]
    return Manifest.laid_out([*tensors, alias, *buffers])


def blocks_by_hand(sizes: tuple[int, ...]) -> list[slice]:
    """The block of the contract: 1,024 values of one tensor in a row, or what is left of it at its end."""
    found, at = [], 0
    for size in sizes:
        found += [slice(at + begin, at + min(begin + 1024, size)) for begin in range(0, size, 1024)]
        at += size
    return found


def coded(values: torch.Tensor, *sizes: int, ticket: int = 1, epoch: int = 9) -> tuple[Int8Vector, Payload]:
    """These values of tensors of these sizes, as the payload of a ticket's gradient."""
    layout = PayloadLayout.of_gradient(model_of(*(sizes or (len(values),))), INT8, with_buffers=False)
    payload = Payload(layout)
    assert layout.blocks is not None
    encode(values, payload.parameters, payload.scales, layout.blocks, rounding(epoch, ticket, CPU))
    assert isinstance(payload.gradient, Int8Vector)
    return payload.gradient, payload


def test_codes_of_all_tensors_come_first_then_the_scales_of_all_their_blocks() -> None:
    layout = PayloadLayout.of_gradient(model_of(3, 1025, 0, 4), INT8, with_buffers=True)
    assert (layout.parameters, layout.scales) == (1032, 4)
    assert (layout.scales_offset, layout.float_buffers_offset, layout.int_buffers_offset) == (1032, 1048, 1056)
    assert layout.total_bytes == 1064
    odd = PayloadLayout.of_gradient(model_of(2, 3), INT8, with_buffers=False)
    assert (odd.scales_offset, odd.scales, odd.total_bytes) == (8, 2, 16)
    assert PayloadLayout.of_gradient(model_of(5), INT8, with_buffers=True).total_bytes == 8 + 8 + 8 + 8


def test_a_payload_written_by_the_contract_alone_means_what_it_says() -> None:
    payload = Payload(PayloadLayout.of_gradient(model_of(2, 1025), INT8, with_buffers=False))
    codes = [127, -127, *range(-100, 100), *[0] * 824, 4]
    bytes_ = struct.pack("<1027b5x", *codes) + struct.pack("<3f4x", 0.5, 2.0, 0.25)
    payload.array[:] = np.frombuffer(bytes_, np.uint8)
    assert payload.gradient[:].tolist() == [63.5, -63.5, *[2.0 * code for code in range(-100, 100)], *[0] * 824, 1.0]


def test_int8_is_for_gradients_and_no_layout_of_parameters_has_it() -> None:
    with pytest.raises(PayloadError, match="payload dtype 5 is not served: use DTYPE_FLOAT32"):
        PayloadLayout.of(model_of(3), INT8, with_buffers=False)


def test_padding_between_codes_scales_and_buffers_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(0xAA))
    payload = Payload(PayloadLayout.of_gradient(model_of(3), INT8, with_buffers=True))
    assert bytes(payload.memory[:16]) == b"\xaa" * 3 + b"\0" * 5 + b"\xaa" * 4 + b"\0" * 4


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=6).filter(any))
def test_scales_are_counted_without_memory_for_them(sizes: list[int]) -> None:
    assert scales_of(sizes) == Blocks.of(tuple(sizes)).count == len(blocks_by_hand(tuple(sizes)))
    assert scales_of([*sizes, MAX_ELEMENTS]) == scales_of(sizes) + 2**38


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=6).filter(any), data=st.data())
def test_any_part_is_decoded_as_code_times_the_scale_of_its_block(sizes: list[int], data: st.DataObject) -> None:
    d, by_hand = sum(sizes), blocks_by_hand(tuple(sizes))
    generator = torch.Generator().manual_seed(d)
    codes = torch.randint(-127, 128, (d,), dtype=torch.int8, generator=generator)
    scales = torch.rand(len(by_hand), generator=generator)
    expected = torch.cat([codes[part].float() * scale for part, scale in zip(by_hand, scales, strict=True)])
    vector = Int8Vector(codes, scales, Blocks.of(tuple(sizes)))
    begin, end = sorted(data.draw(st.tuples(st.integers(0, d), st.integers(0, d))))
    assert torch.equal(vector[begin:end], expected[begin:end])
    assert torch.equal(torch.cat(list(vector.split(data.draw(st.integers(1, d))))), expected)
    assert (vector.shape, vector.numel()) == ((d,), d)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=6).filter(any), ticket=st.integers(0, 2**63))
def test_each_number_becomes_one_of_the_two_codes_beside_it(sizes: list[int], ticket: int) -> None:
    values = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(ticket))
    vector, payload = coded(values, *sizes, ticket=ticket)
    for part, scale in zip(blocks_by_hand(tuple(sizes)), payload.scales, strict=True):
        assert scale == values[part].abs().max() / 127
        beside = values[part].double() / scale.double()
        codes = payload.parameters[part].double()
        assert bool(((codes - beside).abs() < 1 + 1e-4).all())  # float32 has the quotient to 2^-18
        assert int(codes.abs().max()) >= 126
    assert not vector.fault


def test_what_is_decoded_is_in_the_mean_what_was_coded() -> None:
    values = torch.cat([torch.linspace(-1.0, 1.0, 997), torch.tensor([127.0, 1e-3, -1e-3, 0.25])])
    tickets = 4000
    total = torch.zeros(len(values), dtype=torch.float64)
    for ticket in range(tickets):
        total += coded(values, ticket=ticket)[0][:].double()
    # A code is off by a throw of a coin: by sqrt(p(1 - p)) of the scale, which is 1 here.
    share = values.double() - values.double().floor()
    deviation = (share * (1 - share)).sqrt() / tickets**0.5
    assert bool(((total / tickets - values).abs() <= 5 * deviation + 2.0**-16).all())


def test_zeros_stay_zero_and_a_block_of_zeros_has_scale_zero() -> None:
    values = torch.zeros(2048)
    values[5] = -3.0
    vector, payload = coded(values)
    assert payload.scales.tolist() == [pytest.approx(3 / 127), 0.0]
    assert vector[:].count_nonzero() == 1
    assert payload.parameters[5] == -127


@pytest.mark.parametrize("largest", [TINY * 126.9, TINY, TINY / 2**20])
def test_a_block_of_tiny_numbers_is_sent_as_zeros(largest: float) -> None:
    vector, payload = coded(torch.full((10,), largest))
    assert payload.scales.tolist() == [0.0]
    assert not payload.parameters.any()
    assert not vector.fault
    assert coded(torch.full((10,), TINY * 128))[1].parameters.tolist() == [127] * 10


def overshooting() -> float:
    """A number whose quotient by its own scale is above 127, as float32 rounds."""
    candidates = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    above = candidates / (candidates / 127) > 127
    assert above.any()
    return float(candidates[above][0])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("drawn", [-(2**15), 2**15 - 1])
def test_the_largest_number_keeps_its_sign_however_it_is_rounded(
    sign: int, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_random", lambda elements, _: torch.full((elements,), drawn, dtype=torch.int16))
    vector, payload = coded(torch.tensor([sign * overshooting()] * 3))
    assert payload.parameters.tolist() == [127 * sign] * 3
    assert not vector.fault


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [3, 20_000])
def test_a_number_that_is_not_finite_shows_in_the_scale_of_its_block(bad: float, at: int) -> None:
    values = torch.ones(20 * 1024)
    values[at] = bad
    vector, payload = coded(values, 5, 20 * 1024 - 5)  # short blocks and whole ones
    assert payload.scales.isfinite().sum() == payload.layout.scales - 1
    assert "scales of int8 blocks" in vector.fault


def test_a_retry_has_the_same_bytes_and_another_ticket_or_server_others() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    first = bytes(coded(values, ticket=7)[1].memory)
    assert bytes(coded(values, ticket=7)[1].memory) == first
    assert bytes(coded(values, ticket=8)[1].memory) != first
    assert bytes(coded(values, ticket=7, epoch=10)[1].memory) != first
    assert bytes(coded(values, ticket=7, epoch=9 + 2**32)[1].memory) != first


def test_numbers_of_one_gradient_are_rounded_independently() -> None:
    values = torch.full((2**19 + 1024,), 0.5)  # more than is coded at a time
    values[::1024] = 127.0
    _, payload = coded(values)
    ups = payload.parameters.view(-1, 1024)[:, 1:].double()
    assert ups.mean() == pytest.approx(0.5, abs=0.005)
    centred = ups - 0.5
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 0.002  # with its neighbour
    assert abs((centred[1:] * centred[:-1]).mean()) < 0.002  # with its own place in the next block
    assert abs((centred[:256] * centred[256:512]).mean()) < 0.002  # with that of the next piece


def test_scaling_a_gradient_scales_what_is_decoded() -> None:
    vector, payload = coded(torch.randn(3000, generator=torch.Generator().manual_seed(2)))
    before, codes = vector[:], payload.parameters.clone()
    assert torch.equal(vector.mul_(0.25)[:], before * 0.25)
    assert torch.equal(payload.parameters, codes)


FAULTS = [
    (-128, 1.0, "an int8 code is -128: expected -127 to 127"),
    (1, float("nan"), "the scales of int8 blocks go from nan to nan: expected finite numbers of at least 0"),
    (1, float("inf"), "the scales of int8 blocks go from 0.5 to inf: expected finite"),
    (1, -1e-30, "the scales of int8 blocks go from -1e-30 to 0.5: expected finite"),
    (0, -float("inf"), "the scales of int8 blocks go from -inf to 0.5: expected finite"),
]


@pytest.mark.parametrize(("code", "scale", "sentence"), FAULTS)
def test_bytes_that_are_no_code_have_a_sentence(code: int, scale: float, sentence: str) -> None:
    codes, scales = torch.zeros(3000, dtype=torch.int8), torch.full((3,), 0.5)
    codes[2999], scales[2] = code, scale
    assert Int8Vector(codes, scales, Blocks.of((3000,))).fault.startswith(sentence)
    scales[2] = 0.0
    codes[2999] = -127
    assert not Int8Vector(codes, scales, Blocks.of((3000,))).fault


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=6).filter(any), wanted=st.integers(1, 40_000))
def test_what_is_coded_at_a_time_cuts_no_block(sizes: list[int], wanted: int) -> None:
    pieces = list(Blocks.of(tuple(sizes)).pieces(wanted))
    edges = {part.start for part in blocks_by_hand(tuple(sizes))} | {sum(sizes)}
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
    assert {stop for _, stop in pieces} <= edges
    assert pieces[-1][1] == sum(sizes)
    assert all(stop - start <= max(wanted, 1024) for start, stop in pieces)
