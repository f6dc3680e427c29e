"""What is missing in a journal is told if somebody had been told of it, and nothing is told after an ordinary end.

The lines of one server: a log of six, which a checkpoint that failed turned over, and one of five. Each case damages
the files and says how many lines had been acknowledged.
"""

import errno
import re
import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from core.driving import fingerprint, run_of
from journal.recording import MANIFEST, checkpoint, journal_in, recorded, replayed
from ormo_server.core import snapshot
from ormo_server.core.snapshot import Snapshot
from ormo_server.journal import Journal, Reading, is_chained, is_journal, replay, told_since
from ormo_server.journal.records import End, Line, gradients_path, log_path, opening, parse, record_of, seal
from ormo_server.store import StoreError

pytestmark = pytest.mark.usefixtures("in_files")

RUN = run_of()
LINES = 11
FIRST, SECOND = 2, 3


class Story:
    """The files of a server that was killed when so many of its lines had been acknowledged, `told`, one by one."""

    def __init__(self, directory: Path, told: int = LINES) -> None:
        self.directory = directory
        journal = journal_in(directory)
        driver = recorded(RUN, journal)
        self.taken, log = checkpoint(driver)
        assert log == FIRST
        append = journal.append
        count = 0

        def append_and_wait(*entry: Any) -> int:
            nonlocal count
            position = append(*entry)
            count += 1
            if count <= told:
                journal.wait_durable(position)
            return position

        journal.append = append_and_wait  # type: ignore[method-assign]
        driver.join("a")
        driver.request("a")
        for value in (1.0, 2.0):
            driver.exchange("a", value)
        checkpoint(driver)  # which was never written
        for value in (3.0, 4.0):
            driver.exchange("a", value)
        driver.leave("a")
        assert count == LINES
        self.end = fingerprint(driver.machine)
        self._write_rest(journal)
        journal.close()

    @staticmethod
    def _write_rest(journal: Journal) -> None:
        """A kill after the write, and before anybody heard of it."""
        for _ in range(len(journal._taken)):
            journal._unwritten.append(journal._taken.popleft())
        journal._write()

    def lines(self, log: int) -> list[bytes]:
        return log_path(self.directory, log).read_bytes().splitlines(keepends=True)

    def rewrite(self, log: int, *lines: bytes) -> None:
        log_path(self.directory, log).write_bytes(b"".join(lines))

    def read(self) -> Reading:
        """Reads it, and holds what comes back against what so many lines lead to."""
        machine, reading = replayed(RUN, self.taken, self.directory, FIRST)
        assert fingerprint(machine) == fingerprint_after(self.taken, reading.records)
        return reading


def fingerprint_after(taken: Snapshot, records: int) -> object:
    """By a journal that is whole."""
    with tempfile.TemporaryDirectory() as folder:
        Story(Path(folder))
        machine = snapshot.resume(
            RUN, Snapshot({name: each.clone() for name, each in taken.tensors.items()}, taken.fields)
        )
        replay(machine, islice(Reading(Path(folder), FIRST, MANIFEST), records), 0.0)
        return fingerprint(machine)


def flipped(line: bytes) -> bytes:
    return line[:-20] + bytes([line[-20] ^ 1]) + line[-19:]


Damage = Callable[[Story], object]


def change(log: int, new: Callable[[list[bytes]], list[bytes]]) -> Damage:
    return lambda story: story.rewrite(log, *new(story.lines(log)))


# Each with the number of lines that are used then. An opening stands before the lines of a log.
DAMAGES: dict[str, tuple[Damage, int]] = {
    "the last line is flipped": (change(SECOND, lambda lines: [*lines[:-1], flipped(lines[-1])]), 10),
    "the last line is missing": (change(SECOND, lambda lines: lines[:-1]), 10),
    "the last line is cut": (change(SECOND, lambda lines: [*lines[:-1], lines[-1][:-7]]), 10),
    "three lines are missing at the end": (change(SECOND, lambda lines: lines[:-3]), 8),
    "a line in the middle is flipped": (change(SECOND, lambda lines: [*lines[:2], flipped(lines[2]), *lines[3:]]), 7),
    "a line in the middle is missing": (change(SECOND, lambda lines: [*lines[:2], *lines[3:]]), 7),
    "two lines are swapped": (change(SECOND, lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]]), 8),
    "the last two lines are swapped": (change(SECOND, lambda lines: [*lines[:-2], lines[-1], lines[-2]]), 9),
    "the last log is empty": (change(SECOND, lambda _: []), 6),
    "the last log's opening is flipped": (change(SECOND, lambda lines: [flipped(lines[0]), *lines[1:]]), 6),
    "the last log is missing": (lambda story: log_path(story.directory, SECOND).unlink(), 6),
    "the last line of the log before is missing": (change(FIRST, lambda lines: lines[:-1]), 5),
    "the log before is cut": (change(FIRST, lambda lines: [*lines[:3], lines[3][:9]]), 2),
    "the log before is empty": (change(FIRST, lambda _: []), 0),
    "the last gradient is cut": (
        lambda story: gradients_path(story.directory, 2).write_bytes(
            gradients_path(story.directory, 2).read_bytes()[:-1]
        ),
        8,
    ),
    "gradients are missing": (lambda story: gradients_path(story.directory, 2).unlink(), 6),
}


@pytest.mark.parametrize(("damage", "used"), DAMAGES.values(), ids=DAMAGES.keys())
def test_what_was_acknowledged_and_is_missing_is_told(tmp_path: Path, damage: Damage, used: int) -> None:
    story = Story(tmp_path)
    damage(story)
    reading = story.read()
    assert (reading.records, reading.torn, reading.doubled) == (used, False, False)
    assert f"at least {LINES - used} acknowledged entries" in reading.lost


@pytest.mark.parametrize(("damage", "used"), DAMAGES.values(), ids=DAMAGES.keys())
def test_what_nobody_had_been_told_of_may_be_missing(tmp_path: Path, damage: Damage, used: int) -> None:
    story = Story(tmp_path, told=used)
    damage(story)
    reading = story.read()
    assert (reading.records, reading.doubled, reading.lost) == (used, False, "")


def test_logs_that_stand_in_each_others_place_are_told(tmp_path: Path) -> None:
    story = Story(tmp_path)
    first, second = story.lines(FIRST), story.lines(SECOND)
    story.rewrite(FIRST, *second)
    story.rewrite(SECOND, *first)
    reading = story.read()
    assert reading.records == 0
    assert f"line 0 of {log_path(tmp_path, FIRST)} does not follow the one before" in reading.lost


@pytest.mark.parametrize("told", [9, 10])
def test_without_the_mark_each_line_says_it_for_those_before(tmp_path: Path, told: int) -> None:
    """A power cut may take the mark, which nobody waits for; of the last line then nobody knows."""
    story = Story(tmp_path, told=told)
    (tmp_path / "acknowledged-00000001").unlink()
    damage, used = DAMAGES["a line in the middle is flipped"]
    damage(story)
    assert f"at least {told - used} acknowledged entries" in story.read().lost


def test_lines_that_hang_together_need_no_opening(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.rewrite(SECOND, *story.lines(SECOND)[1:])
    reading = story.read()
    assert (reading.records, reading.lost) == (LINES, "")


def test_a_mark_that_is_not_whole_says_nothing(tmp_path: Path) -> None:
    story = Story(tmp_path)
    mark = tmp_path / "acknowledged-00000001"
    mark.write_bytes(mark.read_bytes().replace(b" ", b"0", 1))
    DAMAGES["the last line is missing"][0](story)
    assert story.read().lost == ""


@pytest.mark.parametrize("told", range(LINES + 1))
def test_after_an_ordinary_kill_all_that_was_written_is_used_and_nothing_is_told(tmp_path: Path, told: int) -> None:
    reading = Story(tmp_path, told).read()
    assert (reading.records, reading.torn, reading.doubled, reading.lost) == (LINES, False, False, "")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_lines_that_come_again_at_the_end_are_left_out(tmp_path: Path, count: int) -> None:
    story = Story(tmp_path)
    story.rewrite(SECOND, *story.lines(SECOND), *story.lines(SECOND)[-count:])
    reading = story.read()
    assert (reading.records, reading.torn, reading.doubled, reading.lost) == (LINES, False, True, "")


def test_whole_lines_behind_a_hole_that_nobody_had_been_told_of_are_a_torn_end(tmp_path: Path) -> None:
    """Blocks reach the disk in any order: what a power cut leaves."""
    story = Story(tmp_path, told=8)
    lines = story.lines(SECOND)
    story.rewrite(SECOND, *lines[:3], bytes(len(lines[3])), *lines[4:])
    reading = story.read()
    assert (reading.records, reading.torn, reading.lost) == (8, True, "")


def test_a_server_that_died_before_its_first_checkpoint_leaves_a_log_that_says_nothing(tmp_path: Path) -> None:
    story = Story(tmp_path)
    later = journal_in(tmp_path)
    later.close()
    assert later.log == SECOND + 1
    reading = story.read()
    assert (reading.records, reading.torn, reading.lost) == (LINES, False, "")


def test_what_a_later_server_was_told_of_follows_its_own_checkpoint_only(tmp_path: Path) -> None:
    story = Story(tmp_path)
    later = journal_in(tmp_path)
    driver = recorded(RUN, later)
    driver.join("b")
    driver.request("b")
    later.wait_durable(later.position)
    later.close()
    reading = story.read()
    assert reading.records == LINES
    assert f"line 0 of {log_path(tmp_path, SECOND + 1)} does not follow the one before" in reading.lost
    assert "at least 2 acknowledged entries" in reading.lost


def test_a_journal_says_what_would_be_lost_with_it(tmp_path: Path) -> None:
    Story(tmp_path)
    assert told_since(tmp_path).startswith(f"at least {LINES} acknowledged entries")
    assert told_since(tmp_path).endswith("pushes among them that can still be read: 4 of 'a'")
    assert told_since(tmp_path, SECOND).startswith("at least 5 acknowledged entries")
    assert told_since(tmp_path, SECOND + 1) == ""
    assert told_since(tmp_path / "not there") == ""
    assert is_journal(tmp_path)


@pytest.mark.parametrize("part", ["replay", "files"])
def test_a_directory_that_cant_be_read_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """It is there, so what it says is not taken for missing."""
    Story(tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(sys.modules[f"ormo_server.journal.{part}"], "numbered", refuse)
    with pytest.raises(StoreError, match=re.escape(f"{tmp_path} can't be read (Permission denied)")):
        told_since(tmp_path)


# Lines of older servers


def unchained(directory: Path) -> Story:
    """As commit 8d2ce78 wrote it: no openings, no mark, and lines of a checksum and JSON."""
    story = Story(directory)
    (directory / "acknowledged-00000001").unlink()
    for log in (1, FIRST, SECOND):
        lines = [parse(line, number) for number, line in enumerate(story.lines(log))]
        story.rewrite(log, *(seal(line.record) for line in lines if isinstance(line, Line)))
    return story


def test_a_journal_without_a_chain_is_read_as_before(tmp_path: Path) -> None:
    story = unchained(tmp_path)
    assert b"".join(story.lines(FIRST)).startswith(b'1a77fb52 {"input":{"event":"joined",')
    assert not is_chained(tmp_path, FIRST)
    reading = story.read()
    assert (reading.records, reading.torn, reading.lost) == (LINES, False, "")


@pytest.mark.parametrize(
    ("damage", "used", "lost"),
    [
        (change(SECOND, lambda lines: [*lines[:-1], lines[-1][:-7]]), 10, ""),
        (change(SECOND, lambda lines: [*lines[:-1], flipped(lines[-1])]), 10, ""),
        (
            change(SECOND, lambda lines: [*lines[:2], flipped(lines[2]), *lines[3:]]),
            8,
            "at least 2 acknowledged entries",
        ),
        (
            change(FIRST, lambda lines: [*lines[:2], flipped(lines[2]), *lines[3:]]),
            2,
            "at least 8 acknowledged entries",
        ),
        (
            lambda story: log_path(story.directory, FIRST).unlink(),
            0,
            "inputs-00000002.log of .* is missing, with at least 4 acknowledged",
        ),
    ],
)
def test_what_is_known_of_a_journal_without_a_chain_is_told(
    tmp_path: Path, damage: Damage, used: int, lost: str
) -> None:
    story = unchained(tmp_path)
    damage(story)
    reading = story.read()
    assert reading.records == used
    assert bool(reading.lost) == bool(lost)
    assert re.search(lost, reading.lost)


def test_a_log_missing_between_those_without_a_chain_is_told(tmp_path: Path) -> None:
    story = unchained(tmp_path)
    log_path(tmp_path, SECOND).rename(log_path(tmp_path, SECOND + 1))
    reading = story.read()
    assert reading.records == 6
    assert "inputs-00000004.log does not follow the one before" in reading.lost


def test_an_older_server_takes_an_opening_for_a_line_that_cant_be_done_again() -> None:
    """So it refuses, instead of taking the lines behind it for a torn end: it knows neither their form nor the mark."""
    record = record_of(opening(End(6, 4, 1)))
    assert record is not None
    assert record.delivered is not None
    assert record.input is None
    assert "start that one" in record.delivered.worker
