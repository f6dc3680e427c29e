"""Whatever the journal's files hold, reading them ends with a state that their lines led to, or with an error."""

import tempfile
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from core.driving import Driver, fingerprint, run_of
from core.scripts import SIZE
from fuzz.script import Script
from journal.recording import MANIFEST, checkpoint, fresh_copy, journal_in, recorded
from ormo_server.core import snapshot
from ormo_server.core.inputs import Gradient, Push
from ormo_server.core.snapshot import Snapshot
from ormo_server.journal import Reading, replay
from ormo_server.journal.records import End, chain_lines, gradients_path, log_path, opening
from ormo_server.store import StoreError
from service.wire import int8_payload

LONGEST_BYTES = 1 << 14  # all of the recording
RUN = run_of(rule="dc")  # which has records of every kind


@cache
def recording() -> tuple[Snapshot, bytes, bytes]:
    """A checkpoint, and the log and the gradients that came after it."""
    with tempfile.TemporaryDirectory() as folder:
        journal = journal_in(Path(folder))
        driver = recorded(RUN, journal)
        taken, log = checkpoint(driver)
        append = journal.append
        # Each line says that those before it were acknowledged.
        journal.append = lambda *entry: (append(*entry), journal.wait_durable(journal.position))[0]  # type: ignore[method-assign]
        _a_story(driver)
        journal.wait_durable(journal.position)
        journal.close()
        return taken, log_path(Path(folder), log).read_bytes(), gradients_path(Path(folder), 1).read_bytes()


def _a_story(driver: Driver) -> None:
    driver.join("a")
    driver.join("b", slots=2)
    for worker, slot in (("a", 0), ("b", 1)):
        driver.request(worker, slot)
    for value in range(1, 4):
        driver.exchange("a", value, 0)
    buffers = {"float_buffers": torch.ones(2), "int_buffers": torch.ones(1, dtype=torch.int64)}
    driver.push("b", 2.0, 1, samples=3, **buffers)
    driver.request("b", 1)
    epoch, number = driver.ticket("b", 1)
    coded = int8_payload(MANIFEST, torch.full((SIZE,), 0.5)).gradient  # one number for all, which is 127 of its scale
    driver.take(Push(driver.now, *driver.requester("b", 1), number, epoch), Gradient(coded))
    driver.places["b", 1].request += 1
    driver.request("b", 1)
    driver.hand_back("b", 1)
    driver.leave("b")


def sealed(text: bytes) -> bytes:
    """A line of an older server, with a checksum that fits."""
    return b"%08x %s\n" % (zlib.crc32(text), text)


def files(fuzzed: bytes) -> tuple[bytes, bytes]:
    """The log and the gradients.

    A first byte above 127 says that the lines are given without what hangs them together: above 191 they get the chain,
    else the checksums of older servers.
    """
    script = Script(fuzzed)
    choice = script.number()
    if choice == 0:
        return script.rest(), b""
    _, log, gradients = recording()
    body = script.rest()
    if choice >= 192:
        lines, _ = chain_lines(End(2, 0, 7), body.split(b"\n"))
        return opening(End(1, 0, 7)) + lines, gradients
    if choice >= 128:
        return b"".join(sealed(line) for line in body.split(b"\n")), gradients
    if choice >= 64:
        return log, body
    whole = log.splitlines(keepends=True)
    return b"".join(whole[: choice % len(whole)]) + body, gradients


def check(fuzzed: bytes) -> str:
    """Read and replay; returns how it ended."""
    taken = recording()[0]
    machine = snapshot.resume(RUN, fresh_copy(taken))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        log, gradients = files(fuzzed)
        log_path(directory, 2).write_bytes(log)
        gradients_path(directory, 1).write_bytes(gradients)
        reading = Reading(directory, 2, MANIFEST)
        try:
            replay(machine, reading, 0.0)
        except StoreError:
            return "error"
    assert reading.records <= log.count(b"\n")
    assert reading.torn + reading.doubled + bool(reading.lost) <= 1
    fingerprint(machine)
    return "lost" if reading.lost else "torn" if reading.torn else "doubled" if reading.doubled else "whole"


def seeds() -> Iterator[bytes]:
    """All of a journal, a part of one with a rest to be guessed, other gradients, and lines that fit by themselves."""
    _, log, gradients = recording()
    yield b"\x00" + log
    yield b"\x05" + log
    yield b"\x40" + gradients
    yield b"\x40" + gradients[:-1]
    lines = log.splitlines(keepends=True)
    yield b"\x05" + b"".join(lines[6:])
    yield b"\x05" + b"".join(lines[5:])
    yield b"\x05" + b"".join([*lines[5:], lines[-1]])
    yield b"\x05" + b"".join([*lines[5:], b"torn"])
    texts = [line[line.index(b"{") : -1] for line in log.splitlines(keepends=True)[1:]]
    yield b"\x80" + b"\n".join(texts)
    yield b"\xc0" + b"\n".join(texts)
    for text in texts:
        yield b"\x80" + texts[0] + b"\n" + text
        yield b"\xc0" + texts[0] + b"\n" + text
