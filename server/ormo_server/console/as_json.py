"""A message as plain data that becomes JSON which every reader takes."""

import math
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from ormo_server.console.words import phase_word


def as_plain(message: Message) -> dict[str, Any]:
    """All fields under their names in the contract, whether set or not.

    Protobuf's own JSON has 64-bit integers and NaN as text, which `jq` can't count with, and leaves fields out. Here
    numbers are numbers; what is not set, NaN or infinite is None; random 64-bit numbers are 16 hexadecimal digits.
    """
    return {
        field.name: _field(field, getattr(message, field.name))
        if not field.has_presence or message.HasField(field.name)
        else None
        for field in message.DESCRIPTOR.fields
    }


def _field(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        of_values = field.message_type.fields_by_name["value"]
        return {str(key): _value(of_values, value[key]) for key in sorted(value)}
    if field.is_repeated:
        return [_value(field, item) for item in value]
    return _value(field, value)


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return as_plain(value)
    if field.enum_type is not None:  # a status has no other
        return phase_word(value)
    if field.type == FieldDescriptor.TYPE_FIXED64:
        return f"{value:016x}"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
