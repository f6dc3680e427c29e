"""A checkpoint and what the journal says came after it give the very same bits, wherever the journal ends."""

import math
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.driving import Driver, fingerprint, run_of, told_by
from core.scripts import SIZE, START, Command, carry_out, runs, stories
from journal.recording import MANIFEST, checkpoint, fresh_copy, journal_in, recorded, replayed
from ormo_protos.manifest import (
    AVERAGE,
    BUFFER,
    FLOAT32,
    FLOAT64,
    INT64,
    LAST,
    MAXIMUM,
    PARAMETER,
    UNSPECIFIED,
    Manifest,
    TensorSpec,
)
from ormo_server.core import snapshot
from ormo_server.core.machine import StateMachine
from ormo_server.core.method import Run
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.core.state import PushResult
from ormo_server.journal import Reading, replay, writer
from ormo_server.journal.files import Mark
from ormo_server.journal.records import LONGEST_LINE_BYTES, Place, gradients_path, log_path
from ormo_server.store import StoreError, unsound


@pytest.fixture(scope="module", params=["in lines", "in files"], autouse=True)
def where_gradients_go(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in lines":
            patch.setitem(writer.IN_LINE_BYTES, "off", writer.IN_LINE_BYTES["always"])
        yield


@settings(max_examples=150, deadline=None)
@given(
    run=runs(UPDATE_RULES),
    before=stories("tune"),
    after=stories("tune"),
    wire=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_story_since_any_checkpoint_comes_back_bit_for_bit(
    run: Run, before: list[Command], after: list[Command], wire: torch.dtype
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = journal_in(Path(folder))
        driver = recorded(run, journal)
        driver.wire = wire
        for command in before:
            carry_out(driver, command)
        taken, log = checkpoint(driver)
        for command in after[4:]:  # without its joins
            carry_out(driver, command)
        journal.wait_durable(journal.position)
        journal.close()
        again, reading = replayed(run, taken, Path(folder), log)
        assert fingerprint(again) == fingerprint(driver.machine)
        assert (reading.torn, reading.lost) == (False, "")
        assert again.state.epoch == 7


# Of each kind, so that their order and their neighbours vary.
KINDS = [(FLOAT32, UNSPECIFIED), (FLOAT32, AVERAGE), (FLOAT32, LAST), (FLOAT64, AVERAGE), (FLOAT64, LAST),
         (INT64, UNSPECIFIED), (INT64, MAXIMUM), (INT64, LAST)]  # fmt: skip
NUMBERS = [0.0, -0.0, 1.5, -1e30, 3e38, -3e38, math.inf, -math.inf, math.nan]


@st.composite
def models(draw: st.DrawFn) -> Manifest:
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6))
    buffers = [
        TensorSpec(f"b{number}", (draw(st.integers(0, 3)),), dtype, BUFFER, merge=merge)
        for number, (dtype, merge) in enumerate(kinds)
    ]
    return Manifest.laid_out([TensorSpec("weight", (SIZE,), FLOAT32, PARAMETER), *buffers])


class WithBuffers(Driver):
    """Whose workers push buffers, sound and not."""

    numbers: Random
    kept = 0

    def push(self, worker: str, value: float | torch.Tensor, slot: int = 0, **details: Any) -> PushResult:
        state = self.machine.state
        floats = torch.tensor(self.numbers.choices(NUMBERS, k=state.float_buffers.numel()), dtype=torch.float32)
        ints = torch.tensor(self.numbers.choices(NUMBERS, k=state.int_buffers.numel()), dtype=torch.float64)
        buffers = {"float_buffers": floats, "int_buffers": ints.view(torch.int64)}
        result = super().push(worker, value, slot, **buffers, **details)
        self.kept += result.buffers_kept
        return result


@settings(max_examples=60, deadline=None)
@given(manifest=models(), run=runs(), story=stories(), seed=st.integers(0, 99))
def test_buffers_of_every_policy_come_back_bit_for_bit_also_those_that_were_kept(
    manifest: Manifest, run: Run, story: list[Command], seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = journal_in(Path(folder))
        driver = WithBuffers(recorded(run, journal, manifest).machine)
        driver.numbers = Random(seed)
        taken, log = checkpoint(driver)
        for command in story:
            carry_out(driver, command)
        journal.wait_durable(journal.position)
        journal.close()
        again, reading = replayed(run, taken, Path(folder), log, manifest)
        assert (reading.torn, reading.lost) == (False, "")
        one, other = (snapshot.take(machine) for machine in (again, driver.machine))
        assert one.fields == other.fields
        assert {name: tensor.numpy().tobytes() for name, tensor in one.tensors.items()} == {
            name: tensor.numpy().tobytes() for name, tensor in other.tensors.items()
        }
        assert not unsound(other, manifest)


def test_a_push_whose_buffers_were_kept_says_so_in_the_journal_and_others_do_not(tmp_path: Path) -> None:
    manifest = Manifest.laid_out(
        [TensorSpec("weight", (SIZE,), FLOAT32, PARAMETER), TensorSpec("mean", (1,), FLOAT32, BUFFER, merge=AVERAGE)]
    )
    journal = journal_in(tmp_path)
    driver = recorded(run_of(), journal, manifest)
    _, log = checkpoint(driver)
    driver.join("a")
    for mean in (1.0, math.nan):
        driver.request("a")
        driver.push("a", 1.0, float_buffers=torch.tensor([mean]), int_buffers=torch.zeros(0, dtype=torch.int64))
    journal.wait_durable(journal.position)
    journal.close()
    pushes = [line for line in log_path(tmp_path, log).read_bytes().splitlines() if b'"pushed"' in line]
    assert [b"buffers_kept" in line for line in pushes] == [False, True]  # so that older servers read the first


def a_story(driver: Driver) -> None:
    driver.join("a")
    driver.join("b", slots=2)
    for worker, slot in (("a", 0), ("b", 0), ("b", 1)):
        driver.request(worker, slot)
    for value in range(1, 6):
        mean, count = torch.tensor([0.5, value]), torch.tensor([value])
        driver.push("b", START * value, value % 2, samples=value, float_buffers=mean, int_buffers=count)
        driver.request("b", value % 2)
        driver.exchange("a", 0.1 * value)
    driver.hand_back("b", 1)
    driver.leave("b")


class Recording:
    """A story in a journal; all of it was acknowledged."""

    def __init__(self, directory: Path, run: Run) -> None:
        self.directory, self.run = directory, run
        journal = journal_in(directory)
        driver = recorded(run, journal)
        self.taken, self.log = checkpoint(driver)
        self.states = [fingerprint(driver.machine)]
        inputs = told_by(driver.machine)
        a_story(driver)
        self.inputs = len(inputs)
        self.end, self.clock_seconds = fingerprint(driver.machine), driver.now
        journal.wait_durable(journal.position)
        journal.close()
        self.path = log_path(directory, self.log)
        self.mark = directory / "acknowledged-00000001"
        self.gradients = gradients_path(directory, 1)
        self.opening, *self.lines = self.path.read_bytes().splitlines(keepends=True)

    def told(self, lines: int) -> None:
        """So many lines had been acknowledged."""
        self.mark.unlink(missing_ok=True)
        if lines:
            Mark(self.directory, 1).move(Place(self.log, lines))

    def state_after(self, count: int) -> object:
        """What the first lines lead to."""
        machine = snapshot.resume(self.run, fresh_copy(self.taken))
        reading = Reading(self.directory, self.log, MANIFEST)
        replay(machine, islice(reading, count), 0.0)
        assert reading.records == count
        return fingerprint(machine)

    def write(self, *lines: bytes) -> None:
        """In the place of what the log has behind its opening."""
        self.path.write_bytes(self.opening + b"".join(lines))

    def read(self) -> tuple[StateMachine, Reading]:
        return replayed(self.run, self.taken, self.directory, self.log)


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return Recording(tmp_path, run_of())


def test_the_story_has_a_line_for_each_input(recording: Recording) -> None:
    assert len(recording.lines) == recording.inputs > 25
    machine, reading = recording.read()
    assert (fingerprint(machine), reading.records) == (recording.end, recording.inputs)


def test_a_line_cut_short_at_any_byte_ends_the_journal_before_it(recording: Recording) -> None:
    whole = b"".join(recording.lines)
    for cut in [*range(0, len(whole), 97), len(whole) - 1]:
        recording.write(whole)
        count = whole[:cut].count(b"\n")
        recording.told(count)
        expected = recording.state_after(count)
        recording.write(whole[:cut])
        machine, reading = recording.read()
        at_a_line = whole[:cut] == b"".join(recording.lines[:count])
        assert (reading.records, reading.torn, reading.lost) == (count, not at_a_line, "")
        assert fingerprint(machine) == expected


@pytest.mark.parametrize("tail", [b"\0" * 4096 + b"f", b"\0" * 70_000 + b"{}\n", b"\xff" * 70_000, b"00000000 {}\n"])
def test_rubbish_behind_the_last_line_is_what_a_crash_leaves(recording: Recording, tail: bytes) -> None:
    recording.write(*recording.lines, tail)
    machine, reading = recording.read()
    assert (fingerprint(machine), reading.torn, reading.lost) == (recording.end, True, "")


@pytest.mark.parametrize("zeros", [1, 4096, LONGEST_LINE_BYTES, 200_000])
def test_zeros_behind_the_last_line_were_written_ahead(recording: Recording, zeros: int) -> None:
    recording.write(*recording.lines, bytes(zeros))
    machine, reading = recording.read()
    assert (fingerprint(machine), reading.torn, reading.lost) == (recording.end, False, "")


@pytest.mark.parametrize("zeros", [7, 200_000])
def test_zeros_in_the_place_of_lines_that_were_acknowledged_are_told(recording: Recording, zeros: int) -> None:
    recording.write(*recording.lines[:10], bytes(zeros))
    reading = recording.read()[1]
    assert (reading.records, reading.torn) == (10, False)
    assert f"at least {recording.inputs - 10} acknowledged entries" in reading.lost


def test_a_damaged_line_is_told_and_nothing_after_it_is_used(recording: Recording) -> None:
    expected = recording.state_after(10)
    lines = list(recording.lines)
    lines[10] = lines[10].replace(b"e", b"f", 1)
    recording.write(*lines)
    machine, reading = recording.read()
    assert (fingerprint(machine), reading.records, reading.torn) == (expected, 10, False)
    assert f"line 11 of {recording.path} is damaged" in reading.lost
    assert f"at least {recording.inputs - 10} acknowledged entries" in reading.lost


@pytest.mark.parametrize("where_gradients_go", ["in files"], indirect=True)
@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
def test_a_damaged_gradient_ends_the_journal_before_its_push(recording: Recording, damage: str) -> None:
    pushes = [at for at, line in enumerate(recording.lines) if b'"pushed"' in line]
    expected = recording.state_after(pushes[0])
    data = bytearray(recording.gradients.read_bytes())
    if damage == "flipped":
        data[3] ^= 1
        recording.gradients.write_bytes(data)
    elif damage == "short":
        recording.gradients.write_bytes(data[:8])
    else:
        recording.gradients.unlink()
    machine, reading = recording.read()
    assert fingerprint(machine) == expected
    assert f"line {pushes[0] + 1} of" in reading.lost
    assert ", pushes among them that can still be read: 5 of 'a', 5 of 'b'" in reading.lost


def test_a_missing_log_is_told(recording: Recording) -> None:
    recording.path.unlink()
    machine, reading = recording.read()
    assert fingerprint(machine) == recording.states[0]
    missing = f"inputs-00000002.log of {recording.directory} is missing"
    assert reading.lost == f"{missing}, with at least {recording.inputs} acknowledged entries"
    recording.mark.unlink()
    assert recording.read()[1].lost == f"{missing}, with all that it said"


def test_logs_follow_each_other_where_a_checkpoint_failed(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    driver = recorded(run_of(), journal)
    taken, log = checkpoint(driver)
    a_story(driver)
    checkpoint(driver)  # which was never written
    driver.exchange("a", 3.0)
    journal.wait_durable(journal.position)
    journal.close()
    machine, reading = replayed(run_of(), taken, tmp_path, log)
    assert fingerprint(machine) == fingerprint(driver.machine)
    assert reading.records > 25


def test_another_outcome_than_the_recorded_one_is_an_error(recording: Recording) -> None:
    changed = run_of(discard_delay=1)
    machine = snapshot.resume(changed, fresh_copy(recording.taken))
    with pytest.raises(StoreError, match=r"of the journal .* can't be repeated as it was: its outcome is another one"):
        replay(machine, Reading(recording.directory, recording.log, MANIFEST), 0.0)


def test_the_clock_goes_on_where_it_was(recording: Recording) -> None:
    machine = snapshot.resume(recording.run, fresh_copy(recording.taken))
    seconds = replay(machine, Reading(recording.directory, recording.log, MANIFEST), 2.5)
    assert seconds == recording.clock_seconds > 2.5
    empty = snapshot.resume(recording.run, fresh_copy(recording.taken))
    assert replay(empty, [], 2.5) == 2.5


def test_waiting_slots_are_part_of_what_comes_back(tmp_path: Path) -> None:
    run = run_of(scheduler="synchronous", min_workers=2)
    journal = journal_in(tmp_path)
    driver = recorded(run, journal)
    driver.join("a")
    driver.request("a")
    taken, log = checkpoint(driver)
    assert taken.fields["waiting"] == [["a", 0]]
    driver.join("b")
    driver.request("b")
    assert driver.places["a", 0].granted is not None
    journal.wait_durable(journal.position)
    journal.close()
    machine, _ = replayed(run, taken, tmp_path, log)
    assert fingerprint(machine) == fingerprint(driver.machine)
