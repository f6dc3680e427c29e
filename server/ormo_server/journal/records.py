"""The lines of the journal, and how they hang together, so that one that is missing, or in another place, shows.

    checksum before number acknowledged text

All but the text are numbers: the CRC-32 of the rest of the line; that of the line before; the line's place in its log,
from 1; and how many of the log's lines had been acknowledged when it was written, 0 and below for lines of the log
before. So a line that is lost is missed by the next one, and what it says was told to somebody is known for sure.

Behind the lines there may be zeros, for lines that never came: what is written over a file's own blocks is on the disk
sooner than what makes it longer.

A log begins with an opening, which says how the log before it ends. An older server reads it as a delivery that never
was, and refuses to go on, instead of taking all lines for a torn end. Its own logs have no opening, and lines of a
checksum and a text. One that knows lines like these but no gradients in them takes the first for damage: it says how
many acknowledged entries it can't use, and keeps them.
"""

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError
from pydantic_core import to_json

from ormo_server.trace.rows import INPUT_ROWS, Recorded, columns_of, recorded_of

LOG_NAME = re.compile(r"inputs-(\d{8,})\.log")
GRADIENTS_NAME = re.compile(r"gradients-(\d{8,})\.bin")
MARK_NAME = re.compile(r"acknowledged-(\d{8,})")
# No line is as long: ids of workers are limited.
LONGEST_LINE_BYTES = 1 << 16
_CHECKSUM_DIGITS = 8

Count = Annotated[int, Field(ge=0)]


def _read(value: Any) -> Recorded:
    return value if isinstance(value, Recorded) else recorded_of(INPUT_ROWS.validate_python(value))


InputOfTrace = Annotated[Recorded, PlainValidator(_read), PlainSerializer(columns_of)]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StoredGradient(_Line):
    """Where a gradient's payload is.

    Attributes:
        file: number of the file.
        offset, size: bytes in it.
        checksum: CRC-32 of them.
        dtype: of the payload's first section, a wire dtype.
        with_buffers: whether it has buffers.
    """

    file: Count
    offset: Count
    size: Count
    checksum: Count
    dtype: Count
    with_buffers: bool


class GradientInLine(_Line):
    """A gradient's payload that is small enough to stand in its line.

    Attributes:
        payload: its bytes; base64 in the file.
        dtype: of the payload's first section, a wire dtype.
        with_buffers: whether it has buffers.
    """

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    payload: bytes
    dtype: Count
    with_buffers: bool


class Delivered(_Line):
    """Parameters went out with a slot's ticket; only for update rules that keep them.

    Attributes:
        worker, slot: whose.
        dtype: as it was sent, a wire dtype.
    """

    worker: str
    slot: Count
    dtype: Count


KeptGradient = StoredGradient | GradientInLine


class Record(_Line):
    """One line: an input, or a delivery.

    Attributes:
        input: what the core was given, as a row of a trace.
        gradient: the payload, or where it is, if the input is a push.
        delivered: what went out, if the line is a delivery.
    """

    input: InputOfTrace | None = None
    gradient: KeptGradient | None = None
    delivered: Delivered | None = None

    @classmethod
    def read(cls, text: bytes) -> "Record | None":
        """The record that is written like this; None if it is none."""
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            return None

    def text(self) -> bytes:
        """As it is written."""
        return self.model_dump_json(exclude_none=True).encode()


def text_of(recorded: Recorded, gradient: KeptGradient | None) -> bytes:
    """The text of an input's line, as `Record.text` has it, and in a third of the time."""
    line = {"input": columns_of(recorded)}
    return to_json(line if gradient is None else {**line, "gradient": gradient})


def seal(record: Record) -> bytes:
    """A line of a checksum and the record."""
    text = record.text()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def record_of(line: bytes) -> Record | None:
    """The record of such a line; None if it is not whole."""
    checksum, space, text = line[:_CHECKSUM_DIGITS], line[_CHECKSUM_DIGITS : _CHECKSUM_DIGITS + 1], line[9:-1]
    if not line.endswith(b"\n") or space != b" " or checksum != b"%08x" % zlib.crc32(text):
        return None
    return Record.read(text)


def next_log(directory: Path, after: int) -> int:
    """A number above this one that no log has, nor had as long as a mark of it is there."""
    return 1 + max((after, *numbered(directory, LOG_NAME), *numbered(directory, MARK_NAME)))


def log_path(directory: Path, number: int) -> Path:
    """The log with this number."""
    return directory / f"inputs-{number:08d}.log"


def gradients_path(directory: Path, number: int) -> Path:
    """The file of gradients with this number."""
    return directory / f"gradients-{number:08d}.bin"


def numbered(directory: Path, name: re.Pattern[str]) -> dict[int, Path]:
    """The files in a directory with names of this kind, by number, rising; none if there is no directory."""
    found = ((name.fullmatch(path.name), path) for path in directory.iterdir()) if directory.is_dir() else ()
    return dict(sorted((int(match[1]), path) for match, path in found if match))


_LINE = re.compile(rb"([0-9a-f]{8}) (([0-9a-f]{8}) (\d{1,18}) (-?\d{1,18}) (\{.*\}))\n")
_OPENING = "behind log {}: a newer server wrote this journal, start that one"
_OPENED = re.compile(r"behind log (\d{1,18}): .*")


class Place(NamedTuple):
    """A line of a journal: the number of its log, and its own in there, from 1; 0 stands for before the first."""

    log: int
    line: int


@dataclass(frozen=True, slots=True)
class End:
    """Where a log ends.

    Attributes:
        log: the log's number.
        lines: how many it has, its opening not counted.
        link: checksum of the last line of the chain, for the next one to name.
        unacknowledged: how many of the last lines, in this log and before, nobody was told of.
    """

    log: int
    lines: int
    link: int
    unacknowledged: int = 0

    @classmethod
    def before_all(cls, log: int) -> "End":
        """What the first log of a server follows if it has this number: nothing that another one follows."""
        return cls(log - 1, 0, zlib.crc32(b"%d" % log))

    @property
    def place(self) -> Place:
        """Of the last line."""
        return Place(self.log, self.lines)

    def all_acknowledged(self) -> "End":
        """The same end, once the workers may hear of every line."""
        return End(self.log, self.lines, self.link)

    def turned_over(self) -> "End":
        """Where the next log ends as long as it has no lines."""
        return End(self.log + 1, 0, self.link, self.unacknowledged)


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is whole.

    Attributes:
        record: what it says.
        number: the line's place in its log, from 1.
        acknowledged: how many lines of its log had been, when it was written.
        link: checksum of the line, which the next one repeats.
        before: that of the line before it; None in a log without a chain.
    """

    record: Record
    number: int
    acknowledged: int
    link: int
    before: int | None


def opening(before: End) -> bytes:
    """The first line of a log that follows another."""
    return seal(Record(delivered=Delivered(worker=_OPENING.format(before.log), slot=before.lines, dtype=before.link)))


def chain_lines(end: End, texts: Iterable[bytes]) -> tuple[bytes, End]:
    """The lines of these texts behind the end of a log, and its end behind them."""
    lines, number, link = [], end.lines, end.link
    for number, text in enumerate(texts, start=end.lines + 1):
        rest = b"%08x %d %d %s" % (link, number, end.lines - end.unacknowledged, text)
        link = zlib.crc32(rest)
        lines.append(b"%08x %s\n" % (link, rest))
    return b"".join(lines), End(end.log, number, link, end.unacknowledged + number - end.lines)


def parse(line: bytes, number: int) -> Line | End | None:
    """A line, or the end of the log before that an opening tells of; None if it is not whole.

    Args:
        line: with its end.
        number: where it stands, for a line that does not say it. What was acknowledged it does not say either: all
            that stands before a whole line is taken for it.
    """
    match = _LINE.fullmatch(line)
    if match is not None:
        checksum, rest, before, at, acknowledged, text = match.groups()
        record = Record.read(text) if int(checksum, 16) == zlib.crc32(rest) else None
        if record is None:
            return None
        return Line(record, int(at), int(acknowledged), int(checksum, 16), int(before, 16))
    record = record_of(line)
    if record is None:
        return None
    if record.delivered is not None and (opened := _OPENED.fullmatch(record.delivered.worker)):
        return End(int(opened[1]), record.delivered.slot, record.delivered.dtype)
    return Line(record, number, number - 1, 0, None)
