"""The journal's files: what is written when, what goes when, and what a full or broken disk does."""

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.driving import Driver, fingerprint, run_of
from journal.disk import ROOM, Disk
from journal.recording import checkpoint, journal_in, payload_of, recorded, replayed
from ormo_protos.tensors import Payload
from ormo_server.core.errors import DiskFull, NotReady
from ormo_server.journal import Journal, StoredGradient, writer
from ormo_server.journal.records import gradients_path, log_path
from service.wire import eventually

pytestmark = pytest.mark.usefixtures("in_files")


def names(directory: Path) -> list[str]:
    """Of logs and gradients."""
    return sorted(path.name for path in directory.iterdir() if path.suffix)


def bytes_in(directory: Path) -> int:
    """Of logs and gradients."""
    return sum(path.stat().st_size for path in directory.iterdir() if path.suffix)


def steps(driver: Driver, count: int = 3) -> None:
    """Some inputs; those before them have been answered."""
    if "a" not in driver.incarnations:
        driver.join("a")
        driver.request("a")
    for value in range(count):
        driver.exchange("a", 1.0 + value)


# When


def test_a_gradient_is_on_the_disk_before_its_line_and_its_line_before_the_answer(tmp_path: Path, disk: Disk) -> None:
    journal = journal_in(tmp_path, "always")
    driver = recorded(run_of(), journal)
    steps(driver, 1)
    journal.wait_durable(journal.position)
    disk.calls.clear()
    steps(driver, 1)
    assert disk.calls == [("pwrite", "gradients")]
    journal.wait_durable(journal.position)
    assert disk.calls[1:] == [
        ("fdatasync", "gradients"),
        ("pwrite", "log"),
        ("fdatasync", "log"),
        ("pwrite", "mark"),  # which nobody waits for
    ]


def test_without_fsync_an_answer_waits_for_the_write_alone(tmp_path: Path, disk: Disk) -> None:
    journal = journal_in(tmp_path, "off")
    driver = recorded(run_of(), journal)
    disk.calls.clear()
    steps(driver, 1)
    journal.wait_durable(journal.position)
    assert disk.calls == [("fsync", "directory"), ("pwrite", "gradients"), ("pwrite", "log"), ("pwrite", "mark")]


def test_with_an_interval_all_of_it_is_on_the_disk_soon(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "INTERVAL_SECONDS", 0.01)
    synced = threading.Event()
    disk.before = lambda call, kind: synced.set() if (call, kind) == ("fdatasync", "log") else None
    journal = journal_in(tmp_path, "interval")
    driver = recorded(run_of(), journal)
    steps(driver, 1)
    journal.wait_durable(journal.position)
    synced.clear()
    assert synced.wait(10)
    assert ("fdatasync", "gradients") in disk.calls
    journal.close()


def test_what_is_settled_already_costs_nothing(tmp_path: Path, disk: Disk) -> None:
    journal = journal_in(tmp_path, "always")
    steps(recorded(run_of(), journal))
    journal.wait_durable(journal.position)
    disk.calls.clear()
    journal.wait_durable(journal.position)
    journal.wait_durable(1)
    assert disk.calls == []


def test_one_write_and_one_fsync_serve_all_who_wait(tmp_path: Path, disk: Disk) -> None:
    journal = journal_in(tmp_path, "always")
    driver = recorded(run_of(), journal)
    steps(driver, 1)
    begun, go_on = threading.Event(), threading.Event()

    def hold(call: str, kind: str) -> None:
        if (call, kind) == ("fdatasync", "log"):
            begun.set()
            assert go_on.wait(10)

    disk.before = hold
    threads = [threading.Thread(target=journal.wait_durable, args=(journal.position,))]
    threads[0].start()
    assert begun.wait(10)
    for _ in range(5):
        steps(driver, 1)
        threads.append(threading.Thread(target=journal.wait_durable, args=(journal.position,)))
        threads[-1].start()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert disk.calls.count(("fdatasync", "log")) == 2


# What goes


def test_a_checkpoint_takes_away_what_it_holds(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    driver = recorded(run_of(), journal)
    steps(driver)
    assert journal.size_bytes > 3 * 12
    _, log = checkpoint(driver)
    steps(driver)
    journal.wait_durable(journal.position)
    assert names(tmp_path) == [
        "gradients-00000001.bin",
        "gradients-00000002.bin",
        "inputs-00000001.log",
        "inputs-00000002.log",
    ]
    journal.forget_before(log)
    assert names(tmp_path) == ["gradients-00000002.bin", "inputs-00000002.log"]
    assert journal.size_bytes == bytes_in(tmp_path)


def test_a_gradient_that_is_not_taken_yet_keeps_its_file(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    driver = recorded(run_of(), journal)
    steps(driver)
    place = driver.places["a", 0]
    assert place.granted is not None
    gradient = driver.gradients[next(iter(driver.gradients))]
    stored = journal.store(journal.begin(payload_of(gradient)))
    _, log = checkpoint(driver)
    journal.wait_durable(journal.position)
    journal.forget_before(log)
    assert "gradients-00000001.bin" in names(tmp_path)
    journal.release(stored)
    journal.forget_before(log)
    assert names(tmp_path) == ["inputs-00000002.log"]


def test_a_gradient_named_after_the_checkpoint_keeps_its_file(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    driver = recorded(run_of(), journal)
    steps(driver)
    real = journal.store
    found: list[Any] = []

    def store_and_check(payload: Payload) -> StoredGradient:
        stored = real(payload)
        found.append(checkpoint(driver))
        return stored

    journal.store = store_and_check  # type: ignore[method-assign]
    driver.push("a", 5.0)  # stored before the checkpoint, applied after it
    journal.wait_durable(journal.position)
    taken, log = found[0]
    journal.forget_before(log)
    assert "gradients-00000001.bin" in names(tmp_path)
    machine, reading = replayed(run_of(), taken, tmp_path, log)
    assert (fingerprint(machine), reading.lost) == (fingerprint(driver.machine), "")


def test_files_of_an_earlier_server_go_and_their_numbers_are_not_used_again(tmp_path: Path) -> None:
    log_path(tmp_path, 8).write_bytes(b"")
    gradients_path(tmp_path, 5).write_bytes(b"12")
    journal = journal_in(tmp_path)
    steps(recorded(run_of(), journal))
    assert journal.log == 9
    assert names(tmp_path)[:2] == ["gradients-00000005.bin", "gradients-00000006.bin"]
    journal.forget_before(9)
    assert names(tmp_path) == ["gradients-00000006.bin", "inputs-00000009.log"]


def test_a_mark_goes_with_the_logs_of_its_server(tmp_path: Path) -> None:
    for number in (1, 3):
        journal = journal_in(tmp_path)
        steps(recorded(run_of(), journal))
        journal.begin_log()
        journal.wait_durable(journal.position)
        journal.forget_before(journal.log)
        journal.close()
        assert [path.name for path in tmp_path.glob("acknowledged-*")] == [f"acknowledged-{number:08d}"]


def test_a_number_that_a_mark_knows_is_not_used_again(tmp_path: Path) -> None:
    """Else it would tell of lines that the new log never had."""
    journal = journal_in(tmp_path)
    steps(recorded(run_of(), journal))
    journal.wait_durable(journal.position)
    journal.close()
    for path in tmp_path.glob("inputs-*"):
        path.unlink()
    later = journal_in(tmp_path)
    assert later.log == 2
    later.close()


# Size


def test_a_checkpoint_is_due_at_the_bound_and_gradients_wait_at_twice_that(tmp_path: Path) -> None:
    journal = journal_in(tmp_path, max_bytes=300)
    driver = recorded(run_of(), journal)
    assert not journal.full
    with pytest.raises(DiskFull, match=r"it has [\d,]+ bytes, and no checkpoint could be written") as refused:
        steps(driver, 1000)
    assert journal.full
    assert refused.value.retry_seconds
    before = fingerprint(driver.machine)
    with pytest.raises(DiskFull):
        driver.push("a", 1.0)
    assert fingerprint(driver.machine) == before
    _, log = checkpoint(driver)
    journal.wait_durable(journal.position)
    journal.forget_before(log)
    assert not journal.full
    driver.push("a", 1.0)


def test_its_size_is_that_of_all_its_logs_while_no_checkpoint_can_be_written(tmp_path: Path) -> None:
    journal = journal_in(tmp_path, max_bytes=2000)
    driver = recorded(run_of(), journal)

    def go_on() -> None:
        for _ in range(1000):
            steps(driver, 1)
            checkpoint(driver)  # which is not written: its log is not the first of a checkpoint
            journal.wait_durable(journal.position)

    with pytest.raises(DiskFull):
        go_on()
    assert 4000 < bytes_in(tmp_path) == journal.size_bytes < 6000


def test_a_checkpoint_is_due_after_many_entries_however_small_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "ENTRIES_BETWEEN_CHECKPOINTS", 20)
    journal = journal_in(tmp_path)
    driver = recorded(run_of(), journal)
    steps(driver, 9)
    assert not journal.full
    steps(driver, 2)
    assert journal.full
    checkpoint(driver)
    _, log = checkpoint(driver)
    steps(driver, 9)
    journal.wait_durable(journal.position)
    journal.forget_before(log)
    assert not journal.full
    steps(driver, 2)
    assert journal.full


# A full disk


def test_parts_of_a_write_make_a_whole(tmp_path: Path, disk: Disk) -> None:
    disk.written_at_once = 7
    journal = journal_in(tmp_path, "always")
    driver = recorded(run_of(), journal)
    taken, log = checkpoint(driver)
    steps(driver)
    journal.wait_durable(journal.position)
    machine, reading = replayed(run_of(), taken, tmp_path, log)
    assert (fingerprint(machine), reading.torn, reading.lost) == (fingerprint(driver.machine), False, "")


def test_no_room_for_a_gradient_refuses_it_and_nothing_else(tmp_path: Path, disk: Disk) -> None:
    journal = journal_in(tmp_path)
    driver = recorded(run_of(), journal)
    steps(driver)
    before = fingerprint(driver.machine)
    disk.fail("pwrite", "gradients", ROOM)
    with pytest.raises(DiskFull, match=r"No space left on device.*: make room there"):
        driver.push("a", 1.0)
    assert fingerprint(driver.machine) == before
    disk.failing.clear()
    driver.push("a", 1.0)


@pytest.mark.parametrize("fsync", ["always", "off"])
def test_no_room_for_lines_keeps_answers_back_until_there_is_some(tmp_path: Path, disk: Disk, fsync: Any) -> None:
    journal = journal_in(tmp_path, fsync)
    driver = recorded(run_of(), journal)
    taken, log = checkpoint(driver)
    steps(driver)
    journal.wait_durable(journal.position)
    disk.fail("pwrite", "log", ROOM)
    steps(driver)
    for _ in range(2):
        with pytest.raises(DiskFull):
            journal.wait_durable(journal.position)
    # A crash now loses what nobody was told of.
    _, reading = replayed(run_of(), taken, tmp_path, log)
    assert (reading.torn, reading.lost) == (False, "")
    steps(driver)
    disk.failing.clear()
    journal.wait_durable(journal.position)
    machine, reading = replayed(run_of(), taken, tmp_path, log)
    assert (fingerprint(machine), reading.torn, reading.lost) == (fingerprint(driver.machine), False, "")


def test_no_room_for_a_new_log_is_waited_for(tmp_path: Path, disk: Disk) -> None:
    journal = journal_in(tmp_path, "always")
    driver = recorded(run_of(), journal)
    taken, log = checkpoint(driver)
    journal.wait_durable(journal.position)
    steps(driver)
    checkpoint(driver)
    steps(driver)
    disk.fail("fsync", "directory", ROOM)
    with pytest.raises(DiskFull):
        journal.wait_durable(journal.position)
    disk.failing.clear()
    journal.wait_durable(journal.position)
    machine, reading = replayed(run_of(), taken, tmp_path, log)
    assert (fingerprint(machine), reading.lost) == (fingerprint(driver.machine), "")


@pytest.mark.parametrize("number", [ROOM, errno.EIO])
def test_a_mark_that_cant_be_written_says_less_and_stops_nobody(tmp_path: Path, disk: Disk, number: int) -> None:
    journal = journal_in(tmp_path, "always")
    driver = recorded(run_of(), journal)
    taken, log = checkpoint(driver)
    steps(driver)
    disk.fail("pwrite", "mark", number)
    journal.wait_durable(journal.position)
    machine, reading = replayed(run_of(), taken, tmp_path, log)
    assert (fingerprint(machine), reading.torn, reading.lost) == (fingerprint(driver.machine), False, "")


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_journal_that_cant_begin_leaves_no_log(tmp_path: Path, disk: Disk, call: str) -> None:
    disk.fail(call, "log" if call == "pwrite" else "directory", ROOM)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            journal_in(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Too few descriptors


@contextlib.contextmanager
def no_descriptor() -> Iterator[None]:
    """No file can be opened: really."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("fsync", ["always", "interval", "off"])
def test_no_descriptor_for_the_next_files_is_waited_for(tmp_path: Path, fsync: Any) -> None:
    broken: list[bool] = []
    journal = journal_in(tmp_path, fsync, on_failure=lambda: broken.append(True))
    driver = recorded(run_of(), journal)
    taken, log = checkpoint(driver)
    steps(driver)
    journal.wait_durable(journal.position)
    checkpoint(driver)
    with no_descriptor():
        with pytest.raises(DiskFull, match=r"Too many open files.*limit of open files.* nothing is lost") as refused:
            journal.wait_durable(journal.position)
        assert refused.value.retry_seconds == 2.0
        before = fingerprint(driver.machine)
        with pytest.raises(DiskFull, match=r"Too many open files"):
            driver.push("a", 1.0)
        assert fingerprint(driver.machine) == before
    assert not broken
    steps(driver)
    journal.wait_durable(journal.position)
    machine, reading = replayed(run_of(), taken, tmp_path, log)
    assert (fingerprint(machine), reading.lost) == (fingerprint(driver.machine), "")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_want_of_descriptors_or_memory_is_no_broken_disk(tmp_path: Path, disk: Disk, number: int) -> None:
    journal = journal_in(tmp_path, "always")
    driver = recorded(run_of(), journal)
    steps(driver)
    journal.wait_durable(journal.position)
    steps(driver)
    disk.fail("pwrite", "log", number)
    with pytest.raises(DiskFull):
        journal.wait_durable(journal.position)
    disk.failing.clear()
    journal.wait_durable(journal.position)


@pytest.mark.parametrize("fsync", ["always", "interval", "off"])
def test_checkpoints_that_fail_leave_no_descriptors_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: Any
) -> None:
    monkeypatch.setattr(writer, "INTERVAL_SECONDS", 0.01)
    journal = journal_in(tmp_path, fsync)
    driver = recorded(run_of(), journal)
    taken, log = checkpoint(driver)

    def attempt() -> None:
        steps(driver)
        checkpoint(driver)
        journal.wait_durable(journal.position)

    attempt()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        attempt()
    if fsync == "interval":  # closed at the next turn after their fsync
        eventually(lambda: not any(file.unsynced for file in journal._gradients._files.values()))
        attempt()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 4
    machine, reading = replayed(run_of(), taken, tmp_path, log)
    assert (fingerprint(machine), reading.lost) == (fingerprint(driver.machine), "")


# A broken one


@pytest.mark.parametrize(
    ("call", "kind", "number"),
    [
        ("pwrite", "log", errno.EIO),
        ("fdatasync", "log", errno.EIO),
        ("fdatasync", "gradients", errno.EIO),
        # Network file systems, quotas and late allocation find out so late that there is no room.
        ("fdatasync", "log", ROOM),
        ("fdatasync", "gradients", ROOM),
        ("fdatasync", "gradients", errno.EDQUOT),
    ],
)
def test_a_broken_disk_ends_it_for_good(tmp_path: Path, disk: Disk, call: str, kind: str, number: int) -> None:
    failures: list[None] = []
    journal = journal_in(tmp_path, "always", on_failure=lambda: failures.append(None))
    driver = recorded(run_of(), journal)
    steps(driver)
    journal.wait_durable(journal.position)
    steps(driver)
    disk.fail(call, kind, number)
    with pytest.raises(NotReady, match="this server stops"):
        journal.wait_durable(journal.position)
    assert failures
    disk.failing.clear()  # what an fsync failed on may be gone: that it goes well later means nothing
    with pytest.raises(NotReady):
        journal.wait_durable(journal.position)
    journal.close()


@pytest.mark.parametrize("number", [errno.EIO, ROOM])
def test_a_disk_that_breaks_between_answers_is_noticed(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(writer, "INTERVAL_SECONDS", 0.01)
    failed = threading.Event()
    journal = journal_in(tmp_path, "interval", on_failure=failed.set)
    steps(recorded(run_of(), journal))
    disk.fail("fdatasync", "log", number)
    assert failed.wait(10)
    journal.close()


def test_a_log_that_could_not_be_made_safe_is_not_followed_by_another(tmp_path: Path, disk: Disk) -> None:
    journal = journal_in(tmp_path, "always")
    driver = recorded(run_of(), journal)
    steps(driver)
    checkpoint(driver)
    disk.fail("fdatasync", "log", ROOM)
    with pytest.raises(NotReady, match="this server stops"):
        journal.wait_durable(journal.position)
    assert not log_path(tmp_path, journal.log).exists()
    journal.close()


def test_each_write_tells_its_seconds(tmp_path: Path) -> None:
    told: list[float] = []
    journal: Journal = journal_in(tmp_path, on_commit=told.append)
    steps(recorded(run_of(), journal))
    journal.wait_durable(journal.position)
    assert len(told) == 1
    assert 0 < told[0] < 60


def test_after_its_end_nothing_is_taken_and_who_still_writes_may_finish(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    driver = recorded(run_of(), journal)
    steps(driver)
    late = payload_of(driver.gradients[next(iter(driver.gradients))])
    stored = journal.store(journal.begin(late))
    journal.close()
    journal.close()
    with pytest.raises(NotReady, match="is closed"):
        journal.store(journal.begin(late))
    with pytest.raises(NotReady):
        journal.wait_durable(journal.position)
    journal.release(stored)


def test_after_its_end_it_takes_nothing_away(tmp_path: Path) -> None:
    """A checkpoint that was late would take the files of the next server."""
    journal = journal_in(tmp_path)
    driver = recorded(run_of(), journal)
    steps(driver)
    _, log = checkpoint(driver)
    journal.wait_durable(journal.position)
    journal.close()
    before = names(tmp_path)
    journal.forget_before(log)
    assert names(tmp_path) == before
