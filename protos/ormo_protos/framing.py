"""Between messages that carry tensors and their bytes, without a protobuf object round the tensors' own bytes.

What is written and read is plain protobuf, as any generated code writes and reads it. Only the way there is short:
tensor bytes are copied once into a message that goes out, and are a view of one that came in. The messages of other
writers, with other orders of fields, or with fields that are not known here, take the generated code's way.
"""

from functools import lru_cache
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from google.protobuf.message import Message

from ormo_protos.parsing import Malformed, Parser
from ormo_protos.tensors import Chunk

M = TypeVar("M", bound=Message)

_LENGTH_DELIMITED = 2
# Before `data` there is one part. A hostile message may have millions: those are the generated code's to walk.
_FIELDS_LOOKED_AT = 4
NOTHING = memoryview(b"")
# Of TensorChunk, as protobuf writes them: an int64 with the number 1, and bytes with the number 2.
_OFFSET_TAG, _DATA_TAG = b"\x08", b"\x12"
# What is longer is the generated code's to judge: not every version takes such lengths, and ten bytes are a negative
# offset.
_BYTES_OF_LENGTH, _BYTES_OF_OFFSET = 5, 9


class Headed(NamedTuple, Generic[M]):
    """A message that is more than a piece of a payload.

    Attributes:
        message: without its `data`.
        data: the first bytes of the payload that it announces; empty if they come in chunks.
    """

    message: M
    data: memoryview = NOTHING


Frame: TypeAlias = Chunk | Headed[M] | Malformed


class Framing(Generic[M]):
    """Writes and reads the messages of one kind.

    Args:
        kind: a message with a `chunk` among its parts and perhaps `data` beside them.
    """

    def __init__(self, kind: type[M]) -> None:
        self._parser = Parser(kind)
        numbers = {field.name: field.number for field in kind.DESCRIPTOR.fields}
        self._chunk_tag = _tag(numbers["chunk"])
        self._data_tag = _tag(numbers["data"]) if "data" in numbers else b""

    def encode(self, frame: Chunk | Headed[M] | M) -> bytes:
        """The message's bytes; the only copy that is made of a tensor's bytes."""
        if isinstance(frame, Chunk):
            offset, data = frame
            head = (_OFFSET_TAG + _varint(offset) if offset else b"") + _DATA_TAG + _varint(len(data))
            return b"".join((self._chunk_tag, _varint(len(head) + len(data)), head, data))
        if isinstance(frame, Headed):
            message, data = frame
            head = message.SerializeToString()
            return b"".join((head, self._data_tag, _varint(len(data)), data)) if data else head
        return frame.SerializeToString()

    def decode(self, encoded: bytes) -> Frame[M]:
        """The message that these bytes are; a chunk's and a head's data are views of them."""
        if encoded[:1] == self._chunk_tag:
            chunk = _plain_chunk(encoded)
            if chunk is not None:
                return chunk
        start = self._start_of_last_data(encoded) if self._data_tag else None
        if start is None:
            return self._generated(encoded)
        message = self._parser.parse(encoded[: start.tag])
        return message if isinstance(message, Malformed) else self._headed(message, memoryview(encoded)[start.data :])

    def _generated(self, encoded: bytes) -> Frame[M]:
        message = self._parser.parse(encoded)
        if isinstance(message, Malformed):
            return message
        data: bytes = getattr(message, "data", b"")
        return self._headed(message, memoryview(data) if data else NOTHING)

    def _headed(self, message: M, data: memoryview) -> Frame[M]:
        if self._data_tag:
            message.ClearField("data")
        if message.WhichOneof("part") != "chunk":
            return Headed(message, data)
        if data:
            return Malformed("received a chunk together with data: send `data` with the message that begins a payload")
        chunk = message.chunk  # type: ignore[attr-defined]
        return Chunk(chunk.offset, memoryview(chunk.data))

    def _start_of_last_data(self, encoded: bytes) -> "_Start | None":
        """Where `data` begins, if it is the last field and ends with the message."""
        at, size = 0, len(encoded)
        for _ in range(_FIELDS_LOOKED_AT):
            if at + 1 >= size or encoded[at] & 0x87 != _LENGTH_DELIMITED:  # a tag of one byte
                return None
            length, start = encoded[at + 1], at + 2
            if length >= 0x80:  # few heads are that long
                long = _read_varint(encoded, at + 1, _BYTES_OF_LENGTH)
                if long is None:
                    return None
                length, start = long
            if start + length > size:
                return None
            if start + length == size:
                return _Start(at, start) if encoded[at : at + 1] == self._data_tag else None
            at = start + length
        return None


class _Start(NamedTuple):
    tag: int
    data: int


class _Varint(NamedTuple):
    value: int
    end: int


def _plain_chunk(encoded: bytes) -> Chunk | None:
    """The chunk, if the message is nothing else, and as it is mostly written: offset, if there is one, then data."""
    size = len(encoded)
    whole = _read_varint(encoded, 1, _BYTES_OF_LENGTH)
    if whole is None or whole.end + whole.value != size:
        return None
    at, offset = whole.end, 0
    if encoded[at : at + 1] == _OFFSET_TAG:
        number = _read_varint(encoded, at + 1, _BYTES_OF_OFFSET)
        if number is None:
            return None
        offset, at = number
    if encoded[at : at + 1] != _DATA_TAG:
        return None
    length = _read_varint(encoded, at + 1, _BYTES_OF_LENGTH)
    if length is None or length.end + length.value != size:
        return None
    return Chunk(offset, memoryview(encoded)[length.end :])


def _read_varint(encoded: bytes, at: int, longest: int) -> _Varint | None:
    """The number there; None if it has no end within `longest` bytes."""
    value = shift = 0
    for byte in encoded[at : at + longest]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return _Varint(value, at + shift // 7)
    return None


@lru_cache(maxsize=256)  # lengths are a few, offsets are the other ones
def _varint(value: int) -> bytes:
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def _tag(number: int) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED)
