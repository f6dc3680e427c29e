"""Broken and hostile traffic to the port during training: training does not notice."""

import contextlib
import itertools
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

import grpc
import psutil
import pytest

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.service.server import SERVICE_NAME, Server
from service.wire import SMALL, payload, served
from system.hostile import (
    AT_ONCE,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    KINDS,
    PING,
    PREFACE,
    SLOWLY,
    WINDOW_UPDATE,
    Frame,
    Hostile,
    answer_of,
    before_data,
    frame,
    frames,
    greeting,
    message,
    overheard,
)
from system.programs import Stage

SECONDS = float(os.environ.get("HOSTILE_SECONDS", "4"))
SEED = int(os.environ.get("HOSTILE_SEED", "1"))
POLL_SECONDS = 0.5
LONGEST_GAP_SECONDS = 5.0
FAILURE_SECONDS = 2.0
# gRPC ends connections without a call up to a tenth sooner or later, so that not all end at once.
IDLE_SECONDS = 0.9 * FAILURE_SECONDS
QUIET_SECONDS = 2.0  # of a server that may be busy with other tests
PATIENT_SECONDS = 20.0  # for what is to come


def call_all(address: str) -> bytes:
    """What a client sends with two calls."""
    with overheard(address) as (through, heard), grpc.insecure_channel(through) as channel:
        stub = ParameterServerStub(channel)
        stub.GetStatus(pb.GetStatusRequest())
        assert list(stub.PullParams(pb.PullParamsRequest(delivery=pb.DeliveryRequest(dtype=pb.DTYPE_FLOAT32))))
    return bytes(heard)


class Watch(NamedTuple):
    """The iterations of a run, as time goes by."""

    seen: list[tuple[float, int]]

    @classmethod
    def of(cls, stage: Stage, seconds: float) -> Self:
        """Look each half second; the server has to answer in time, too."""
        seen: list[tuple[float, int]] = []
        end = time.monotonic() + seconds
        while len(seen) < 2 or time.monotonic() < end:
            number = stage.status().iteration.number
            seen.append((time.monotonic(), number))
            time.sleep(POLL_SECONDS)
        return cls(seen)

    @property
    def per_second(self) -> float:
        (began, first), (ended, last) = self.seen[0], self.seen[-1]
        return (last - first) / (ended - began)

    @property
    def longest_gap_seconds(self) -> float:
        """The longest time in which no new iteration was seen."""
        moved = [self.seen[0]]
        moved += [after for before, after in itertools.pairwise(self.seen) if after[1] > before[1]]
        return max(after[0] - before[0] for before, after in itertools.pairwise([*moved, self.seen[-1]]))


@pytest.mark.parametrize(
    ("seen", "per_second", "gap_seconds"),
    [
        ([(0.0, 0), (1.0, 10), (2.0, 20)], 10.0, 1.0),
        ([(0.0, 0), (1.0, 10), (2.0, 10), (3.0, 10), (4.0, 20)], 5.0, 3.0),
        ([(0.0, 0), (1.0, 10), (7.0, 10)], 10 / 7, 6.0),  # it does not go on
        ([(0.0, 5), (6.0, 5)], 0.0, 6.0),
    ],
)
def test_pauses_of_a_run_are_seen(seen: list[tuple[float, int]], per_second: float, gap_seconds: float) -> None:
    watch = Watch(seen)
    assert (watch.per_second, watch.longest_gap_seconds) == (per_second, gap_seconds)


def test_training_goes_on_as_if_nothing_came(stage: Stage) -> None:
    server = stage.server(learning_rate=0.01, failure_timeout_seconds=10.0, journal=True)
    workers = [stage.worker(name) for name in ("a", "b")]
    stage.until(lambda s: s.iteration.number > 50 and len(s.workers) == 2, "training")
    heard = call_all(stage.address)
    alone = Watch.of(stage, 2.5)
    before, memory = stage.status(), psutil.Process(server.process.pid).memory_info().rss
    with Hostile(stage.address, heard, SEED) as attack:
        attacked = Watch.of(stage, SECONDS)
        during = stage.status()
    sys.stdout.write(summary(attack, alone, attacked))
    afterwards = Watch.of(stage, 2.5)
    assert set(attack.connections) == set(KINDS), attack.connections
    # The attacker takes its share of the machine, and so may other tests, which come and go.
    assert attacked.per_second > min(alone.per_second, afterwards.per_second) / 4
    assert attacked.longest_gap_seconds < LONGEST_GAP_SECONDS
    after = stage.until(lambda s: s.iteration.number > during.iteration.number + 50, "training afterwards")
    assert after.iteration.epoch == before.iteration.epoch
    # Who lost its place and joined again would count anew.
    counts = [{worker.worker: worker.applied for worker in status.workers} for status in (before, during, after)]
    assert [sorted(count) for count in counts] == [["a", "b"]] * 3
    assert all(counts[0][name] < counts[1][name] < counts[2][name] for name in "ab")
    assert [program.process.poll() for program in (*workers, server)] == [None, None, None]
    assert psutil.Process(server.process.pid).memory_info().rss < memory + 100_000_000
    assert server.terminate() == 0
    complaints = server.log.read_bytes().count(b"Traceback")
    assert complaints <= 5 * (2 + SECONDS / 10), "whoever reaches the port must not fill the disk"
    assert server.log.stat().st_size < 30_000 + 2000 * SECONDS


def summary(attack: Hostile, alone: Watch, attacked: Watch) -> str:
    """What was sent, what was answered, and how training went."""
    lines = [f"{sum(attack.connections.values())} connections"]
    lines += [f"{attack.connections[name]:6} {name}; answers: {dict(attack.answers[name])}" for name in KINDS]
    lines += [f"iterations a second: {alone.per_second:.0f} alone, {attacked.per_second:.0f} under attack"]
    lines += [f"longest time without a new one: {attacked.longest_gap_seconds:.1f} s"]
    return "\n".join(lines) + "\n"


# Each kind is what its name says: a server answers accordingly.


@contextlib.contextmanager
def with_a_model(folder: Path, failure_timeout: float) -> Iterator[Server]:
    with served(folder, failure_timeout_seconds=failure_timeout) as server:
        server.host.offers.ask("w", 1, server.host.clock())
        server.host.accept_model("w", 1, SMALL, payload(SMALL, 0.0, buffers=True))
        yield server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with with_a_model(tmp_path, failure_timeout=30.0) as made:
        yield made


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Server]:
    with with_a_model(tmp_path, failure_timeout=FAILURE_SECONDS) as made:
        yield made


def connect(server: Server) -> socket.socket:
    host, _, port = server.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


ACCEPTED = "SETTINGS acknowledged"
ANSWERS = {
    "random bytes": {"closed"},
    "random bytes after a greeting": {ACCEPTED, "closed"},
    "random frames": {ACCEPTED, "closed"},
    "a frame that is too long": {ACCEPTED, "closed"},
    "a message that is too long": {ACCEPTED, "status 8", "RST_STREAM 0"},
    "a flood of settings and pings": {ACCEPTED, "PING answered"},
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_sent_at_once_is_answered_as_what_it_is(server: Server, name: str) -> None:
    with connect(server) as peer:
        peer.sendall(AT_ONCE[name](random.Random(SEED), call_all(server.address)))
        said = answer_of(peer, PATIENT_SECONDS, *ANSWERS[name])
        assert set(said.split(", ")) == ANSWERS[name]


def test_frames_are_found_in_what_was_said() -> None:
    said = frame(HEADERS, END_HEADERS, 3, b"ab") + frame(DATA, 0, 3) + frame(PING, 0, 0, b"12345678")
    read = [Frame(HEADERS, END_HEADERS, 3, b"ab"), Frame(DATA, 0, 3, b""), Frame(PING, 0, 0, b"12345678")]
    assert list(frames(said)) == read
    assert list(frames(said[:-1])) == read[:-1]


def test_a_call_is_cut_short_or_changed_in_few_bytes(server: Server) -> None:
    heard, dice = call_all(server.address), random.Random(SEED)
    for _ in range(100):
        cut, changed = (AT_ONCE[name](dice, heard) for name in ("a call cut short", "a call with bytes changed"))
        assert heard.startswith(cut)
        assert cut != heard
        assert sum(a != b for a, b in zip(heard, changed, strict=True)) <= 5
        assert changed.startswith(PREFACE)


def test_frame_is_refused_for_its_length_alone(server: Server) -> None:
    with connect(server) as peer:
        peer.sendall(greeting() + frame(DATA, 0, 1, b"abc"))
        assert answer_of(peer, QUIET_SECONDS) == ACCEPTED


def test_message_that_is_too_long_comes_after_the_headers_of_a_call(server: Server) -> None:
    heard = call_all(server.address)
    sent = AT_ONCE["a message that is too long"](random.Random(SEED), heard)
    *before, last = frames(sent[len(PREFACE) :])
    assert sent.startswith(before_data(heard))
    assert [one.stream for one in before if one.kind == HEADERS] == [last.stream]
    assert (last.kind, last.body[:5]) == (DATA, b"\x00\xff\xff\xff\xff")
    assert DATA not in {one.kind for one in before}


def test_headers_without_end_are_read_on_and_on(server: Server) -> None:
    sent = AT_ONCE["headers without end"](random.Random(SEED), b"")
    first, *more = list(frames(sent[len(PREFACE) :]))[1:]
    assert (first.kind, first.flags & END_HEADERS) == (HEADERS, 0)
    assert {(one.kind, one.flags, one.stream) for one in more} == {(CONTINUATION, 0, first.stream)}
    with connect(server) as peer:
        peer.sendall(sent)
        assert answer_of(peer, QUIET_SECONDS) == ACCEPTED
        # The same with an end is a call with large headers.
        peer.sendall(frame(CONTINUATION, END_HEADERS, 1) + frame(DATA, END_STREAM, 1, message(b"")))
        assert "status" in answer_of(peer, QUIET_SECONDS, "status")


def test_calls_that_are_reset_at_once_have_begun(server: Server) -> None:
    with connect(server) as peer:
        peer.sendall(AT_ONCE["calls that are reset at once"](random.Random(SEED), b""))
        assert answer_of(peer, QUIET_SECONDS) in {ACCEPTED, f"{ACCEPTED}, RST_STREAM 11"}
    assert comes_true(lambda: begun(server, "GetStatus") > 10)


def begun(server: Server, method: str) -> float:
    """How many calls of a method there were."""
    kind = "bidi_stream" if method == "PushPull" else "unary"
    labels = {"grpc_type": kind, "grpc_service": SERVICE_NAME, "grpc_method": method}
    return server.metrics.registry.get_sample_value("grpc_server_started_total", labels) or 0.0


def comes_true(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it does in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def slowly(server: Server, name: str, heard: bytes) -> tuple[str, float, int]:
    """Send until the end of the call is told; returns what was told, after how long, and how many pieces were sent."""
    began, words = time.monotonic(), ""
    with connect(server) as peer:
        for number, piece in enumerate(SLOWLY[name](heard), 1):
            with contextlib.suppress(ConnectionError):
                peer.sendall(piece)
            words += answer_of(peer, 1.0, "status")
            if "status" in words or "closed" in words:
                return words, time.monotonic() - began, number
    raise AssertionError(words)


@pytest.mark.parametrize(
    ("name", "method"), [("a request that comes slowly", "GetStatus"), ("a stream that comes slowly", "PushPull")]
)
def test_call_that_comes_slowly_reaches_its_method_and_is_ended(impatient: Server, name: str, method: str) -> None:
    heard = call_all(impatient.address)
    before = begun(impatient, method)
    words, seconds, pieces = slowly(impatient, name, heard)
    assert ACCEPTED in words
    assert "status 1" in words, "the server cancels it"
    assert seconds > FAILURE_SECONDS
    assert pieces > 1
    assert begun(impatient, method) == before + 1


def test_call_that_is_slow_from_its_first_byte_never_becomes_http2(impatient: Server) -> None:
    words, seconds, pieces = slowly(impatient, "a call that is slow from its first byte", call_all(impatient.address))
    assert words.endswith("closed")
    assert ACCEPTED not in words
    assert seconds > IDLE_SECONDS
    assert pieces < len(PREFACE)


def test_window_of_0_keeps_an_answer_back(server: Server) -> None:
    pieces = SLOWLY["a window of 0"](b"")
    with connect(server) as peer:
        peer.sendall(next(pieces) + next(pieces))
        assert set(answer_of(peer, QUIET_SECONDS).split(", ")) == {ACCEPTED, "PING answered"}
        peer.sendall(frame(WINDOW_UPDATE, 0, 1, (1 << 10).to_bytes(4, "big")))
        assert answer_of(peer, QUIET_SECONDS, "status") == "DATA, status 0"
