"""The framing by hand and the generated code read and write the same, whatever the bytes."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.fuzz_framing import FRAMINGS, KINDS, agree, meaning, seeds, told
from fuzz.fuzz_framing import message as read_as
from fuzz.wire_format import field, varint
from ormo_protos import framing
from ormo_protos.framing import Framing, Headed
from ormo_protos.limits import CHUNK_BYTES, MAX_CHUNK_BYTES
from ormo_protos.parsing import Malformed
from ormo_protos.tensors import Chunk
from ormo_protos.v1 import parameter_server_pb2 as pb

Kind = type[Message]
EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.DESCRIPTOR.name)
WITH_DATA = [kind for kind in KINDS if "data" in kind.DESCRIPTOR.fields_by_name]
EXAMPLES = settings(max_examples=100, deadline=None)
MANY_EXAMPLES = settings(max_examples=200, deadline=None)


# Messages as generated code makes them.

SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=200),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_ENUM: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_FIXED64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_STRING: st.text(max_size=20),
}


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor) -> Message:
    """Any message of a kind: each field set or not, and one of each oneof."""
    message = GetMessageClass(descriptor)()
    for one in descriptor.fields:
        if hasattr(getattr(message, one.name), "extend"):
            getattr(message, one.name).extend(draw(st.lists(values(one), max_size=2)))
        elif draw(st.booleans()):
            value = draw(values(one))
            if isinstance(value, Message):
                getattr(message, one.name).CopyFrom(value)
            else:
                setattr(message, one.name, value)
    return message


def written(kind: Kind) -> st.SearchStrategy[bytes]:
    return messages(kind.DESCRIPTOR).map(lambda message: message.SerializeToString())


def values(one: FieldDescriptor) -> st.SearchStrategy[Any]:
    return messages(one.message_type) if one.message_type else SCALARS[one.type]


offsets = st.one_of(st.just(0), st.integers(0, 2**63 - 1))
blobs = st.binary(max_size=300)


@EACH_KIND
@EXAMPLES
@given(st.data())
def test_what_generated_code_writes_is_read(kind: Kind, data: st.DataObject) -> None:
    message = data.draw(messages(kind.DESCRIPTOR))
    agree(kind, message.SerializeToString())


@EACH_KIND
@EXAMPLES
@given(offset=offsets, blob=blobs)
def test_a_chunk_is_what_generated_code_reads_and_would_have_written(kind: Kind, offset: int, blob: bytes) -> None:
    encoded = FRAMINGS[kind].encode(Chunk(offset, memoryview(blob)))
    expected = kind(chunk=pb.TensorChunk(offset=offset, data=blob))
    assert kind.FromString(encoded) == expected
    if blob:  # generated code leaves out bytes that are empty
        assert encoded == expected.SerializeToString()
    assert told(FRAMINGS[kind].decode(encoded)) == ("chunk", offset, blob)


@pytest.mark.parametrize("kind", WITH_DATA, ids=lambda kind: kind.DESCRIPTOR.name)
@EXAMPLES
@given(data=st.data(), blob=blobs)
def test_a_message_with_data_is_what_generated_code_reads_and_would_have_written(
    kind: Kind, data: st.DataObject, blob: bytes
) -> None:
    message: Any = data.draw(messages(kind.DESCRIPTOR))
    message.ClearField("chunk")
    message.ClearField("data")
    encoded = FRAMINGS[kind].encode(Headed(message, memoryview(blob)))
    assert FRAMINGS[kind].encode(message) == FRAMINGS[kind].encode(Headed(message)) == message.SerializeToString()
    without = message.SerializeToString(deterministic=True)
    message.data = blob
    assert encoded == message.SerializeToString()
    assert told(FRAMINGS[kind].decode(encoded)) == ("headed", without, blob)


# Bytes are copied once on their way out, and not at all on their way in.


@EACH_KIND
@pytest.mark.parametrize("size", [1, 127, 128, 16384, CHUNK_BYTES, MAX_CHUNK_BYTES])
@pytest.mark.parametrize("offset", [0, 1, 2**35, 2**63 - 1])
def test_a_chunk_is_a_view_of_what_came(kind: Kind, size: int, offset: int) -> None:
    sent: Any = kind(chunk=pb.TensorChunk(offset=offset, data=b"\x07" * size))
    encoded = sent.SerializeToString()
    frame = FRAMINGS[kind].decode(encoded)
    assert isinstance(frame, Chunk)
    assert frame.data.obj is encoded
    assert (frame.offset, bytes(frame.data)) == (offset, b"\x07" * size)


HEADERS: list[Any] = [
    pb.PushPullRequest(exchange=pb.Exchange(requester=pb.Requester(worker="w" * 128))),
    pb.PushPullRequest(exchange=pb.Exchange()),
    pb.PushPullResponse(delivery=pb.Delivery(samples=9, result=pb.PushResult(refusal="NON_FINITE"))),
    pb.PushPullResponse(result=pb.PushResult()),
    pb.PushPullResponse(),
]


@pytest.mark.parametrize("message", HEADERS, ids=lambda message: message.DESCRIPTOR.name)
@pytest.mark.parametrize("size", [1, 127, 128, 16384, CHUNK_BYTES, MAX_CHUNK_BYTES])
def test_data_is_a_view_of_what_came(message: Any, size: int) -> None:
    sent = type(message)()
    sent.CopyFrom(message)
    sent.data = b"\x07" * size
    encoded = sent.SerializeToString()
    frame = FRAMINGS[type(message)].decode(encoded)
    assert isinstance(frame, Headed)
    assert frame.data.obj is encoded
    assert (frame.message, bytes(frame.data)) == (message, b"\x07" * size)


def test_tensor_bytes_never_are_in_a_protobuf_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is given to generated code is short."""
    blob, header = bytes(1 << 16), HEADERS[0]
    parsed: list[int] = []

    class Watched:
        DESCRIPTOR = pb.PushPullRequest.DESCRIPTOR

        @staticmethod
        def FromString(encoded: bytes) -> pb.PushPullRequest:  # noqa: N802
            parsed.append(len(encoded))
            return pb.PushPullRequest.FromString(encoded)

    watching: Framing[Any] = Framing(Watched)  # type: ignore[type-var]
    for sent in (Chunk(0, memoryview(blob)), Chunk(1 << 40, memoryview(blob)), Headed(header, memoryview(blob))):
        frame: Any = watching.decode(FRAMINGS[pb.PushPullRequest].encode(sent))
        assert len(frame.data) == len(blob)
    assert parsed == [header.ByteSize()]


# Bytes of other writers, and of none.


paddings = st.sampled_from([0] * 12 + [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
numbers = st.one_of(st.integers(0, 7), st.sampled_from([15, 16, 2**28, 2**29 - 1, 2**29, 2**40]))
numeric = st.one_of(st.integers(-(2**63), 2**64 - 1), st.integers(0, 300), st.just(-1))


@st.composite
def fields(draw: st.DrawFn, depth: int = 0) -> bytes:
    """One field of any wire type, well formed or nearly."""
    number, padding, length_padding = draw(numbers), draw(paddings), draw(paddings)
    wire_type = draw(st.sampled_from([0, 1, 2, 2, 2, 2, 3, 5]))
    if wire_type == 0:
        return field(number, 0, varint(draw(numeric), draw(paddings)), padding)
    if wire_type in (1, 5):
        return field(number, wire_type, draw(st.binary(min_size=8, max_size=8))[: 8 if wire_type == 1 else 4], padding)
    inner = draw(bodies(depth + 1)) if depth < 3 else draw(blobs)
    if wire_type == 2:
        return field(number, 2, inner, padding, length_padding)
    end = draw(st.sampled_from([number] * 5 + [number + 1]))
    return field(number, 3, inner, padding) + field(end, 4, b"", padding)


@st.composite
def chunk_bodies(draw: st.DrawFn) -> bytes:
    """The inside of a TensorChunk, or what could be taken for it."""
    offset = st.builds(lambda value, pad, more: field(1, 0, varint(value, more), pad), numeric, paddings, paddings)
    data = st.builds(lambda body, pad, more: field(2, 2, body, pad, more), blobs, paddings, paddings)
    return b"".join(draw(st.lists(st.one_of(offset, data, fields(3)), max_size=4)))


def bodies(depth: int) -> st.SearchStrategy[bytes]:
    return st.one_of(st.binary(max_size=20), chunk_bodies(), st.lists(fields(depth), max_size=4).map(b"".join))


@st.composite
def assembled(draw: st.DrawFn, kind: Kind) -> bytes:
    """Fields in any order and number: the kind's own, parts of it, unknown ones, and now and then noise."""
    known = {one.name: one.number for one in kind.DESCRIPTOR.fields}
    part = draw(st.sampled_from(sorted(known)))
    chunk = st.builds(
        lambda body, pad, more: field(known["chunk"], 2, body, pad, more), chunk_bodies(), paddings, paddings
    )
    data = st.builds(lambda body, more: field(known.get("data", 9), 2, body, 0, more), blobs, paddings)
    other = st.builds(lambda body, more: field(known[part], 2, body, 0, more), bodies(1), paddings)
    pieces = draw(st.lists(st.one_of(written(kind), chunk, chunk, data, data, other, fields()), max_size=6))
    return b"".join(pieces)


@st.composite
def mutated(draw: st.DrawFn, kind: Kind) -> bytes:
    """A message with some bytes changed, left out, doubled or put in."""
    encoded = draw(
        st.one_of(messages(kind.DESCRIPTOR).map(lambda message: message.SerializeToString()), assembled(kind))
    )
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(encoded)))
        stop = draw(st.integers(start, min(len(encoded), start + 4)))
        encoded = (
            encoded[:start] + draw(st.one_of(st.binary(max_size=3), st.just(encoded[start:stop] * 2))) + encoded[stop:]
        )
    return encoded


@EACH_KIND
@MANY_EXAMPLES
@given(data=st.data())
def test_fields_in_any_order_repeated_unknown_or_oddly_written_are_read_alike(kind: Kind, data: st.DataObject) -> None:
    agree(kind, data.draw(assembled(kind)))


@EACH_KIND
@MANY_EXAMPLES
@given(data=st.data())
def test_messages_with_some_bytes_changed_are_read_alike(kind: Kind, data: st.DataObject) -> None:
    agree(kind, data.draw(mutated(kind)))


@EACH_KIND
@EXAMPLES
@given(encoded=st.binary(max_size=60))
def test_any_bytes_at_all_are_read_alike(kind: Kind, encoded: bytes) -> None:
    agree(kind, encoded)


@pytest.mark.parametrize(("kind", "encoded"), [read_as(seed) for seed in seeds()])
def test_messages_cut_anywhere_are_read_alike(kind: Kind, encoded: bytes) -> None:
    read = {agree(kind, encoded[:end])[0] for end in range(len(encoded) + 1)}
    assert read > {"malformed"}


# What was found by thinking, by hypothesis or by fuzzing: for PushPullRequest, whose chunk is 2 and whose data is 3.
EXCHANGE, CHUNK = field(1, 2, b""), field(2, 2, field(1, 0, b"\x05") + field(2, 2, b"abc"))
BY_W = field(1, 2, field(1, 2, b"\x0a\x01w"))
DATA, UNKNOWN = field(3, 2, b"abc"), field(9, 2, b"u")
FAR = field(17, 2, field(3, 2, b"z"))
HIGHEST = 2**63 - 1
HEAD = ("headed", EXCHANGE)
NO_HEAD = ("headed", b"")
ODD = {
    "nothing": (b"", (*NO_HEAD, b"")),
    "data alone": (DATA, (*NO_HEAD, b"abc")),
    "data before the header": (DATA + EXCHANGE, (*HEAD, b"abc")),
    "data twice": (EXCHANGE + DATA + field(3, 2, b"z"), (*HEAD, b"z")),
    "data twice, last empty": (EXCHANGE + DATA + field(3, 2, b""), (*HEAD, b"")),
    "data on both sides of the header": (DATA + EXCHANGE + field(3, 2, b"z"), (*HEAD, b"z")),
    "data and then an unknown field": (
        EXCHANGE + DATA + field(9, 2, b"u"),
        ("headed", EXCHANGE + field(9, 2, b"u"), b"abc"),
    ),
    "an unknown field before data": (field(9, 0, b"\x01") + DATA, ("headed", field(9, 0, b"\x01"), b"abc")),
    "what looks like data in a field with a tag of two bytes": (FAR, ("headed", FAR, b"")),
    "data as a varint": (EXCHANGE + field(3, 0, b"\x01"), ("headed", EXCHANGE + field(3, 0, b"\x01"), b"")),
    "a group before data": (field(9, 3, DATA) + field(9, 4, b"") + DATA, ("headed", b"\x4b" + DATA + b"\x4c", b"abc")),
    "data in a group that does not end": (field(9, 3, DATA), ("malformed",)),
    "a field with number 0 before data": (field(0, 2, b"") + DATA, ("malformed",)),
    "the header in two parts": (EXCHANGE + BY_W + DATA, ("headed", BY_W, b"abc")),
    "a chunk": (CHUNK, ("chunk", 5, b"abc")),
    "chunks are merged": (CHUNK + field(2, 2, field(2, 2, b"z")), ("chunk", 5, b"z")),
    "a chunk in a chunk's data": (field(2, 2, field(2, 2, CHUNK)), ("chunk", 0, CHUNK)),
    "a chunk with its data first": (field(2, 2, field(2, 2, b"abc") + field(1, 0, b"\x05")), ("chunk", 5, b"abc")),
    "a chunk with its offset twice": (field(2, 2, b"\x08\x04\x08\x05" + field(2, 2, b"abc")), ("chunk", 5, b"abc")),
    "a chunk with nothing in it": (field(2, 2, b""), ("chunk", 0, b"")),
    "a chunk without data": (field(2, 2, b"\x08\x05"), ("chunk", 5, b"")),
    "a chunk with an unknown field": (field(2, 2, field(2, 2, b"abc") + field(9, 2, b"u")), ("chunk", 0, b"abc")),
    "a negative offset": (field(2, 2, b"\x08" + varint(-1) + field(2, 2, b"abc")), ("chunk", -1, b"abc")),
    "the highest offset": (
        field(2, 2, b"\x08" + varint(HIGHEST) + field(2, 2, b"abc")),
        ("chunk", HIGHEST, b"abc"),
    ),
    "the lowest offset": (field(2, 2, b"\x08" + varint(2**63) + field(2, 2, b"abc")), ("chunk", -(2**63), b"abc")),
    "an offset of eleven bytes": (field(2, 2, b"\x08" + varint(-1, 1) + field(2, 2, b"abc")), ("malformed",)),
    "a chunk with data": (CHUNK + DATA, ("malformed",)),
    "data with a chunk": (DATA + CHUNK, ("malformed",)),
    "a chunk with empty data": (CHUNK + field(3, 2, b""), ("chunk", 5, b"abc")),
    "an exchange after a chunk": (CHUNK + EXCHANGE + DATA, (*HEAD, b"abc")),
    "a chunk after an exchange": (EXCHANGE + CHUNK, ("chunk", 5, b"abc")),
    "data that is longer than the message": (EXCHANGE + DATA[:-1], ("malformed",)),
    "a chunk that is longer than the message": (CHUNK[:-1], ("malformed",)),
    "a chunk whose data is longer than it": (field(2, 2, b"\x12\x04abc"), ("malformed",)),
    "a chunk whose data is shorter than it": (field(2, 2, b"\x12\x02abc"), ("malformed",)),
    "data with a length of 2^63": (EXCHANGE + b"\x1a" + varint(2**63) + b"abc", ("malformed",)),
    "data with a length of four bytes too many": (EXCHANGE + field(3, 2, b"abc", 0, 4), (*HEAD, b"abc")),
    "a tag of five bytes": (field(3, 2, b"abc", 4), (*NO_HEAD, b"abc")),
    "a string that is not UTF-8": (field(1, 2, field(1, 2, field(1, 2, b"\xff"))) + DATA, ("malformed",)),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_messages_mean_what_the_rules_of_protobuf_say(case: str) -> None:
    encoded, expected = ODD[case]
    assert agree(pb.PushPullRequest, encoded) == expected


LENGTHS_OF_SIX_BYTES = {
    "data": EXCHANGE + field(3, 2, b"abc", 0, 5),
    "a chunk": field(2, 2, field(2, 2, b"abc"), 0, 5),
    "a chunk's data": field(2, 2, field(2, 2, b"abc", 0, 5)),
}


@pytest.mark.parametrize("case", LENGTHS_OF_SIX_BYTES)
def test_length_of_more_than_five_bytes_is_for_generated_code_to_judge(case: str) -> None:
    # Some versions of protobuf take it, others do not.
    assert agree(pb.PushPullRequest, LENGTHS_OF_SIX_BYTES[case])[0] in {"malformed", "headed", "chunk"}


def test_what_is_no_message_is_told_in_a_sentence() -> None:
    frame = FRAMINGS[pb.PushPullRequest].decode(b"\x0a\x05a")
    assert isinstance(frame, Malformed)
    assert frame.why.startswith("received 3 bytes that are not a PushPullRequest: ")
    beside = FRAMINGS[pb.PushPullRequest].decode(CHUNK + DATA)
    assert beside == Malformed(
        "received a chunk together with data: send `data` with the message that begins a payload"
    )


# Hostile messages cost no more of Python's time than others.


def lines_run(act: Callable[[], object]) -> int:
    """How many lines of the framing are executed."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != framing.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


TINY = {
    "empty data": field(3, 2, b""),
    "an unknown field": field(9, 2, b""),
    "an empty exchange": field(1, 2, b""),
    "an empty chunk": field(2, 2, b""),
    "a varint": field(9, 0, b"\x01"),
    "an offset in a chunk": field(1, 0, b"\x01"),
}


FEW_LINES = 100  # each of the few fields looked at, and each byte of a length, takes some


@pytest.mark.parametrize("ending", [b"", DATA, CHUNK], ids=["no end", "data", "chunk"])
@pytest.mark.parametrize("tiny", TINY)
def test_a_message_of_many_tiny_fields_takes_few_steps(tiny: str, ending: bytes) -> None:
    encoded = TINY[tiny] * 200_000 + ending
    decode = FRAMINGS[pb.PushPullRequest].decode
    assert 0 < lines_run(lambda: decode(encoded)) < FEW_LINES
    in_a_chunk = field(2, 2, encoded)
    assert 0 < lines_run(lambda: decode(in_a_chunk)) < FEW_LINES


def test_a_length_without_end_takes_few_steps() -> None:
    decode = FRAMINGS[pb.PushPullRequest].decode
    for tag in (b"\x12", b"\x1a", b"\x12\x05\x08"):
        endless = tag + b"\x80" * 200_000
        assert meaning(pb.PushPullRequest, endless) == ("malformed",)
        assert 0 < lines_run(lambda encoded=endless: decode(encoded)) < FEW_LINES
