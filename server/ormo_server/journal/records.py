"""The lines of the journal."""

import re
import zlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError

from ormo_server.trace.rows import INPUT_ROWS, Recorded, recorded_of, row_of

LOG_NAME = re.compile(r"inputs-(\d{8,})\.log")
GRADIENTS_NAME = re.compile(r"gradients-(\d{8,})\.bin")
MARK_NAME = re.compile(r"acknowledged-(\d{8,})")
# No line is as long: ids of workers are limited.
LONGEST_LINE_BYTES = 1 << 16
_CHECKSUM_DIGITS = 8

Count = Annotated[int, Field(ge=0)]


def _read(value: Any) -> Recorded:
    return value if isinstance(value, Recorded) else recorded_of(INPUT_ROWS.validate_python(value))


def _columns(recorded: Recorded) -> dict[str, Any]:
    return row_of(recorded).model_dump(mode="json", exclude_none=True)


InputOfTrace = Annotated[Recorded, PlainValidator(_read), PlainSerializer(_columns)]


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


class Delivered(_Line):
    """Parameters went out with a slot's ticket; only for update rules that keep them.

    Attributes:
        worker, slot: whose.
        dtype: as it was sent, a wire dtype.
    """

    worker: str
    slot: Count
    dtype: Count


class Record(_Line):
    """One line: an input, or a delivery.

    Attributes:
        input: what the core was given, as a row of a trace.
        gradient: of a push.
        delivered: what went out.
    """

    input: InputOfTrace | None = None
    gradient: StoredGradient | None = None
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


def sealed(record: Record) -> bytes:
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
