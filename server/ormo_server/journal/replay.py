"""Reads a journal, does again what it says, and ends with the very same bits; or says what is missing.

What a crash leaves at the end nobody was told of. Whatever else is missing shows in the files: `Behind` tells it.
"""

import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import chain
from pathlib import Path

import torch

from ormo_protos.manifest import Manifest
from ormo_protos.tensors import Payload, PayloadError, PayloadLayout, torch_dtype
from ormo_server.core.effects import Granted
from ormo_server.core.errors import NonFinite, NormTooLarge, SettingsError
from ormo_server.core.ids import SlotKey
from ormo_server.core.inputs import Gradient, Push
from ormo_server.core.machine import StateMachine
from ormo_server.journal.files import marks
from ormo_server.journal.records import (
    LOG_NAME,
    LONGEST_LINE_BYTES,
    Delivered,
    End,
    GradientInLine,
    KeptGradient,
    Line,
    Place,
    Record,
    gradients_path,
    log_path,
    numbered,
    parse,
)
from ormo_server.store import StoreError
from ormo_server.store.files import reading


class Behind:
    """Takes what is there, line by line, and tells what of it was lost.

    Args:
        used: place of the last line that could be used.
        marks: how far servers had acknowledged; see `Mark`.

    Attributes:
        anything: there is more than openings of logs.
        doubled: there are lines that were used already.
    """

    def __init__(self, used: Place, marks: Iterable[Place]) -> None:
        self._used = used
        self._acknowledged = max((used, *marks))
        self._ends = {used.log: used.line}
        self._pushes: list[tuple[Place, str]] = []
        self.anything = self.doubled = False

    def add(self, log: int, number: int, raw: bytes) -> None:
        """Take what stands in a log as line `number`."""
        line = parse(raw, number)
        if isinstance(line, End):
            self._ends[line.log] = max(self._ends.get(line.log, 0), line.lines)
            return
        self.anything = True
        if line is None:
            return
        place = Place(log, line.number)
        self.doubled |= place <= self._used
        self._ends[log] = max(self._ends.get(log, 0), line.number)
        self._acknowledged = max(self._acknowledged, self._told_by(log, line))
        if line.record.input is not None and isinstance(push := line.record.input.input, Push):
            self._pushes.append((place, push.worker))

    def _told_by(self, log: int, line: Line) -> Place:
        if line.acknowledged > 0:
            return Place(log, line.acknowledged)
        in_log_before = self._ends.get(log - 1, 0) + line.acknowledged
        return Place(log - 1, in_log_before) if in_log_before > 0 else self._used

    @property
    def lost(self) -> str:
        """What was acknowledged and can't be used, in words; empty if nothing shows that there is any."""
        used, last = self._used, self._acknowledged
        if last <= used:
            return ""
        before = sum(lines for log, lines in self._ends.items() if used.log <= log < last.log)
        count = before + last.line - used.line
        pushes = Counter(worker for place, worker in self._pushes if used < place <= last)
        among = ", ".join(f"{number:,} of {worker!r}" for worker, number in sorted(pushes.items()))
        known = f", pushes among them that can still be read: {among}" if among else ""
        return f"at least {max(count, 1):,} acknowledged entries{known}"


@dataclass(slots=True)
class Reading:
    """A journal, as it is iterated over: its records since a checkpoint, in order.

    Attributes:
        directory: the journal's directory.
        first: number of the log that began with the checkpoint.
        manifest: the model's manifest, which gives the layout of its gradients.
        records: how many were read so far.
        torn: behind the last one there was something of which no worker had heard: what a crash leaves.
        doubled: lines that were used already stand behind the last one once more.
        lost: one sentence if something that was acknowledged is missing, as far as the files show; see `records`.
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
            line = parse(raw, number)
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

    def _payload(self, stored: KeptGradient) -> Payload | None:
        try:
            layout = PayloadLayout.of_gradient(self.manifest, stored.dtype, with_buffers=stored.with_buffers)  # type: ignore[arg-type]
        except PayloadError:
            return None
        payload = self._payloads.get(layout) or self._payloads.setdefault(layout, Payload(layout))
        if isinstance(stored, GradientInLine):
            return self._from_line(stored, payload)
        if stored.size != layout.total_bytes:
            return None
        with reading(gradients_path(self.directory, stored.file)):
            file = self._opened(stored.file)
            if file is None or os.fstat(file.fileno()).st_size < stored.offset + stored.size:
                return None
            file.seek(stored.offset)
            if file.readinto(payload.memory) != stored.size or zlib.crc32(payload.memory) != stored.checksum:
                return None
        return payload

    @staticmethod
    def _from_line(stored: GradientInLine, payload: Payload) -> Payload | None:
        if len(stored.payload) != len(payload.memory):
            return None
        payload.memory[:] = stored.payload
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
                if not line.strip(b"\0"):
                    continue  # written ahead, for lines that never came
                if number == 1 and isinstance(parse(line, 1), End):
                    number = 0
                yield log, number, line
                number += 1


class UnsoundRecord(StoreError):
    """What an older server took, a gradient or a learning rate, is refused as unsound when it comes again."""


def replay(machine: StateMachine, records: Iterable[tuple[Record, Payload | None]], clock_seconds: float) -> float:
    """Give a machine the recorded inputs.

    Args:
        machine: as it was when the first of them came.
        records: see `Reading`.
        clock_seconds: the run's clock at that moment, in seconds.

    Returns:
        The run's clock at the last input.

    Raises:
        StoreError: an input has another outcome than it had.
        UnsoundRecord: of an older server, which took what must not be taken.
    """
    granted: dict[SlotKey, Granted] = {}
    for number, (record, payload) in enumerate(records, start=1):
        try:
            if record.input is not None:
                given, redeemed = record.input
                effects = machine.step(given, None if payload is None else gradient_in(payload))
                same = effects.changed and effects.redeemed == redeemed
                clock_seconds = max(clock_seconds, getattr(given, "seconds", clock_seconds))
                granted |= {each.slot: each for each in effects.granted}
            else:
                same = _deliver(machine, granted, record.delivered)
        except Exception as error:
            if isinstance(error, NonFinite | NormTooLarge) or isinstance(error.__cause__ or error, SettingsError):
                raise UnsoundRecord(f"record {number} of the journal ({record}): {error}") from error
            raise _differs(number, record, f"it fails ({type(error).__name__}: {error})") from error
        if not same:
            raise _differs(number, record, "its outcome is another one")
    return clock_seconds


def gradient_in(payload: Payload, norm: float | None = None) -> Gradient:
    """What a push carried, as the core takes it."""
    with_buffers = payload.layout.with_buffers
    return Gradient(
        payload.gradient,
        payload.float_buffers if with_buffers else None,
        payload.int_buffers if with_buffers else None,
        norm,
    )


def _deliver(machine: StateMachine, granted: dict[SlotKey, Granted], delivered: Delivered | None) -> bool:
    if delivered is None:
        return False
    out = torch.empty(machine.state.params.shape, dtype=torch_dtype(delivered.dtype), device="cpu")
    machine.write_delivery(granted.pop((delivered.worker, delivered.slot)), out)
    return True


def _differs(number: int, record: Record, how: str) -> StoreError:
    return StoreError(
        f"record {number} of the journal ({record}) can't be repeated as it was: {how}. Was it written by another "
        "version of this program, of PyTorch, or on another processor? Start with those: nothing was changed. To "
        "continue from the last checkpoint alone, without what the journal says, move the folder `journal` away"
    )
