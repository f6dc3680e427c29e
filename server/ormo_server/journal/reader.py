"""Reads a journal, up to where it is whole."""

import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import chain
from pathlib import Path

from ormo_protos.manifest import Manifest
from ormo_protos.tensors import Payload, PayloadError, PayloadLayout
from ormo_server.journal.behind import Behind
from ormo_server.journal.chain import End, Line, Place, parsed
from ormo_server.journal.mark import marks
from ormo_server.journal.records import (
    LOG_NAME,
    LONGEST_LINE_BYTES,
    Record,
    StoredGradient,
    gradients_path,
    log_path,
    numbered,
)
from ormo_server.store.files import reading


@dataclass(slots=True)
class Reading:
    """A journal, as it is iterated over: its records since a checkpoint, in order.

    Attributes:
        directory: of the journal.
        first: number of the log that began with the checkpoint.
        manifest: of the model.
        records: how many were read so far.
        torn: after them there was something, and nobody had been told of it: what a crash leaves.
        doubled: lines come again behind them.
        lost: one sentence if something is missing that was acknowledged, by what the files show: see `chain`.
    """

    directory: Path
    first: int
    manifest: Manifest
    records: int = 0
    torn: bool = False
    doubled: bool = False
    lost: str = ""
    _link: int | None = field(default=None, init=False, repr=False)
    # Used again for the next line: most gradients have the same layout, and lie in the same file.
    _payloads: dict[PayloadLayout, Payload] = field(default_factory=dict, init=False, repr=False)
    _open: tuple[int, BufferedReader] | None = field(default=None, init=False, repr=False)

    def __iter__(self) -> Iterator[tuple[Record, Payload | None]]:
        """The records in order, each push with its payload, which is written over by the next.

        Raises:
            StoreError: a file can't be read.
        """
        try:
            yield from self._records()
        finally:
            self._close()

    def _records(self) -> Iterator[tuple[Record, Payload | None]]:
        used, self._link = Place(self.first, 0), None
        lines = raw_lines(self.directory, self.first)
        for log, number, raw in lines:
            line = parsed(raw, number)
            payload = None
            if isinstance(line, Line) and line.record.gradient is not None:
                payload = self._payload(line.record.gradient)
            why = self._misfit(used, Place(log, number), line, payload)
            if why:
                where = f"line {number} of {log_path(self.directory, log)} {why}"
                return self._judge(used, where, chain([(log, number, raw)], lines))
            if isinstance(line, Line):
                used, self._link = Place(log, line.number), None if line.before is None else line.link
                self.records += 1
                yield line.record, payload
            elif line is not None:
                used, self._link = Place(log, 0), line.link
        return self._judge(used, f"{log_path(self.directory, used.log)} ends after {used.line} lines", ())

    def _misfit(self, used: Place, place: Place, line: Line | End | None, payload: Payload | None) -> str:
        if line is None or (isinstance(line, Line) and line.record.gradient is not None and payload is None):
            return "is damaged, or the gradient that it names"
        if isinstance(line, End):
            is_first = self._link is None and place.log == self.first
            fits = line.log == place.log - 1 and (is_first or self._link == line.link)
        elif line.before is None:
            fits = self._link is None and self._has_logs(used.log, place.log)
        else:
            fits = (line.before, line.number) == (self._link, place.line)
        return "" if fits else "does not follow the one before: some are missing, or in another place"

    def _has_logs(self, *between: int) -> bool:
        return all(log_path(self.directory, log).exists() for log in range(*between))

    def _judge(self, used: Place, where: str, rest: Iterable[tuple[int, int, bytes]]) -> None:
        behind = Behind(used, marks(self.directory))
        for log, number, raw in rest:
            behind.add(log, number, raw)
        if not log_path(self.directory, self.first).exists():
            where = f"inputs-{self.first:08d}.log of {self.directory} is missing"
            self.lost = f"{where}, with {behind.lost or 'all that it said'}"
        elif behind.lost:
            self.lost = f"{where}; lost: {behind.lost}"
        else:
            self.torn, self.doubled = behind.anything and not behind.doubled, behind.doubled

    def _payload(self, stored: StoredGradient) -> Payload | None:
        try:
            layout = PayloadLayout.of(self.manifest, stored.dtype, with_buffers=stored.with_buffers)  # type: ignore[arg-type]
        except PayloadError:
            return None
        if stored.size != layout.total_bytes:
            return None
        with reading(gradients_path(self.directory, stored.file)):
            file = self._opened(stored.file)
            if file is None or os.fstat(file.fileno()).st_size < stored.offset + stored.size:
                return None
            payload = self._payloads.get(layout) or self._payloads.setdefault(layout, Payload(layout))
            file.seek(stored.offset)
            if file.readinto(payload.memory) != stored.size or zlib.crc32(payload.memory) != stored.checksum:
                return None
        return payload

    def _opened(self, number: int) -> BufferedReader | None:
        """The file of gradients with this number; None if it is not there."""
        if self._open is None or self._open[0] != number:
            self._close()
            path = gradients_path(self.directory, number)
            if not path.exists():
                return None
            self._open = number, path.open("rb")
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


def told_since(directory: Path, log: int = 0) -> str:
    """What the journal says from this log on that somebody was told of, in words; empty if there is nothing.

    Raises:
        StoreError: a file can't be read.
    """
    behind = Behind(Place(log, 0), marks(directory))
    for each, number, raw in raw_lines(directory, log):
        behind.add(each, number, raw)
    return behind.lost


def is_journal(directory: Path) -> bool:
    """Whether logs in this directory say anything.

    Raises:
        StoreError: a file can't be read.
    """
    return any(number for _, number, _ in raw_lines(directory))


def is_chained(directory: Path, log: int) -> bool:
    """Whether the lines of this log tell what is missing: older servers wrote others.

    Raises:
        StoreError: a file can't be read.
    """
    return next((number == 0 for each, number, _ in raw_lines(directory, log) if each == log), True)


def raw_lines(directory: Path, first: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """The log, the number and the bytes of all lines from this log on; an opening has number 0.

    Raises:
        StoreError: a file can't be read.
    """
    with reading(directory):
        logs = numbered(directory, LOG_NAME)
    for log, path in logs.items():
        if log < first:
            continue
        with reading(path), path.open("rb") as file:
            number = 1
            while line := file.readline(LONGEST_LINE_BYTES):
                if number == 1 and isinstance(parsed(line, 1), End):
                    number = 0
                yield log, number, line
                number += 1
