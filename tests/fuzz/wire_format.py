"""Protobuf's wire format, written in every way that it allows, and in some that it does not."""

from fuzz.script import Script

NUMBERS = (1, 2, 3, 4, 5, 0, 6, 15, 16, 17, 2**28, 2**29 - 1, 2**29)
WIRE_TYPES = (2, 2, 2, 2, 0, 1, 3, 5)
PADDINGS = (0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
LENGTH_DELIMITED, GROUP, END_OF_GROUP = 2, 3, 4


def varint(value: int, padding: int = 0) -> bytes:
    """A varint with so many more bytes than it needs."""
    value &= 2**64 - 1
    low = []
    while value >= 0x80:
        low.append(value & 0x7F | 0x80)
        value >>= 7
    zeros = [0x80] * (padding - 1) + [0] if padding else []
    return bytes([*low, value | (0x80 if padding else 0), *zeros])


def field(number: int, wire_type: int, body: bytes, padding: int = 0, length_padding: int = 0) -> bytes:
    """One field; its tag, and its length if it has one, with so many more bytes than they need."""
    length = varint(len(body), length_padding) if wire_type == LENGTH_DELIMITED else b""
    return varint(number << 3 | wire_type, padding) + length + body


def assembled(script: Script, depth: int = 0) -> bytes:
    """The fields that a script describes; three bytes for each, and its content."""
    made = b""
    for _ in range(1 + script.number() % 4):
        number, shape, paddings = NUMBERS[script.number() % len(NUMBERS)], script.number(), script.number()
        wire_type, nested = WIRE_TYPES[shape & 7], shape & 8 and depth < 4
        padding, more = PADDINGS[paddings & 15], PADDINGS[paddings >> 4]
        match wire_type:
            case 0:
                body = varint(script.number(1 + (shape >> 5), signed=True), more)
            case 1 | 5:
                body = script.take(8 if wire_type == 1 else 4)
            case _:
                body = assembled(script, depth + 1) if nested else script.take(script.number())
        made += field(number, wire_type, body, padding, more)
        if wire_type == GROUP:
            made += field(number + (shape >> 7), END_OF_GROUP, b"")
    return made
