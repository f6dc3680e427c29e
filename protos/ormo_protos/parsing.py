"""From bytes that may be anything to messages: elements are counted before generated code makes objects of them.

Generated code makes up to 280 MB of 4 MB of empty elements, and no other thread runs meanwhile.
"""

from functools import cache
from typing import Generic, NamedTuple, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from ormo_protos.limits import LONGEST_LISTS, MAX_REPEATS, SMALL_MESSAGE_BYTES
from ormo_protos.refusals import Reason

M = TypeVar("M", bound=Message)

_VARINT, _FIXED64, _LENGTH_DELIMITED, _GROUP, _END_OF_GROUP, _FIXED32 = range(6)
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_BITS_OF_VARINT = 70


class Malformed(NamedTuple):
    """Bytes that are no message. A value, not an exception: gRPC would answer an exception with INTERNAL."""

    why: str
    reason: Reason = Reason.BAD_REQUEST


class Parser(Generic[M]):
    """Makes messages of one kind of bytes that may be anything."""

    def __init__(self, kind: type[M]) -> None:
        self._kind = kind
        self._counted = _Counted.of(kind.DESCRIPTOR)

    def parse(self, encoded: bytes) -> M | Malformed:
        """The message that these bytes are."""
        if self._counted.has_lists or len(encoded) > SMALL_MESSAGE_BYTES:
            beyond = _beyond(self._counted, encoded)
            if beyond is not None:
                return beyond
        try:
            return self._kind.FromString(encoded)
        except DecodeError as error:
            return Malformed(f"received {len(encoded)} bytes that are not a {self._kind.DESCRIPTOR.name}: {error}")


class _Field(NamedTuple):
    """A field that is a list or a message, as the walk through the bytes needs it.

    Attributes:
        name: with its message's, as in `Manifest.tensors`.
        most: times that it may come.
        is_list: whether each value is another element.
        packable: whether one length-delimited value may hold many elements.
        inside: what its elements are, if they are messages.
    """

    name: str
    most: int
    is_list: bool
    packable: bool
    inside: "_Counted | None"


_UNKNOWN = _Field("a field that is not known", MAX_REPEATS, is_list=False, packable=False, inside=None)


class _Counted(NamedTuple):
    """A kind of message.

    Attributes:
        fields: by number.
        has_lists: whether it, or a message in it, has any.
    """

    fields: dict[int, _Field]
    has_lists: bool

    @staticmethod
    @cache
    def of(kind: Descriptor) -> "_Counted":
        fields = {field.number: _field(field) for field in kind.fields}
        lists = any(field.is_repeated for field in kind.fields)
        return _Counted(fields, lists or any(field.inside and field.inside.has_lists for field in fields.values()))


def _field(field: FieldDescriptor) -> _Field:
    most = LONGEST_LISTS[field.full_name] if field.is_repeated else MAX_REPEATS
    inside = None if field.message_type is None else _Counted.of(field.message_type)
    packable = field.is_repeated and field.is_packed
    assert not packable or field.type == field.TYPE_INT64, f"{field.full_name}: only packed varints are counted"
    return _Field(field.full_name.removeprefix("ormo.v1."), most, field.is_repeated, packable, inside)


def _beyond(counted: _Counted, encoded: bytes) -> Malformed | None:
    try:
        _count(_Message(counted), encoded, 0, len(encoded))
    except _BeyondError as error:
        field = error.field
        model = field.name.startswith(("Manifest.", "TensorSpec."))
        return Malformed(
            f"{field.name} appears more than {field.most:,} times in one message: send at most that many",
            Reason.BAD_MANIFEST if model else Reason.BAD_REQUEST,
        )
    except IndexError:  # cut short: generated code comes no further, and says so
        return None
    return None


class _Message:
    """What has come of one message: how often each field, and what of the messages in it that are no list.

    A message that is written twice in one field is one message in two parts: they are counted together.
    """

    __slots__ = ("inside", "kind", "times")

    def __init__(self, kind: _Counted) -> None:
        self.kind = kind
        self.times: dict[int, int] = {}
        self.inside: dict[int, _Message] = {}

    def part(self, number: int, field: _Field, kind: _Counted) -> "_Message":
        """The message that a value of this field is, or is a part of."""
        return _Message(kind) if field.is_list else self.inside.setdefault(number, _Message(kind))


class _BeyondError(Exception):
    def __init__(self, field: _Field) -> None:
        super().__init__(field.name)
        self.field = field


def _count(message: _Message, encoded: bytes, at: int, end: int) -> None:
    """Walk through a message, and those in it.

    Whatever generated code takes is understood here; it may be stricter, and then makes nothing of what follows.
    """
    fields, times = message.kind.fields, message.times
    groups = 0  # that are open; whatever is in them is not known
    while at < end:
        tag, at = _varint(encoded, at)
        number, wire_type = (tag & 0xFFFFFFFF) >> 3, tag & 7
        start, at = _skipped(encoded, at, wire_type)
        groups += (wire_type == _GROUP) - (wire_type == _END_OF_GROUP)
        field = fields.get(number, _UNKNOWN)
        if field is _UNKNOWN or groups or wire_type == _END_OF_GROUP:
            field, number = _UNKNOWN, 0
        packed = field.packable and wire_type == _LENGTH_DELIMITED
        times[number] = times.get(number, 0) + (_elements(field, encoded, start, at) if packed else 1)
        if times[number] > field.most:
            raise _BeyondError(field)
        if field.inside is not None and wire_type == _LENGTH_DELIMITED:
            _count(message.part(number, field, field.inside), encoded, start, min(at, end))


def _skipped(encoded: bytes, at: int, wire_type: int) -> tuple[int, int]:
    """Where a value's content begins, and where it ends."""
    if wire_type == _VARINT:
        return at, _varint(encoded, at)[1]
    if wire_type == _LENGTH_DELIMITED:
        size, at = _varint(encoded, at)
        return at, at + size
    return at, at + _FIXED_BYTES.get(wire_type, 0)


def _elements(field: _Field, encoded: bytes, start: int, end: int) -> int:
    """Of a packed list of varints, the only ones that the contract has; not exact above the limit."""
    if end - start > 10 * field.most:
        return field.most + 1
    return sum(byte < 0x80 for byte in encoded[start:end])


def _varint(encoded: bytes, at: int) -> tuple[int, int]:
    value = encoded[at]
    if value < 0x80:  # nearly all are one byte
        return value, at + 1
    value &= 0x7F
    for shift in range(7, _BITS_OF_VARINT, 7):
        at += 1
        byte = encoded[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
    raise IndexError("a varint without an end")
