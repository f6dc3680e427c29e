"""No message makes more of its bytes than is good for whoever reads it, whoever wrote it and however."""

import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from fuzz.script import Script
from fuzz.wire_format import assembled, field, varint
from ormo_protos import limits, parsing
from ormo_protos.limits import LONGEST_LISTS, MAX_REPEATS, SMALL_MESSAGE_BYTES
from ormo_protos.parsing import Malformed, Parser
from ormo_protos.refusals import Reason
from ormo_protos.v1 import parameter_server_pb2
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.core.step_size import HIGHEST, LOWEST

KINDS: list[type[Message]] = [GetMessageClass(kind) for kind in pb.DESCRIPTOR.message_types_by_name.values()]
GROUP, END_OF_GROUP, DELIMITED = 3, 4, 2


def lists(kind: Descriptor, path: tuple[FieldDescriptor, ...] = ()) -> Iterator[tuple[FieldDescriptor, ...]]:
    """The way to every repeated field and map of a message, also in the messages in it."""
    for each in kind.fields:
        if each.is_repeated:
            yield (*path, each)
        if each.message_type is not None:
            yield from lists(each.message_type, (*path, each))


LISTS = [(kind, path) for kind in KINDS for path in lists(kind.DESCRIPTOR)]


def with_elements(path: tuple[FieldDescriptor, ...], number: int) -> bytes:
    """A message whose last field on the path has so many elements; lists on the way there have one."""
    *way, last = path
    one = field(last.number, DELIMITED if last.message_type else 0, b"" if last.message_type else b"\x01")
    made = one * number
    for each in reversed(way):
        made = field(each.number, DELIMITED, made)
    return made


def test_every_list_and_map_of_the_contract_has_a_limit_and_every_limit_a_list() -> None:
    assert {path[-1].full_name for _, path in LISTS} == set(LONGEST_LISTS)


@pytest.mark.parametrize(
    ("kind", "path"),
    LISTS,
    ids=[f"{kind.DESCRIPTOR.name}.{'.'.join(each.name for each in path)}" for kind, path in LISTS],
)
def test_a_list_may_have_as_many_elements_as_its_limit_says_and_no_more(
    kind: type[Message], path: tuple[FieldDescriptor, ...]
) -> None:
    most, name = LONGEST_LISTS[path[-1].full_name], path[-1].full_name.removeprefix("ormo.v1.")
    taken = Parser(kind).parse(with_elements(path, most))
    assert isinstance(taken, kind)
    refused = Parser(kind).parse(with_elements(path, most + 1))
    assert isinstance(refused, Malformed)
    assert refused.why == f"{name} appears more than {most:,} times in one message: send at most that many"
    assert (refused.reason is Reason.BAD_MANIFEST) == name.startswith(("Manifest", "TensorSpec"))


def test_a_list_without_a_limit_keeps_the_programs_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    parsing._Counted.of.cache_clear()
    monkeypatch.delitem(LONGEST_LISTS, "ormo.v1.HeartbeatRequest.returned")
    with pytest.raises(KeyError, match="returned"):
        Parser(pb.HeartbeatRequest)
    parsing._Counted.of.cache_clear()


def shape(packed: bytes) -> bytes:
    return field(1, DELIMITED, field(3, DELIMITED, field(1, DELIMITED, field(2, DELIMITED, packed))))


MANIFEST_TWICE = field(1, DELIMITED, field(3, DELIMITED, field(1, DELIMITED, b"") * 50_001))
BEYOND: dict[str, tuple[type[Message], bytes, str]] = {
    "tickets": (pb.HeartbeatRequest, b"\x1a\x00" * 2_000_000, "HeartbeatRequest.returned appears more than 64 times"),
    "tickets with long tags": (pb.HeartbeatRequest, field(3, DELIMITED, b"", 3) * 65, "returned"),
    "tickets after a group": (pb.HeartbeatRequest, b"\x4b\x1a\x00\x4c" + b"\x1a\x00" * 65, "returned"),
    "a packed shape": (pb.OfferModelRequest, shape(varint(2**62) * 17), "TensorSpec.shape"),
    "a packed shape of megabytes": (pb.OfferModelRequest, shape(b"\x01" * 4_000_000), "TensorSpec.shape"),
    "a model in two parts": (
        pb.OfferModelRequest,
        MANIFEST_TWICE * 2,
        "Manifest.tensors appears more than 100,000 times",
    ),
    "turns": (pb.PushPullRequest, b"\x0a\x00\x12\x00" * 1_000_000, "PushPullRequest.exchange appears more than 1,000"),
    "a name again and again": (
        pb.JoinRequest,
        field(1, DELIMITED, bytes(20)) * (MAX_REPEATS + 1),
        "JoinRequest.worker",
    ),
    "unknown fields": (
        pb.JoinRequest,
        field(15, DELIMITED, bytes(20)) * (MAX_REPEATS + 1),
        "a field that is not known",
    ),
    "unknown groups": (pb.JoinRequest, b"\x7b" * 9_000 + b"\x7c" * 9_000, "a field that is not known"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_too_much_is_refused_however_it_is_written_and_before_a_message_is_made(case: str) -> None:
    kind, encoded, sentence = BEYOND[case]
    parser = Parser(kind)
    parser._kind = None  # type: ignore[assignment] # whoever makes a message fails
    refused = parser.parse(encoded)
    assert isinstance(refused, Malformed)
    assert sentence in refused.why


SOUND: dict[str, tuple[type[Message], bytes]] = {
    "a packed shape": (pb.OfferModelRequest, shape(varint(2**62) * 16)),
    "lists in a group are not known": (pb.HeartbeatRequest, b"\x4b" + b"\x1a\x00" * 65 + b"\x4c"),
    "a part of the bytes of a text": (
        pb.HeartbeatRequest,
        pb.HeartbeatRequest(worker="\x1a\0" * 65).SerializeToString(),
    ),
    "large and with unknown fields": (pb.JoinRequest, field(15, DELIMITED, bytes(4_000_000)) + b"\x78\x00" * 900),
}


@pytest.mark.parametrize("case", SOUND)
def test_what_is_within_the_limits_is_what_generated_code_makes_of_it(case: str) -> None:
    kind, encoded = SOUND[case]
    assert Parser(kind).parse(encoded) == kind.FromString(encoded)


def largest(message: Message, found: dict[str, int]) -> dict[str, int]:
    """The most elements that each list has, as generated code reads them."""
    for each, value in message.ListFields():
        if each.is_repeated:
            found[each.full_name] = max(found.get(each.full_name, 0), len(value))
        if each.message_type is not None and not each.message_type.GetOptions().map_entry:
            for one in value if each.is_repeated else [value]:
                largest(one, found)
    return found


def written(by: random.Random, kind: type[Message]) -> bytes:
    """A message in any way that the wire format allows, and some that it does not; most have lists, in parts."""
    made = b"" if by.random() < 0.7 else assembled(Script(by.randbytes(200)))
    ways = [path for other, path in LISTS if other is kind]
    for _ in range(by.randrange(4)):
        made += with_elements(by.choice(ways), by.randrange(5))
    return made


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type[Message]], Parser[Any]]]:
    parsing._Counted.of.cache_clear()
    for name in LONGEST_LISTS:
        monkeypatch.setitem(LONGEST_LISTS, name, 3)
    yield Parser
    parsing._Counted.of.cache_clear()


def test_no_bytes_make_a_message_with_more_than_the_limits_allow(
    small_limits: Callable[[type[Message]], Parser[Any]],
) -> None:
    """And bytes as generated code writes them are refused for their lists only if these are beyond a limit."""
    by, refused, taken = random.Random(15), 0, 0
    parsers = [small_limits(kind) for kind in KINDS if any(other is kind for other, _ in LISTS)]
    for _ in range(10_000):
        parser = by.choice(parsers)
        encoded = written(by, parser._kind)
        message = parser.parse(encoded)
        if not isinstance(message, Malformed):
            found = largest(message, {})
            taken += bool(found)
            assert all(number <= 3 for number in found.values()), encoded
            assert parser.parse(message.SerializeToString()) == message
        elif "appears more than" in message.why:
            refused += 1
            plain = parser._kind.FromString(encoded) if well_formed(parser._kind, encoded) else None
            if plain is not None:
                plain.DiscardUnknownFields()  # such as a list's number with another wire type, which is counted with it
            if plain is not None and isinstance(parser.parse(plain.SerializeToString()), Malformed):
                assert any(number > 3 for number in largest(plain, {}).values()), encoded
    assert min(refused, taken) > 500


def well_formed(kind: type[Message], encoded: bytes) -> bool:
    try:
        kind.FromString(encoded)
    except Exception:  # noqa: BLE001 - protobuf's own
        return False
    return True


def test_messages_that_are_small_and_have_no_lists_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are thousands a second, and nothing of that size does harm."""
    monkeypatch.setattr(parsing, "_count", None)
    exchange = pb.PushPullRequest(exchange=pb.Exchange(requester=pb.Requester(worker="w")))
    assert Parser(pb.PushPullRequest).parse(exchange.SerializeToString()) == exchange
    exchange.exchange.requester.worker = "w" * SMALL_MESSAGE_BYTES
    with pytest.raises(TypeError):
        Parser(pb.PushPullRequest).parse(exchange.SerializeToString())


# The table and the sentences of the contract

PROTO = Path(parameter_server_pb2.__file__).with_name("parameter_server.proto")
COMMENTS = " ".join(
    line.strip().removeprefix("//").strip()
    for line in PROTO.read_text(encoding="utf-8").splitlines()
    if line.strip().startswith("//")
)
MIB, KIB = 1 << 20, 1 << 10
LENGTHS = {name.removeprefix("ormo.v1."): most for name, most in LONGEST_LISTS.items()}
# What the contract says of each, with the number of the table.
SENTENCES = {
    "MAX_TENSORS": [f"1 to {limits.MAX_TENSORS:,} tensors, in one message or in several."],
    "MAX_NAME_BYTES": [f"1 to {limits.MAX_NAME_BYTES} bytes, unique."],
    "MAX_DIMENSIONS": [f"none for a scalar; at most {limits.MAX_DIMENSIONS}."],
    "FREE_PARTS": [f"it may come in {limits.FREE_PARTS} messages, and one more for each"],
    "TENSORS_PER_PART": [f"messages, and one more for each {limits.TENSORS_PER_PART} tensors."],
    "CHUNK_BYTES": [f"senders use {limits.CHUNK_BYTES / MIB:g} MiB."],
    "MAX_CHUNK_BYTES": [
        f"1 byte to {limits.MAX_CHUNK_BYTES // MIB} MiB;",
        f"the first bytes of its gradient's payload, up to {limits.MAX_CHUNK_BYTES // MIB} MiB;",
        f"the first bytes of its payload, up to {limits.MAX_CHUNK_BYTES // MIB} MiB;",
    ],
    "FREE_CHUNKS": [f"A payload may come in {limits.FREE_CHUNKS} chunks, and one more for each"],
    "BYTES_PER_CHUNK": [f"chunks, and one more for each {limits.BYTES_PER_CHUNK // KIB} KiB that it has."],
    "INT8_BLOCK_ELEMENTS": [f"A block is {limits.INT8_BLOCK_ELEMENTS:,} values of one tensor in a row"],
    "INT8_LARGEST": [f"two's complement but never {-limits.INT8_LARGEST - 1}, times the float32 scale"],
    "SMALL_MESSAGE_BYTES": [f"one of more than {limits.SMALL_MESSAGE_BYTES // KIB} KiB."],
    "LONGEST_LISTS": [
        f"Tickets that will not be used, at most {LENGTHS['HeartbeatRequest.returned']}.",
        f"Live workers, by id; at most {LENGTHS['GetStatusResponse.workers']:,}.",
        f"by reason; at most {LENGTHS['GetStatusResponse.refusals']:,} of them.",
        f"1 to {LENGTHS['Manifest.tensors']:,} tensors",
        f"at most {LENGTHS['TensorSpec.shape']}.",
    ],
    "WORKER_ID_IN_WORDS": [f"The worker's id: {limits.WORKER_ID_IN_WORDS}"],
    "MAX_SLOTS": [f"which is 2 by default and {limits.MAX_SLOTS} at most;"],
    "MAX_SAMPLES": [f"0 to 2^{(limits.MAX_SAMPLES + 1).bit_length() - 1} - 1: counted"],
    "MAX_COMPUTE_SECONDS": [f"up to 1e{math.log10(limits.MAX_COMPUTE_SECONDS):g}; 0 if not known."],
}
# What the reader of a message bounds beyond what the contract says of it, or says in another way.
NOT_STATED = {"MAX_ELEMENTS", "MAX_PART_BYTES", "MAX_MESSAGE_BYTES", "MAX_REPEATS", "WORKER_ID", "PHASES"}


@pytest.mark.parametrize("name", SENTENCES)
def test_the_contract_states_each_number_of_the_table(name: str) -> None:
    for sentence in SENTENCES[name]:
        assert sentence in COMMENTS


def test_each_constant_of_the_table_has_its_sentence_or_is_known_to_have_none() -> None:
    assert SENTENCES.keys() | NOT_STATED == {name for name in vars(limits) if name.isupper()}


def test_each_bound_that_the_contract_states_is_one_of_the_table() -> None:
    of_the_core = f"from {LOWEST:g} to {HIGHEST:g}.".replace("1e+06", "1e6")
    of_formats = ["a learning rate outside 1e-15 to 1e6", "0 to 1; not set", "an accuracy outside 0 to 1"]
    known = " ".join([*(each for sentences in SENTENCES.values() for each in sentences), of_the_core, *of_formats])
    stated = re.findall(r"(?:at most|more than|up to|outside|\d to) [\d,.]*\d(?:e\d+)?(?:\^\d+)?", COMMENTS)
    assert len(stated) >= 15
    assert [bound for bound in stated if bound not in known] == []


def test_ids_of_workers_are_what_the_words_say() -> None:
    allowed = [chr(code) for code in range(256) if re.fullmatch(limits.WORKER_ID, chr(code))]
    assert "".join(allowed) == "-.0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"
    lengths = [length for length in range(300) if re.fullmatch(limits.WORKER_ID, "a" * length)]
    assert f"{lengths[0]} to {lengths[-1]} of the characters A-Z a-z 0-9 . _ -" == limits.WORKER_ID_IN_WORDS


def test_phases_are_those_of_the_contract() -> None:
    phases = {number: name for name, number in pb.GetStatusResponse.Phase.items() if number}
    assert {number: f"PHASE_{word.upper()}" for number, word in limits.PHASES.items()} == phases
