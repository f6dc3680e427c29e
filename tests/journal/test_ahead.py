"""Zeros are written ahead of the lines, so that an fsync has only lines to see to; and what a crash leaves of them."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from core.driving import fingerprint, run_of
from journal.disk import ROOM, Disk
from journal.recording import checkpoint, journal_in, recorded, replayed
from ormo_server.journal import files
from ormo_server.journal.files import LogFile
from ormo_server.journal.records import log_path

AHEAD = 600
SECTOR = 64
RUN = run_of()


@pytest.fixture(autouse=True)
def little_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short story comes to the end of the zeros again and again."""
    monkeypatch.setattr(files, "_AHEAD_BYTES", AHEAD)


def test_a_file_grows_only_when_its_zeros_are_used_up(tmp_path: Path) -> None:
    file, sizes = LogFile(tmp_path / "a", b"opening\n", ahead=True), []
    assert (tmp_path / "a").read_bytes() == b"opening\n"
    for _ in range(13):
        file.append(b"x" * 99 + b"\n")
        sizes.append((tmp_path / "a").stat().st_size)
    assert sizes == [108 + AHEAD] * 7 + [808 + AHEAD] * 6
    assert file.size_bytes == 1308
    assert (tmp_path / "a").read_bytes() == b"opening\n" + (b"x" * 99 + b"\n") * 13 + bytes(sizes[-1] - 1308)
    file.close()
    assert (tmp_path / "a").read_bytes() == b"opening\n" + (b"x" * 99 + b"\n") * 13


def test_what_is_not_waited_for_has_no_zeros(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "a", b"opening\n", ahead=False)
    file.append(b"line\n")
    assert (tmp_path / "a").read_bytes() == b"opening\nline\n"


def test_no_room_for_zeros_is_no_reason_to_refuse_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, room = os.pwrite, 400

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        written = min(len(data), room - offset)
        if written <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:written], offset)

    file = LogFile(tmp_path / "a", b"opening\n", ahead=True)
    monkeypatch.setattr(os, "pwrite", pwrite)
    lines = b""
    for number in range(3):
        line = b"%099d\n" % number
        file.append(line)
        lines += line
        assert (tmp_path / "a").read_bytes() == b"opening\n" + lines
    with pytest.raises(OSError, match="No space left"):
        file.append(b"x" * 100)
    assert (tmp_path / "a").read_bytes() == b"opening\n" + lines
    room = 1 << 30
    file.append(b"more\n")
    assert (tmp_path / "a").read_bytes() == b"opening\n" + lines + b"more\n" + bytes(AHEAD)


def test_lines_that_find_no_room_leave_neither_themselves_nor_zeros(tmp_path: Path, disk: Disk) -> None:
    file = LogFile(tmp_path / "a.log", b"opening\n", ahead=True)
    file.append(b"line\n")
    disk.fail("pwrite", "log", ROOM)
    with pytest.raises(OSError, match="No space left"):
        file.append(b"another line\n")
    assert (tmp_path / "a.log").read_bytes() == b"opening\nline\n"


def test_a_log_that_another_follows_and_one_that_is_closed_have_none(tmp_path: Path) -> None:
    journal = journal_in(tmp_path, "always")
    driver = recorded(RUN, journal)
    driver.join("a")
    journal.wait_durable(journal.position)
    first = log_path(tmp_path, 1)
    assert first.read_bytes().endswith(bytes(AHEAD))
    checkpoint(driver)
    driver.leave("a")
    journal.wait_durable(journal.position)
    assert first.read_bytes().endswith(b"}}\n")
    assert log_path(tmp_path, 2).read_bytes().endswith(bytes(AHEAD))
    before = journal.size_bytes
    journal.close()
    assert log_path(tmp_path, 2).read_bytes().endswith(b"}}\n")
    assert before == sum(path.stat().st_size for path in tmp_path.glob("inputs-*"))


# Crashes


class Watched:
    """A story whose every input is waited for, and what a crash before each call to the system would leave."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory, self._disk = directory, disk
        self._synced: dict[str, bytes] = {}
        self.crashes: list[Crash] = []
        journal = journal_in(directory, "always")
        driver = recorded(RUN, journal)
        self.taken, self.log = checkpoint(driver)
        journal.wait_durable(journal.position)
        # What the machine was after each of its inputs.
        self.states = [fingerprint(driver.machine)]
        append = journal.append

        def append_and_note(*entry: Any) -> int:
            self.states.append(fingerprint(driver.machine))
            return append(*entry)

        journal.append = append_and_note  # type: ignore[method-assign]
        self._told = 0
        disk.before = self._note
        driver.join("a")
        driver.request("a")
        for number in range(8):
            driver.exchange("a", 1.0 + number)
            journal.wait_durable(journal.position)
            self._told = len(self.states) - 1
            if number == 3:
                checkpoint(driver)  # which was never written
        disk.before = lambda *_: None
        journal.close()

    def _note(self, call: str, kind: str) -> None:
        there = {path.name: path.read_bytes() for path in self._directory.iterdir()}
        if self._disk.calls and self._disk.calls[-1][0] == "fdatasync":
            suffix = {"log": ".log", "gradients": ".bin"}[self._disk.calls[-1][1]]
            self._synced |= {name: data for name, data in there.items() if name.endswith(suffix)}
        self.crashes.append(Crash(self._told, there, dict(self._synced)))

    def comes_back(self, told: int, directory: Path) -> None:
        """From these files, with all that had been told."""
        machine, reading = replayed(RUN, self.taken, directory, self.log)
        assert reading.lost == ""
        assert reading.records >= told
        assert fingerprint(machine) == self.states[reading.records]


@dataclass
class Crash:
    """What there is: entries that were told, files, and what of them was on the disk for sure."""

    told: int
    files: dict[str, bytes]
    synced: dict[str, bytes]

    def write(self, directory: Path, dice: Random | None = None) -> Path:
        """The files as a kill leaves them; with dice, as a power cut does: some sectors are new, and others are not."""
        directory.mkdir()
        for name, new in self.files.items():
            old = self.synced.get(name, b"")
            data = new if dice is None or name.startswith("acknowledged") else _mixed(old, new, dice)
            (directory / name).write_bytes(data)
        return directory


def _mixed(old: bytes, new: bytes, dice: Random) -> bytes:
    size = dice.choice([len(old), len(new)])
    sectors = [
        (new if dice.random() < 0.5 else old)[at : at + SECTOR].ljust(SECTOR, b"\0") for at in range(0, size, SECTOR)
    ]
    return b"".join(sectors)[:size]


@pytest.fixture(params=["in lines", "in files"])
def where(request: pytest.FixtureRequest) -> None:
    if request.param == "in files":
        request.getfixturevalue("in_files")


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("at_once", [1 << 30, 50])
def test_a_kill_before_any_call_to_the_system_loses_nothing_that_was_told(
    tmp_path: Path, disk: Disk, at_once: int
) -> None:
    disk.written_at_once = at_once
    watched = Watched(tmp_path / "journal", disk)
    assert len(watched.crashes) > 30
    for number, crash in enumerate(watched.crashes):
        watched.comes_back(crash.told, crash.write(tmp_path / f"killed-{number}"))


@pytest.mark.usefixtures("where")
def test_a_power_cut_before_any_call_to_the_system_loses_nothing_that_was_told(tmp_path: Path, disk: Disk) -> None:
    watched, dice = Watched(tmp_path / "journal", disk), Random(0)
    for number, crash in enumerate(watched.crashes):
        for turn in range(5):
            watched.comes_back(crash.told, crash.write(tmp_path / f"cut-{number}-{turn}", dice))
