"""Writing a trace beside the training: what the disk does never reaches the one who gives the inputs."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ormo_runtime.settings import UsageError
from ormo_server.core.inputs import Join
from ormo_server.core.machine import StateMachine
from ormo_server.settings import ServerSettings
from ormo_server.store import StoreError
from ormo_server.trace import Recorded, read_trace, writer
from ormo_server.trace.writer import TraceWriter

SETTINGS = ServerSettings(max_workers=1000)


class Traced:
    """A machine that is traced, and how often its trace failed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failures = 0
        self.writer = TraceWriter(path, self._failed)
        self.machine = StateMachine.fresh(SETTINGS.run(), torch.zeros(2), epoch=5)
        self.writer.begin(self.machine, SETTINGS, fresh=True)
        self.joined = 0

    def _failed(self) -> None:
        self.failures += 1

    def join(self, number: int = 1) -> None:
        for _ in range(number):
            self.joined += 1
            given = Join(float(self.joined), f"w{self.joined}", 1, 1)
            assert self.machine.step(given).changed
            self.writer.append(Recorded(given))

    def told(self) -> list[str]:
        entries = read_trace(self.path)[-1].inputs
        joins = [entry.input for entry in entries if isinstance(entry, Recorded)]
        return [join.worker for join in joins if isinstance(join, Join)]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_inputs_are_in_the_file_soon_and_all_of_them_when_it_is_closed(tmp_path: Path) -> None:
    traced = Traced(tmp_path / "deep" / "down" / "t.jsonl")
    traced.join(3)
    eventually(lambda: traced.path.read_bytes().count(b"\n") == 4)
    traced.join(200)
    traced.writer.close()
    traced.join()  # after the end: nobody minds
    assert traced.told() == [f"w{number}" for number in range(1, 204)]
    assert traced.failures == 0


def test_restart_goes_on_with_the_file_and_cuts_off_what_a_crash_left_of_a_line(tmp_path: Path) -> None:
    first = Traced(tmp_path / "t")
    first.join(2)
    first.writer.close()
    whole = first.path.read_bytes()
    first.path.write_bytes(whole + whole.splitlines()[-1][:20])
    second = Traced(tmp_path / "t")
    second.join(1)
    second.writer.close()
    assert [len(segment.inputs) for segment in read_trace(tmp_path / "t")] == [2, 1]
    assert first.path.read_bytes().startswith(whole)


@pytest.mark.parametrize("left", [b"", b'{"event":"st', b'{"event":"start","format":1,"epoch":"0x00'])
def test_crash_in_the_first_line_leaves_a_file_that_can_be_gone_on_with(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "t").write_bytes(left)
    traced = Traced(tmp_path / "t")
    traced.writer.close()
    assert len(read_trace(tmp_path / "t")) == 1


@pytest.mark.parametrize("content", [b"name: precious\n", b"\x00" * 3_000_000, b'{"event":"start","format":2,"x":1}\n'])
def test_file_that_is_no_trace_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(StoreError, match=r"is not a trace of this version: choose another --trace"):
        TraceWriter(tmp_path / "t", lambda: None)
    assert (tmp_path / "t").read_bytes() == content


def test_file_that_cannot_be_had_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"can't write the trace .*: Is a directory; make it writable or choose"):
        TraceWriter(tmp_path, lambda: None)
    first = Traced(tmp_path / "t")
    with pytest.raises(StoreError, match=r"is in use by another server: stop it or choose another --trace"):
        TraceWriter(tmp_path / "t", lambda: None)
    first.writer.close()
    TraceWriter(tmp_path / "t", lambda: None).close()


def test_full_disk_ends_the_trace_loudly_once_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    traced = Traced(Path("/dev/full"))
    eventually(lambda: traced.failures == 1)
    traced.join(10)
    traced.writer.close()
    assert traced.failures == 1
    assert len(traced.machine.state.members) == 10
    assert not traced.writer._waiting
    (said,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert "the trace /dev/full ends here ([Errno 28] No space left on device): training continues" in said.message


def test_disk_that_is_too_slow_ends_the_trace_without_a_gap_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "INPUTS_HELD", 50)
    go_on = threading.Event()
    write = TraceWriter._write

    def slow(self: TraceWriter, text: bytes) -> None:
        assert go_on.wait(10)
        write(self, text)

    monkeypatch.setattr(TraceWriter, "_write", slow)
    traced = Traced(tmp_path / "t")
    traced.join(300)
    assert len(traced.writer._waiting) <= 50
    go_on.set()
    traced.join(10)
    traced.writer.close()
    told = traced.told()
    assert 49 <= len(told) <= 100
    assert told == [f"w{number}" for number in range(1, len(told) + 1)]
    assert traced.failures == 1
    assert "its disk was too slow" in caplog.text


def test_fault_of_ours_in_the_writer_does_not_reach_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(entry: object) -> bytes:
        raise RuntimeError("a bug")

    monkeypatch.setattr(writer, "line_of", broken)
    traced = Traced(tmp_path / "t")
    traced.join(5)
    eventually(lambda: traced.failures == 1)
    traced.join(5)
    traced.writer.close()
    assert "a bug" in caplog.text
    with pytest.raises(UsageError, match="no whole row"):
        read_trace(tmp_path / "t")


def test_input_costs_next_to_nothing_under_the_lock(tmp_path: Path) -> None:
    traced = Traced(tmp_path / "t")
    taken = Recorded(Join(1.0, "a", 1, 1))
    fastest = min(_seconds_of(traced.writer.append, taken) for _ in range(2000))
    traced.writer.close()
    assert fastest < 2e-6


def _seconds_of(append: Callable[[Recorded], None], taken: Recorded) -> float:
    started = time.perf_counter()
    append(taken)
    return time.perf_counter() - started
