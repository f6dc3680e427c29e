"""Any bytes mean to the hand-written framing what they mean to the generated code."""

from collections.abc import Iterator
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError, Message

from fuzz.script import Script
from fuzz.wire_format import NUMBERS, assembled
from ormo_protos.framing import Framing, Headed
from ormo_protos.parsing import Malformed
from ormo_protos.tensors import Chunk
from ormo_protos.v1 import parameter_server_pb2 as pb

KINDS: tuple[type[Message], ...] = (
    pb.PushPullRequest,
    pb.PushGradientRequest,
    pb.OfferModelRequest,
    pb.PushPullResponse,
    pb.PullParamsResponse,
)
FRAMINGS: dict[type[Message], Framing[Any]] = {kind: Framing(kind) for kind in KINDS}
# "malformed" alone; "chunk", offset, bytes; "headed", the message without its data, data.
Meaning: TypeAlias = tuple[Any, ...]


def meaning(kind: type[Message], encoded: bytes) -> Meaning:
    """What the bytes are, as generated code reads them."""
    try:
        message: Any = kind.FromString(encoded)
    except DecodeError:
        return ("malformed",)
    data = getattr(message, "data", b"")
    part = message.WhichOneof("part")
    if part == "chunk":
        return ("malformed",) if data else ("chunk", message.chunk.offset, message.chunk.data)
    if "data" in kind.DESCRIPTOR.fields_by_name:
        message.ClearField("data")
    return ("headed", message.SerializeToString(deterministic=True), data)


def told(frame: Any) -> Meaning:
    """What a frame is, in the same words."""
    if isinstance(frame, Malformed):
        assert frame.why
        return ("malformed",)
    if isinstance(frame, Chunk):
        return ("chunk", frame.offset, bytes(frame.data))
    assert isinstance(frame, Headed)
    return ("headed", frame.message.SerializeToString(deterministic=True), bytes(frame.data))


def agree(kind: type[Message], encoded: bytes) -> Meaning:
    """Check that bytes are read alike, and written anew are read alike again; returns what they are."""
    framing = FRAMINGS[kind]
    frame = framing.decode(encoded)
    if isinstance(frame, Malformed) and "appears more than" in frame.why:
        return told(frame)  # generated code has no limits; tests/protos/test_limits.py has them on either side
    expected = meaning(kind, encoded)
    assert told(frame) == expected, (kind.DESCRIPTOR.name, encoded, told(frame), expected)
    if expected[0] != "malformed" and not (expected[0] == "chunk" and expected[1] < 0):  # nobody writes below 0
        assert meaning(kind, framing.encode(frame)) == expected, (kind.DESCRIPTOR.name, encoded)
    return expected


def message(fuzzed: bytes) -> tuple[type[Message], bytes]:
    """The first byte chooses the kind, and whether the others are the message or a script that describes it."""
    script = Script(fuzzed)
    choice = script.number()
    return KINDS[choice % len(KINDS)], assembled(script) if choice & 128 else script.rest()


def check(fuzzed: bytes) -> None:
    """Both read the message alike."""
    agree(*message(fuzzed))


def seeds() -> Iterator[bytes]:
    """A message of each shape, and scripts for some."""
    ticket = pb.Ticket(epoch=7, number=3, iteration=2, bucket=1)
    gradient = pb.Gradient(ticket=ticket, manifest_digest=b"d" * 32, dtype=pb.DTYPE_FLOAT32, payload_bytes=8, loss=0.5)
    requester = pb.Requester(worker="w", incarnation=5, slot=1, request=9)
    exchange = pb.Exchange(requester=requester, gradient=gradient, next=pb.DeliveryRequest(takes_data=True))
    result = pb.PushResult(request=9, iteration=pb.Iteration(epoch=7, number=4), delay=1, refusal="NON_FINITE")
    delivery = pb.Delivery(ticket=ticket, payload_bytes=8, result=result)
    offer = pb.ModelOffer(worker="w", manifest=pb.Manifest(tensors=[pb.TensorSpec(name="x", shape=[2, 2])]))
    chunks = [pb.TensorChunk(offset=offset, data=data) for offset, data in ((0, b"abcd"), (300, b"x" * 200), (-1, b""))]
    parts: dict[type[Message], list[dict[str, Any]]] = {
        pb.PushPullRequest: [{"exchange": exchange}, {"exchange": exchange, "data": b"12345678"}],
        pb.PushGradientRequest: [{"push": pb.Push(requester=requester, gradient=gradient)}],
        pb.OfferModelRequest: [{"offer": offer}],
        pb.PushPullResponse: [
            {"result": result},
            {"delivery": delivery, "data": b"x" * 200},
            {"finished": pb.Finished()},
        ],
        pb.PullParamsResponse: [{"delivery": delivery}],
    }
    for at, kind in enumerate(KINDS):
        for fields in (*parts[kind], *({"chunk": chunk} for chunk in chunks)):
            yield bytes([at]) + kind(**fields).SerializeToString()
    for choice in range(128, 128 + len(KINDS)):
        numbers = {one.name: NUMBERS.index(one.number) for one in KINDS[choice % len(KINDS)].DESCRIPTOR.fields}
        abc, offset, header = b"\x00\x00\x03abc", b"\x00\x04\x00\x05", b"\x00\x00\x00\x00"
        yield bytes([choice, 0, numbers["chunk"], 8, 0, 1]) + offset + b"\x01" + abc
        if "data" in numbers:
            yield bytes([choice, 1]) + header + bytes([numbers["data"]]) + abc
