"""The lines of the journal."""

import re
import zlib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ormo_server.core.inputs import Input
from ormo_server.trace.rows import InputRow, row_of

LOG_NAME = re.compile(r"inputs-(\d{8,})\.log")
GRADIENTS_NAME = re.compile(r"gradients-(\d{8,})\.bin")
# No line is as long: ids of workers are limited.
LONGEST_LINE_BYTES = 1 << 16
_CHECKSUM_DIGITS = 8

Count = Annotated[int, Field(ge=0)]


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
        input: what the core was given.
        gradient: of a push.
        delivered: what went out.
    """

    input: InputRow | None = None
    gradient: StoredGradient | None = None
    delivered: Delivered | None = None


def line_of(taken: Input | Delivered, gradient: StoredGradient | None) -> bytes:
    """The line of an input or a delivery."""
    record = Record(delivered=taken) if isinstance(taken, Delivered) else Record(input=row_of(taken), gradient=gradient)
    text = record.model_dump_json(exclude_none=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def record_of(line: bytes) -> Record | None:
    """The record of a line; None if it is not whole."""
    checksum, space, text = line[:_CHECKSUM_DIGITS], line[_CHECKSUM_DIGITS : _CHECKSUM_DIGITS + 1], line[9:-1]
    if not line.endswith(b"\n") or space != b" " or checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        return Record.model_validate_json(text)
    except ValidationError:
        return None


def is_journal(directory: Path, before: int | None = None) -> bool:
    """Whether logs in this directory, or those of them before this number, say anything."""
    logs = numbered(directory, LOG_NAME)
    return any(path.stat().st_size for number, path in logs.items() if before is None or number < before)


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
