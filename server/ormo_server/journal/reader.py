"""Reads a journal, up to where it is whole."""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

from ormo_protos.manifest import Manifest
from ormo_protos.tensors import Payload, PayloadError, PayloadLayout
from ormo_server.journal.records import (
    LOG_NAME,
    LONGEST_LINE_BYTES,
    Record,
    StoredGradient,
    gradients_path,
    numbered,
    record_of,
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
        torn: after them there was a last line that a crash had cut short.
        lost: one sentence if there is something behind that can't be used: gradients that were acknowledged, maybe.
    """

    directory: Path
    first: int
    manifest: Manifest
    records: int = 0
    torn: bool = False
    lost: str = ""
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
        lines = self._lines()
        for path, number, line in lines:
            record = record_of(line)
            payload = None
            if record is not None and record.gradient is not None:
                payload = self._payload(record.gradient)
            if record is None or (record.gradient is not None and payload is None):
                self._stop(f"line {number} of {path} is damaged, or the gradient that it names", lines)
                return
            self.records += 1
            yield record, payload

    def _stop(self, where: str, rest: Iterator[tuple[Path, int, bytes]]) -> None:
        # What a crash leaves is one last line, or what a disk had not written yet: nothing whole comes after it.
        if any(record_of(line) is not None for _, _, line in rest):
            self.lost = f"{where}, and there are whole lines behind it"
        else:
            self.torn = True

    def _lines(self) -> Iterator[tuple[Path, int, bytes]]:
        logs = {number: path for number, path in numbered(self.directory, LOG_NAME).items() if number >= self.first}
        for expected, (number, path) in enumerate(logs.items(), start=self.first):
            if number != expected:
                self.lost = f"inputs-{expected:08d}.log of {self.directory} is missing"
                return
            with reading(path), path.open("rb") as file:
                for at, line in enumerate(iter(lambda: file.readline(LONGEST_LINE_BYTES), b""), start=1):
                    yield path, at, line
        if not logs:
            self.lost = f"inputs-{self.first:08d}.log of {self.directory} is missing"

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
