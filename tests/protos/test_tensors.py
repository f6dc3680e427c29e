"""Payloads: their layout, byte for byte, and every way in which chunks can go wrong."""

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ormo_protos.limits import CHUNK_BYTES, MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES
from ormo_protos.manifest import BFLOAT16, BUFFER, FLOAT32, INT64, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Chunk, Payload, PayloadError, PayloadLayout, PayloadReceiver, torch_dtype
from ormo_protos.v1 import parameter_server_pb2 as pb


def layout_of(
    parameters: int, floats: int = 0, ints: int = 0, *, dtype: pb.Dtype.ValueType = FLOAT32, with_buffers: bool = True
) -> PayloadLayout:
    specs = [
        TensorSpec("w", (parameters,), FLOAT32, PARAMETER),
        TensorSpec("f", (floats,), FLOAT32, BUFFER),
        TensorSpec("i", (ints,), INT64, BUFFER),
    ]
    return PayloadLayout.of(Manifest.laid_out(specs), dtype, with_buffers=with_buffers)


def filled(layout: PayloadLayout, seed: int = 0) -> Payload:
    generator = torch.Generator().manual_seed(seed)
    payload = Payload(layout)
    payload.parameters.copy_(torch.randn(layout.parameters, generator=generator))
    payload.float_buffers.copy_(torch.randn(layout.float_buffers, generator=generator))
    payload.int_buffers.copy_(torch.randint(-(2**62), 2**62, (layout.int_buffers,), generator=generator))
    return payload


def received(layout: PayloadLayout, chunks: Iterable[Chunk]) -> PayloadReceiver:
    receiver = PayloadReceiver(Payload(layout))
    for chunk in chunks:
        receiver.accept(chunk)
    return receiver


# Sizes in numbers, the rest in bytes: each section is padded to a multiple of 8.
LAYOUTS = [
    # dtype, parameters, floats, ints, buffers?, floats at, ints at, total
    (FLOAT32, 2, 0, 0, True, 8, 8, 8),
    (FLOAT32, 3, 0, 0, True, 16, 16, 16),
    (FLOAT32, 3, 1, 2, True, 16, 24, 40),
    (FLOAT32, 3, 1, 2, False, 16, 16, 16),
    (FLOAT32, 4, 2, 1, True, 16, 24, 32),
    (BFLOAT16, 1, 0, 0, True, 8, 8, 8),
    (BFLOAT16, 4, 3, 0, True, 8, 24, 24),
    (BFLOAT16, 5, 3, 1, True, 16, 32, 40),
    (BFLOAT16, 5, 3, 1, False, 16, 16, 16),
]


@pytest.mark.parametrize(
    ("dtype", "parameters", "floats", "ints", "with_buffers", "floats_at", "ints_at", "total"), LAYOUTS
)
def test_sections_lie_where_the_contract_says(
    dtype: pb.Dtype.ValueType,
    parameters: int,
    floats: int,
    ints: int,
    with_buffers: bool,
    floats_at: int,
    ints_at: int,
    total: int,
) -> None:
    layout = layout_of(parameters, floats, ints, dtype=dtype, with_buffers=with_buffers)
    assert (layout.float_buffers_offset, layout.int_buffers_offset, layout.total_bytes) == (floats_at, ints_at, total)
    assert (layout.float_buffers, layout.int_buffers) == ((floats, ints) if with_buffers else (0, 0))


def test_numbers_are_little_endian_and_the_padding_is_zero() -> None:
    payload = Payload(layout_of(1, 1, 1))
    payload.parameters.fill_(1.0)
    payload.float_buffers.fill_(-2.0)
    payload.int_buffers.fill_(258)
    assert bytes(payload.memory) == bytes.fromhex("0000803f 00000000  000000c0 00000000  0201000000000000")


def test_an_odd_number_of_bfloat16_is_padded_with_zeros() -> None:
    payload = Payload(layout_of(3, 0, 1, dtype=BFLOAT16))
    payload.parameters.fill_(1.0)
    payload.int_buffers.fill_(-1)
    assert bytes(payload.memory) == bytes.fromhex("803f 803f 803f 0000  ffffffffffffffff")


def test_padding_does_not_carry_what_the_memory_held_before(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def dirty(*size: int, **options: object) -> torch.Tensor:
        return empty(*size, **options).fill_(0xAA)

    monkeypatch.setattr(torch, "empty", dirty)
    memory = bytes(Payload(layout_of(3, 1, 1, dtype=BFLOAT16)).memory)
    assert (memory[6:8], memory[12:16]) == (b"\0\0", b"\0\0\0\0")
    assert memory[0:6] == b"\xaa" * 6


def test_views_have_the_sections_sizes_and_dtypes() -> None:
    payload = Payload(layout_of(5, 3, 2, dtype=BFLOAT16))
    views = (payload.parameters, payload.float_buffers, payload.int_buffers)
    assert [(view.numel(), view.dtype) for view in views] == [(5, torch.bfloat16), (3, torch.float32), (2, torch.int64)]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)),
    dtype=st.sampled_from([FLOAT32, BFLOAT16]),
    cuts=st.lists(st.integers(1, 30), max_size=8),
)
def test_what_is_sent_in_any_pieces_arrives(
    sizes: tuple[int, int, int], dtype: pb.Dtype.ValueType, cuts: list[int]
) -> None:
    sent = filled(layout_of(*sizes, dtype=dtype))
    receiver, start = PayloadReceiver(Payload(sent.layout)), 0
    for size in [*cuts, sent.layout.total_bytes]:
        data = bytes(sent.memory[start : start + size])
        if data:
            receiver.accept(pb.TensorChunk(offset=start, data=data))
        start += size
    assert receiver.complete
    for name in ("parameters", "float_buffers", "int_buffers"):
        assert torch.equal(getattr(receiver.payload, name), getattr(sent, name))


def test_chunks_are_of_one_mebibyte_in_order_and_the_last_is_the_rest() -> None:
    sent = filled(layout_of(CHUNK_BYTES // 2 + 1, 3, 2))
    chunks = list(sent.chunks())
    total = sent.layout.total_bytes
    assert [chunk.offset for chunk in chunks] == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]
    assert [len(chunk.data) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES, total - 2 * CHUNK_BYTES]
    receiver = received(sent.layout, chunks)
    assert receiver.complete
    assert bytes(receiver.payload.memory) == bytes(sent.memory)


def test_a_payload_of_whole_chunks_has_no_empty_last_one() -> None:
    assert [len(chunk.data) for chunk in Payload(layout_of(CHUNK_BYTES // 2)).chunks()] == [CHUNK_BYTES] * 2


def test_the_largest_chunk_that_may_be_sent_is_taken_and_fits_a_message() -> None:
    layout = layout_of(MAX_CHUNK_BYTES // 4)
    chunk = pb.TensorChunk(offset=0, data=bytes(MAX_CHUNK_BYTES))
    assert received(layout, [chunk]).complete
    assert pb.PushPullRequest(chunk=chunk).ByteSize() <= MAX_MESSAGE_BYTES


def piece(offset: int, size: int) -> pb.TensorChunk:
    return pb.TensorChunk(offset=offset, data=b"\x01" * size)


BAD_CHUNKS = [
    ([piece(8, 8)], "received a chunk for offset 8 where offset 0 was expected"),  # the first one is missing
    ([piece(0, 8), piece(16, 8)], "received a chunk for offset 16 where offset 8 was expected"),  # a gap
    ([piece(0, 8), piece(0, 8)], "received a chunk for offset 0 where offset 8 was expected"),  # doubled
    ([piece(0, 8), piece(4, 8)], "received a chunk for offset 4 where offset 8 was expected"),  # an overlap
    ([piece(-8, 8)], "received a chunk for offset -8 where"),
    ([piece(0, 0)], "received a chunk of 0 bytes at offset 0 of a payload of 24 bytes: expected 1 to 24 bytes"),
    ([piece(0, 25)], "received a chunk of 25 bytes at offset 0 of a payload of 24 bytes: expected 1 to 24 bytes"),
    (
        [piece(0, 16), piece(16, 9)],
        "received a chunk of 9 bytes at offset 16 of a payload of 24 bytes: expected 1 to 8",
    ),
    ([piece(0, 24), piece(24, 1)], "received a chunk after all 24 bytes of the payload"),  # one too many
]


@pytest.mark.parametrize(("chunks", "sentence"), BAD_CHUNKS)
def test_chunks_out_of_order_doubled_missing_empty_or_too_long_are_refused(
    chunks: list[pb.TensorChunk], sentence: str
) -> None:
    *good, bad = chunks
    receiver = received(layout_of(6), good)
    before = bytes(receiver.payload.memory[: sum(len(chunk.data) for chunk in good)])
    with pytest.raises(PayloadError, match=sentence):
        receiver.accept(bad)
    assert bytes(receiver.payload.memory[: len(before)]) == before


def test_a_refused_chunk_does_not_count_and_the_right_one_is_still_taken() -> None:
    receiver = received(layout_of(6), [piece(0, 8)])
    with pytest.raises(PayloadError):
        receiver.accept(piece(16, 8))
    assert receiver.accept(piece(8, 16)).complete


def test_a_chunk_above_the_limit_is_refused_even_where_it_fits() -> None:
    with pytest.raises(PayloadError, match=f"a chunk of {MAX_CHUNK_BYTES + 1} bytes .* 1 to {MAX_CHUNK_BYTES} bytes"):
        received(layout_of(MAX_CHUNK_BYTES), [piece(0, MAX_CHUNK_BYTES + 1)])


def test_a_payload_that_ends_too_early_is_not_complete_and_says_how_much_came() -> None:
    receiver = received(layout_of(6), [piece(0, 16)])
    assert not receiver.complete
    assert str(receiver.missing()) == "the payload ended after 16 of 24 bytes: send it whole"


@pytest.mark.parametrize("dtype", [pb.DTYPE_UNSPECIFIED, INT64, 99])
def test_a_payload_in_another_dtype_than_the_two_floating_ones_is_refused(dtype: int) -> None:
    with pytest.raises(PayloadError, match=f"payload dtype {dtype} is not served: use DTYPE_FLOAT32"):
        torch_dtype(dtype)
    with pytest.raises(PayloadError, match=f"payload dtype {dtype} is not served"):
        layout_of(1, dtype=dtype)  # type: ignore[arg-type]


def test_aliases_are_not_sent() -> None:
    model = Manifest.laid_out(
        [TensorSpec("w", (4,), FLOAT32, PARAMETER), TensorSpec("tied", (4,), FLOAT32, PARAMETER, alias_of="w")]
    )
    assert PayloadLayout.of(model, FLOAT32, with_buffers=True).total_bytes == 16
