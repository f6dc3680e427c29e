"""Reads a trace, and says in which line something else came."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ormo_runtime.settings import UsageError
from ormo_server.trace.rows import EVENTS, FORMAT, ROWS, Entry, Refused, Row, Start, recorded_of

_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Segment:
    """What happened from one start of the server to the next, or to the end of the record."""

    start: Start
    inputs: list[Entry]


def read_trace(path: Path) -> list[Segment]:
    """The segments of a trace, one at least. A last line that a crash cut short is left out.

    Raises:
        UsageError: it can't be read, or is not a trace; the sentence says in which line, what came, what was expected.
    """
    segments: list[Segment] = []
    for number, row in _rows_of(path):
        if isinstance(row, Start):
            segments.append(Segment(row, []))
        elif segments:
            segments[-1].inputs.append(row if isinstance(row, Refused) else recorded_of(row))
        else:
            raise UsageError(
                f"{path}, line {number}: a {row.event!r} row came where a 'start' row was expected: the beginning of "
                "the file is missing"
            )
    if not segments:
        raise UsageError(f"{path} has no whole row: expected a trace as `ormo-server serve --trace` writes it")
    return segments


def _rows_of(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                try:
                    yield number, ROWS.validate_json(text)
                except ValidationError as error:
                    if _is_torn(text, error):
                        return
                    raise UsageError(f"{path}, line {number}: {_problem(error)}") from None
    except OSError as error:
        raise UsageError(f"the trace {path} can't be read: {error.strerror or error}") from error


def _is_torn(text: bytes, error: ValidationError) -> bool:
    return not text.endswith(b"\n") and error.errors()[0]["type"] == "json_invalid"


def _problem(error: ValidationError) -> str:
    found = error.errors()
    # With another format number everything else may rightly differ.
    first = next((details for details in found if details["loc"][1:] == ("format",)), found[0])
    kind, place = first["type"], first["loc"]
    if kind == "json_invalid":
        return f"{_lower_first(first['msg'])}: expected a row as `ormo-server serve --trace` writes it"
    if not place:
        came = first["input"].get("event") if isinstance(first["input"], dict) else first["input"]
        return f"event {_shown(came)} is not known: expected one of {', '.join(EVENTS)}"
    if place[1:] == ("format",) and kind != "missing":
        return f"the format is {_shown(first['input'])}, and this program reads {FORMAT}: use the version that wrote it"
    return _of_column(f"a {place[0]!r} row", ".".join(map(str, place[1:])), first)


def _of_column(row: str, column: str, details: ErrorDetails) -> str:
    if details["type"] == "missing":
        return f"{row} without {column!r}: expected all of its columns"
    if details["type"] == "extra_forbidden":
        return f"{row} with an unknown column {column!r}: use the version that wrote it"
    message = details["msg"].removeprefix("Value error, ")
    if column == "settings" and details["type"] == "value_error":
        return f"the settings can't be used: {message}"
    return f"{column!r} of {row} is {_shown(details['input'])}: {_lower_first(message)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _lower_first(message: str) -> str:
    message = message.replace("Invalid JSON", "no JSON").replace(" line 1 column", " column")
    return message[:1].lower() + message[1:]
