"""The payload codec: flat tensors to chunks of bytes and back. `parameter_server.proto` defines the layout.

A payload is one block of memory with typed views in it, so that tensors are neither cut nor joined on the way: the
receiver copies each chunk to its place once, and what arrived is at once a tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch

from ormo_protos.int8 import Blocks, Int8Vector
from ormo_protos.limits import BYTES_PER_CHUNK, CHUNK_BYTES, FREE_CHUNKS, MAX_CHUNK_BYTES
from ormo_protos.manifest import BFLOAT16, FLOAT32, INT8, Manifest
from ormo_protos.v1 import parameter_server_pb2 as pb

_SECTION_ALIGNMENT = 8
# To let other threads run, and to wait for them afterwards, takes longer than to copy so much.
_COPIED_AT_ONCE_BYTES = 1 << 16
_TORCH_DTYPES: dict[int, torch.dtype] = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16}


class Chunk(NamedTuple):
    """A run of a payload's bytes.

    Attributes:
        offset: where they go, from the payload's start.
        data: the bytes; a view, which is not copied until they are sent or put in their place.
    """

    offset: int
    data: memoryview


class ChunkLike(Protocol):
    """A chunk from whatever source: ours or a generated message."""

    @property
    def offset(self) -> int:
        """Where the bytes go."""

    @property
    def data(self) -> bytes | memoryview:
        """The bytes."""


class PayloadError(ValueError):
    """Bytes that are not the payload that was announced; the sentence says what came and what was expected."""


def torch_dtype(dtype: int) -> torch.dtype:
    """The torch dtype of a payload's first section.

    Raises:
        PayloadError: the number is none of the wire dtypes for floating-point numbers.
    """
    if dtype not in _TORCH_DTYPES:
        raise PayloadError(f"payload dtype {dtype} is not served: use DTYPE_FLOAT32 (1) or DTYPE_BFLOAT16 (2)")
    return _TORCH_DTYPES[dtype]


@dataclass(frozen=True, slots=True, eq=False)
class PayloadLayout:
    """Where the sections of a payload lie. Sizes are elements, offsets and `total_bytes` are bytes.

    `of` makes one object for each layout, so that they are compared, and found again, by identity.
    """

    dtype: pb.Dtype.ValueType
    with_buffers: bool
    parameters: int
    scales: int
    float_buffers: int
    int_buffers: int
    frozen: int
    scales_offset: int
    float_buffers_offset: int
    int_buffers_offset: int
    frozen_offset: int
    total_bytes: int
    blocks: Blocks | None

    @classmethod
    def of(
        cls, manifest: Manifest, dtype: pb.Dtype.ValueType, *, with_buffers: bool, with_frozen: bool = False
    ) -> "PayloadLayout":
        """The layout of this model's payload.

        Raises:
            PayloadError: `dtype` is none of the wire dtypes for floating-point numbers.
        """
        key = (dtype, with_buffers, with_frozen)
        known: PayloadLayout | None = manifest.layouts.get(key)
        if known is None:
            torch_dtype(dtype)
            frozen = manifest.sizes["frozen"] if with_frozen else 0
            known = manifest.layouts[key] = _layout(manifest, dtype, None, with_buffers, frozen)
        return known

    @classmethod
    def of_gradient(cls, manifest: Manifest, dtype: pb.Dtype.ValueType, *, with_buffers: bool) -> "PayloadLayout":
        """As `of`, for what may come in DTYPE_INT8, too.

        Raises:
            PayloadError: `dtype` is none in which a gradient can travel.
        """
        if dtype != INT8:
            return cls.of(manifest, dtype, with_buffers=with_buffers)
        return _layout(manifest, dtype, Blocks.of(manifest.trained_sizes), with_buffers, 0)


def _layout(
    manifest: Manifest, dtype: pb.Dtype.ValueType, blocks: Blocks | None, with_buffers: bool, frozen: int
) -> PayloadLayout:
    sizes = manifest.sizes
    floats, ints = (sizes["float_buffers"], sizes["int_buffers"]) if with_buffers else (0, 0)
    return _layout_of_sizes(dtype, blocks, with_buffers, sizes["parameters"], floats, ints, frozen)


@cache
def _layout_of_sizes(
    dtype: pb.Dtype.ValueType,
    blocks: Blocks | None,
    with_buffers: bool,
    params: int,
    floats: int,
    ints: int,
    frozen: int,
) -> PayloadLayout:
    scales = 0 if blocks is None else blocks.count
    scales_at = _aligned(params * _element_dtype(dtype).itemsize)
    floats_at = scales_at + _aligned(scales * 4)
    ints_at = floats_at + _aligned(floats * 4)
    frozen_at = ints_at + ints * 8
    end = frozen_at + _aligned(frozen * 4)
    places = (scales_at, floats_at, ints_at, frozen_at, end)
    return PayloadLayout(dtype, with_buffers, params, scales, floats, ints, frozen, *places, blocks)


def _element_dtype(dtype: int) -> torch.dtype:
    return torch.int8 if dtype == INT8 else torch_dtype(dtype)


def _aligned(size: int) -> int:
    return -(-size // _SECTION_ALIGNMENT) * _SECTION_ALIGNMENT


class Payload:
    """The bytes of one payload, with views in it.

    Args:
        layout: where the sections lie.
        memory: to lie in, shape (at least `layout.total_bytes`,), uint8; by default some of its own.
        pin_memory: whether its own is page-locked.

    Attributes:
        layout: where the sections lie.
        array: all bytes, shape (`layout.total_bytes`,), uint8, for what copies them.
        memory: the same bytes, for what sends them.
        parameters: shape (d,), dtype of the layout; codes, if that is int8.
        scales: shape (s,), float32, of the codes' blocks; empty unless there are codes.
        gradient: what the first section says, as numbers: `parameters`, or what the codes are decoded to.
        float_buffers: shape (f,), float32; empty without buffers.
        int_buffers: shape (i,), int64, or the bits of float64; empty without buffers.
        frozen: shape (z,), float32; empty unless the layout has them.
    """

    def __init__(self, layout: PayloadLayout, memory: torch.Tensor | None = None, *, pin_memory: bool = False) -> None:
        self.layout = layout
        if memory is None:
            memory = torch.empty(layout.total_bytes, dtype=torch.uint8, device="cpu", pin_memory=pin_memory)
        self._bytes = memory[: layout.total_bytes]
        self.array = self._bytes.numpy()
        self.memory: memoryview = self.array.data
        self.parameters = self._view(0, layout.parameters, _element_dtype(layout.dtype))
        self.scales = self._view(layout.scales_offset, layout.scales, torch.float32)
        self.gradient: torch.Tensor | Int8Vector = self.parameters
        if layout.blocks is not None:
            self.gradient = Int8Vector(self.parameters, self.scales, layout.blocks)
        self.float_buffers = self._view(layout.float_buffers_offset, layout.float_buffers, torch.float32)
        self.int_buffers = self._view(layout.int_buffers_offset, layout.int_buffers, torch.int64)
        self.frozen = self._view(layout.frozen_offset, layout.frozen, torch.float32)
        self.zero_padding()

    def _view(self, offset: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
        return self._bytes[offset : offset + elements * dtype.itemsize].view(dtype)

    def zero_padding(self) -> None:
        """Clear what stands between the sections: it travels too, and must not be what the memory held before."""
        end_of_parameters = self.layout.parameters * self.parameters.element_size()
        self._bytes[end_of_parameters : self.layout.scales_offset] = 0
        end_of_scales = self.layout.scales_offset + self.layout.scales * 4
        self._bytes[end_of_scales : self.layout.float_buffers_offset] = 0
        end_of_floats = self.layout.float_buffers_offset + self.layout.float_buffers * 4
        self._bytes[end_of_floats : self.layout.int_buffers_offset] = 0
        self._bytes[self.layout.frozen_offset + self.layout.frozen * 4 :] = 0

    def numbers_in(self, received_bytes: int) -> int:
        """How many of `gradient`'s first numbers are there with so many bytes from the payload's start."""
        if self.layout.blocks is None:
            return received_bytes // self.parameters.element_size()
        whole = self.layout.scales_offset + self.layout.scales * 4
        return self.layout.parameters if received_bytes >= whole else 0  # the scales come last

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """The payload's bytes from `start` on in pieces of `CHUNK_BYTES`, in order; views of it."""
        for offset in range(start, self.layout.total_bytes, CHUNK_BYTES):
            yield Chunk(offset, self.memory[offset : offset + CHUNK_BYTES])


def frozen_chunks(frozen: torch.Tensor, start: int) -> Iterator[Chunk]:
    """The section of frozen tensors in pieces, for a payload whose others end at `start`; views of it.

    Args:
        frozen: shape (z,), float32.
        start: where the section begins; `PayloadLayout.frozen_offset`.
    """
    memory = frozen.view(torch.uint8).numpy().data
    for at in range(0, len(memory), CHUNK_BYTES):
        yield Chunk(start + at, memory[at : at + CHUNK_BYTES])
    padding = _aligned(len(memory)) - len(memory)
    if padding:
        yield Chunk(start + len(memory), memoryview(bytes(padding)))


class PayloadReceiver:
    """Fills a payload from chunks and refuses what is out of order, missing, doubled or too long.

    A context manager is not needed: a payload that was never completed is simply not used.

    Attributes:
        payload: what is filled.
        received_bytes: bytes that have come, from the payload's start.
        complete: whether all have come.
    """

    def __init__(self, payload: Payload) -> None:
        self.payload = payload
        self.received_bytes = 0
        self.complete = payload.layout.total_bytes == 0
        self._chunks_left = FREE_CHUNKS + payload.layout.total_bytes // BYTES_PER_CHUNK

    def accept(self, chunk: ChunkLike) -> Self:
        """Copy one chunk to its place.

        Raises:
            PayloadError: the chunk does not start where the last one ended, is empty, goes past the end, or is one of
                very many.
        """
        size, total = len(chunk.data), self.payload.layout.total_bytes
        if chunk.offset != self.received_bytes:
            raise PayloadError(
                f"received a chunk for offset {chunk.offset} where offset {self.received_bytes} was expected: send the "
                "chunks of a payload in order, each once"
            )
        if self.received_bytes == total:
            raise PayloadError(f"received a chunk after all {total} bytes of the payload: send each byte once")
        if not 1 <= size <= MAX_CHUNK_BYTES or self.received_bytes + size > total:
            raise PayloadError(
                f"received a chunk of {size} bytes at offset {chunk.offset} of a payload of {total} bytes: expected 1 "
                f"to {min(MAX_CHUNK_BYTES, total - self.received_bytes)} bytes"
            )
        if not self._chunks_left:
            raise PayloadError(
                f"{chunk.offset} of {total} bytes arrived in {FREE_CHUNKS + total // BYTES_PER_CHUNK} chunks: send "
                f"fewer and larger ones, of {CHUNK_BYTES} bytes"
            )
        self._chunks_left -= 1
        if size <= _COPIED_AT_ONCE_BYTES:
            self.payload.memory[chunk.offset : chunk.offset + size] = chunk.data
        else:  # unlike that, NumPy lets other threads run meanwhile
            np.copyto(self.payload.array[chunk.offset : chunk.offset + size], np.frombuffer(chunk.data, np.uint8))
        self.received_bytes += size
        self.complete = self.received_bytes == total
        return self

    def missing(self) -> PayloadError:
        """The error for a stream that ended too early."""
        return PayloadError(
            f"the payload ended after {self.received_bytes} of {self.payload.layout.total_bytes} bytes: send it whole"
        )
