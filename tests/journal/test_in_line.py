"""Small gradients stand in their lines, so that one write, and one fsync, is all that an answer waits for."""

import json
from pathlib import Path

import pytest
import torch

from core.driving import Driver, fingerprint, run_of
from journal.disk import ROOM, Disk
from journal.recording import MANIFEST, checkpoint, journal_in, payload_of, recorded, replayed
from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_server.core.effects import Redeemed
from ormo_server.core.errors import DiskFull, NotReady
from ormo_server.core.inputs import Gradient, Push
from ormo_server.journal import Fsync, KeptGradient, StoredGradient, writer
from ormo_server.journal.records import LONGEST_LINE_BYTES, End, GradientInLine, Record, chain_lines, log_path, text_of
from ormo_server.trace import Recorded

RUN = run_of()
LIMIT = writer.IN_LINE_BYTES["always"]


def of_bytes(size: int) -> Payload:
    manifest = Manifest.laid_out([TensorSpec("weight", (size // 4,), FLOAT32, PARAMETER)])
    return Payload(PayloadLayout.of(manifest, FLOAT32, with_buffers=False))


def begun(driver: Driver) -> Driver:
    driver.join("a")
    driver.request("a")
    return driver


def test_an_answer_waits_for_one_write_and_one_fsync(tmp_path: Path, disk: Disk) -> None:
    journal = journal_in(tmp_path, "always")
    driver = begun(recorded(RUN, journal))
    journal.wait_durable(journal.position)
    disk.calls.clear()
    driver.exchange("a", 1.0)
    assert disk.calls == []
    journal.wait_durable(journal.position)
    assert disk.calls == [("pwrite", "log"), ("fdatasync", "log"), ("pwrite", "mark")]
    assert not list(tmp_path.glob("gradients-*"))


@pytest.mark.parametrize(("size", "kind"), [(LIMIT, GradientInLine), (LIMIT + 4, StoredGradient)])
def test_larger_ones_go_into_a_file(tmp_path: Path, size: int, kind: type[KeptGradient]) -> None:
    journal = journal_in(tmp_path, "always")
    kept = journal.store(journal.begin(of_bytes(size)))
    assert isinstance(kept, kind)
    journal.release(kept)
    journal.close()


@pytest.mark.parametrize("fsync", ["interval", "off"])
def test_where_no_answer_waits_for_an_fsync_all_go_into_files(tmp_path: Path, fsync: Fsync) -> None:
    journal = journal_in(tmp_path, fsync)
    kept = journal.store(journal.begin(of_bytes(4)))
    assert isinstance(kept, StoredGradient)
    journal.release(kept)
    journal.close()


def test_the_largest_has_a_line_that_is_read() -> None:
    kept = GradientInLine(payload=b"\xff" * LIMIT, dtype=FLOAT32, with_buffers=False)
    assert len(kept.model_dump_json()) < LONGEST_LINE_BYTES / 2


def test_memory_that_is_used_again_before_the_line_is_written_does_not_change_it(tmp_path: Path) -> None:
    journal = journal_in(tmp_path, "always")
    payload = payload_of(Gradient(torch.tensor([1.0, 2.0, 3.0])))
    kept = journal.store(journal.begin(payload))
    payload.parameters.fill_(9.0)
    assert isinstance(kept, GradientInLine)
    assert kept.payload == payload_of(Gradient(torch.tensor([1.0, 2.0, 3.0]))).memory
    journal.close()


def test_its_line_has_its_bytes_and_what_they_are(tmp_path: Path) -> None:
    journal = journal_in(tmp_path, "always")
    driver = begun(recorded(RUN, journal))
    driver.exchange("a", 1.0)
    journal.wait_durable(journal.position)
    (line,) = (each for each in log_path(tmp_path, 1).read_bytes().splitlines() if b"pushed" in each)
    # Three float32, little-endian, all of them 1; a file that says otherwise can't be read by this version.
    assert json.loads(line[line.index(b"{") :])["gradient"] == {
        "payload": "AACAPwAAgD8AAIA_AAAAAA==",  # and some zeros, for the layout
        "dtype": 1,
        "with_buffers": False,
    }


@pytest.mark.parametrize(
    "kept",
    [
        None,
        StoredGradient(file=1, offset=2, size=3, checksum=4, dtype=FLOAT32, with_buffers=True),
        GradientInLine(payload=bytes(range(256)), dtype=FLOAT32, with_buffers=False),
    ],
)
def test_a_text_that_is_written_in_haste_is_that_of_the_record(kept: KeptGradient | None) -> None:
    redeemed = Redeemed(10, 2, 1.25, 2, 1, 1e-7, discarded=False, iteration_after=13)
    recorded = Recorded(Push(2.5, "a", 7, 0, 3, 4, 2**63, 32), redeemed)
    record = Record(input=recorded, gradient=kept)
    assert text_of(recorded, kept) == record.text()
    assert Record.read(record.text()) == record


@pytest.mark.parametrize("payload", [b"", b"1234", b"\0" * 4096])
def test_one_that_does_not_fit_the_model_is_damage(tmp_path: Path, payload: bytes) -> None:
    journal = journal_in(tmp_path, "always")
    driver = begun(recorded(RUN, journal))
    taken, log = checkpoint(driver)
    before = fingerprint(driver.machine)
    driver.exchange("a", 1.0)
    journal.wait_durable(journal.position)
    journal.close()
    opening, *lines = log_path(tmp_path, log).read_bytes().splitlines()
    texts = [json.loads(line[line.index(b"{") :]) for line in lines]
    texts[0]["gradient"] = json.loads(
        GradientInLine(payload=payload, dtype=FLOAT32, with_buffers=False).model_dump_json()
    )
    again, _ = chain_lines(End(log, 0, int(lines[0].split()[1], 16)), (json.dumps(each).encode() for each in texts))
    log_path(tmp_path, log).write_bytes(opening + b"\n" + again)
    machine, reading = replayed(RUN, taken, tmp_path, log)
    assert fingerprint(machine) == before
    assert f"line 1 of {log_path(tmp_path, log)} is damaged, or the gradient that it names" in reading.lost
    assert "at least 2 acknowledged entries, pushes among them that can still be read: 1 of 'a'" in reading.lost


def test_no_room_keeps_its_answer_back_until_there_is_some(tmp_path: Path, disk: Disk) -> None:
    journal = journal_in(tmp_path, "always")
    driver = begun(recorded(RUN, journal))
    taken, log = checkpoint(driver)
    journal.wait_durable(journal.position)
    disk.fail("pwrite", "log", ROOM)
    before = fingerprint(driver.machine)
    driver.push("a", 1.0)
    for _ in range(2):
        with pytest.raises(DiskFull, match="make room there"):
            journal.wait_durable(journal.position)
    # A crash now loses what nobody was told of.
    machine, reading = replayed(RUN, taken, tmp_path, log)
    assert (fingerprint(machine), reading.torn, reading.lost) == (before, False, "")
    disk.failing.clear()
    journal.wait_durable(journal.position)
    machine, reading = replayed(RUN, taken, tmp_path, log)
    assert (fingerprint(machine), reading.lost) == (fingerprint(driver.machine), "")


def test_after_its_end_the_journal_takes_none(tmp_path: Path) -> None:
    journal = journal_in(tmp_path, "always")
    journal.close()
    with pytest.raises(NotReady, match="is closed"):
        journal.begin(payload_of(Gradient(torch.zeros(3)), MANIFEST))


def test_one_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    journal = journal_in(tmp_path, "always")
    before = journal.size_bytes
    storing = journal.begin(of_bytes(4096))
    storing.advance(100)
    storing.give_up()
    storing.give_up()
    assert journal.size_bytes == before
    assert not list(tmp_path.glob("gradients-*"))
    journal.close()
