"""Gradients on their way to the disk while they arrive: large ones are written by threads of their own."""

import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from journal.disk import ROOM, Disk
from journal.recording import journal_in
from ormo_protos.limits import CHUNK_BYTES
from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_server.core.errors import DiskFull
from ormo_server.journal.records import gradients_path


def large(value: float, elements: int = 250_000) -> Payload:
    """Of 1 MB."""
    manifest = Manifest.laid_out([TensorSpec("weight", (elements,), FLOAT32, PARAMETER)])
    payload = Payload(PayloadLayout.of(manifest, FLOAT32, with_buffers=False))
    payload.parameters.fill_(value)
    return payload


@pytest.mark.parametrize("fsync", ["always", "off"])
def test_large_gradients_of_many_threads_are_all_written(tmp_path: Path, fsync: Any) -> None:
    journal = journal_in(tmp_path, fsync)
    payloads = [large(value) for value in range(12)]
    with ThreadPoolExecutor(6) as pool:
        kept = list(pool.map(lambda payload: journal.store(journal.begin(payload)), payloads))
    for stored, payload in zip(kept, payloads, strict=True):
        written = gradients_path(tmp_path, stored.file).read_bytes()[stored.offset : stored.offset + stored.size]
        assert written == payload.memory
        assert stored.checksum == zlib.crc32(written)
        journal.release(stored)
    journal.close()


def test_no_room_for_a_large_gradient_refuses_it_and_nothing_else(tmp_path: Path, disk: Disk) -> None:
    journal = journal_in(tmp_path)
    disk.fail("pwrite", "gradients", ROOM)
    with pytest.raises(DiskFull, match=r"No space left on device.*: make room there"):
        journal.store(journal.begin(large(1.0)))
    disk.failing.clear()
    stored = journal.store(journal.begin(large(2.0)))
    assert gradients_path(tmp_path, stored.file).read_bytes()[stored.offset :] == large(2.0).memory
    journal.release(stored)
    journal.close()


def test_the_end_waits_for_a_large_gradient_that_is_being_written(tmp_path: Path, disk: Disk) -> None:
    journal = journal_in(tmp_path)
    begun, go_on = threading.Event(), threading.Event()

    def hold(call: str, kind: str) -> None:
        if (call, kind) == ("pwrite", "gradients"):
            begun.set()
            assert go_on.wait(30)

    disk.before = hold
    with ThreadPoolExecutor(2) as pool:
        storing = pool.submit(lambda: journal.store(journal.begin(large(1.0))))
        assert begun.wait(30)
        closing = pool.submit(journal.close)
        assert not storing.done()
        assert not closing.done()
        go_on.set()
        stored = storing.result(30)
        closing.result(30)
    assert gradients_path(tmp_path, stored.file).read_bytes() == large(1.0).memory
    journal.release(stored)


# While it arrives


PIECES = 3 * CHUNK_BYTES // 4 + 12_345  # elements: three whole pieces and a rest


def test_pieces_are_written_before_the_last_has_come(tmp_path: Path, disk: Disk) -> None:
    journal, payload, written = journal_in(tmp_path), large(1.0, PIECES), threading.Event()
    disk.before = lambda call, kind: written.set() if (call, kind) == ("pwrite", "gradients") else None
    storing = journal.begin(payload)
    storing.advance(CHUNK_BYTES - 1)
    assert not written.wait(0.1)
    storing.advance(CHUNK_BYTES)
    assert written.wait(30)
    # What has not come yet may still change.
    payload.parameters[CHUNK_BYTES // 4 :] = 2.0
    storing.advance(3 * CHUNK_BYTES)
    stored = journal.store(storing)
    path = gradients_path(tmp_path, stored.file)
    assert path.read_bytes()[stored.offset :] == payload.memory
    assert stored.checksum == zlib.crc32(payload.memory)
    journal.release(stored)
    journal.close()


def test_place_of_one_that_is_given_up_is_the_next_ones(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    first = journal.store(journal.begin(large(1.0)))
    before = journal.size_bytes
    cut = journal.begin(large(2.0, PIECES))
    cut.advance(2 * CHUNK_BYTES)
    cut.give_up()
    cut.give_up()
    assert journal.size_bytes == before
    second = journal.store(journal.begin(large(3.0)))
    written = gradients_path(tmp_path, second.file).read_bytes()
    assert written[first.offset : first.offset + first.size] == large(1.0).memory
    assert written[second.offset : second.offset + second.size] == large(3.0).memory
    assert second.offset < first.size + 2 * CHUNK_BYTES
    for stored in (first, second):
        journal.release(stored)
    journal.close()


def test_place_behind_which_another_was_given_stays(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    cut, whole = journal.begin(large(1.0)), journal.begin(large(2.0))
    cut.give_up()
    later, stored = journal.store(journal.begin(large(3.0))), journal.store(whole)
    written = gradients_path(tmp_path, stored.file).read_bytes()
    assert written[stored.offset : stored.offset + stored.size] == large(2.0).memory
    assert written[later.offset : later.offset + later.size] == large(3.0).memory
    for each in (later, stored):
        journal.release(each)
    journal.close()


def test_who_gives_up_waits_for_what_is_being_written(tmp_path: Path, disk: Disk) -> None:
    """Its memory, and its place, are somebody else's from then on."""
    journal, begun, go_on = journal_in(tmp_path), threading.Event(), threading.Event()

    def hold(call: str, kind: str) -> None:
        if (call, kind) == ("pwrite", "gradients"):
            begun.set()
            assert go_on.wait(30)

    disk.before = hold
    storing = journal.begin(large(1.0, PIECES))
    storing.advance(CHUNK_BYTES)
    assert begun.wait(30)
    with ThreadPoolExecutor(1) as pool:
        given_up = pool.submit(storing.give_up)
        assert not given_up.done()
        go_on.set()
        given_up.result(30)
    journal.close()


def test_disk_that_fills_up_in_the_middle_refuses_the_gradient(tmp_path: Path, disk: Disk) -> None:
    journal = journal_in(tmp_path)
    storing = journal.begin(large(1.0, PIECES))
    storing.advance(CHUNK_BYTES)
    disk.fail("pwrite", "gradients", ROOM)
    with pytest.raises(DiskFull, match="make room there"):
        journal.store(storing)
    assert journal.size_bytes < CHUNK_BYTES
    disk.failing.clear()
    journal.release(journal.store(journal.begin(large(1.0))))
    journal.close()
