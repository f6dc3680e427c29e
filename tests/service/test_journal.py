"""A server that dies at any moment and comes back: nothing that was acknowledged is lost, nothing counts twice."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from prometheus_client import generate_latest

from ormo_protos.manifest import BFLOAT16, FLOAT32
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.core.method import PRESETS
from ormo_server.journal import is_journal, writer
from ormo_server.journal.records import log_path
from ormo_server.service.server import Server
from ormo_server.store import StoreError
from service.crashing import JOURNALED, crashing, everything, everything_hashed, trained
from service.wire import (
    LARGE,
    SMALL,
    Refused,
    WireWorker,
    connected,
    eventually,
    payload,
    settings,
    state_of,
    tensor_chunks,
)
from store.building import reseal


def metric(server: Server, line: str) -> float:
    found = [
        row for row in generate_latest(server.metrics.registry).decode().splitlines() if row.startswith(f"{line} ")
    ]
    return float(found[0].split()[-1])


@pytest.mark.parametrize("method", [name for name, method in PRESETS.items() if method.scheduler == "asynchronous"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_all_of_the_state_comes_back_to_the_bit(tmp_path: Path, method: str, dtype: int) -> None:
    with crashing(tmp_path, method=method) as server:
        trained(server, dtype=dtype)
        before = everything(server)
    with crashing(tmp_path, method=method) as again:
        assert everything(again) == before
        assert again.host.engine.iteration()[1] == 6


def test_a_round_comes_back_half_done(tmp_path: Path) -> None:
    with crashing(tmp_path, method="ssgd", min_workers=2) as server:
        with connected(server) as stub:
            anna, bert = WireWorker(stub, "anna", start=1.0), WireWorker(stub, "bert", incarnation=2)
            anna.join()
            bert.join()
            stream = anna.open()
            stream.begin(None)
            bert.pull()
            stream.delivery()
            bert.push(payload(SMALL, 1.0))
        before = everything(server)
    with crashing(tmp_path, method="ssgd", min_workers=2) as again, connected(again) as stub:
        assert everything(again) == before
        anna.stub = bert.stub = stub
        assert anna.push(payload(SMALL, 3.0)).iteration.number == 2
        with again.host.engine.inspect() as machine:
            assert machine.state.params.unique().tolist() == [1.0 - 1.0 - 3.0]  # both of the round


def test_again_and_again(tmp_path: Path) -> None:
    for count in range(1, 4):
        with crashing(tmp_path) as server:
            trained(server)
            before = everything(server)
        with crashing(tmp_path) as again:
            assert everything(again) == before
            assert again.host.engine.iteration()[1] == 6 * count


def test_a_ticket_in_flight_stays_good(tmp_path: Path) -> None:
    with crashing(tmp_path) as server:
        anna, _ = trained(server)
    with crashing(tmp_path) as again, connected(again) as stub:
        anna.stub = stub
        result = anna.push(payload(SMALL, 1.0))
        assert (result.refusal, result.iteration.number, result.delay) == ("", 7, 1)


def test_a_result_that_was_lost_is_repeated_and_counts_once(tmp_path: Path) -> None:
    with crashing(tmp_path) as server:
        _, bert = trained(server)
        with connected(server) as stub:
            bert.stub = stub
            bert.push(payload(SMALL, 1.0))
        before = everything(server)
    with crashing(tmp_path) as again, connected(again) as stub:
        bert.stub, bert.request = stub, bert.request - 1
        result = bert.push(payload(SMALL, 1.0))
        assert result.repeated
        assert result.iteration.number == 7
        assert everything(again) == before
        assert metric(again, 'ormo_pushes_total{outcome="repeated",reason=""}') == 1


def test_a_used_ticket_stays_used(tmp_path: Path) -> None:
    with crashing(tmp_path) as server:
        _, bert = trained(server)
        with connected(server) as stub:
            bert.stub = stub
            bert.push(payload(SMALL, 1.0))
    with crashing(tmp_path) as again, connected(again) as stub:
        bert.stub = stub
        before = state_of(again)
        with pytest.raises(Refused, match="TICKET_UNKNOWN"):
            bert.push(payload(SMALL, 1.0))
        assert state_of(again) == before


def test_tickets_of_all_lives_of_a_server_differ(tmp_path: Path) -> None:
    seen = set()
    for _ in range(3):
        with crashing(tmp_path) as server:
            for worker in trained(server):
                assert worker.ticket is not None
                seen.add((worker.ticket.epoch, worker.ticket.number))
    assert len(seen) == 6


def test_without_a_journal_what_came_after_the_checkpoint_is_lost(tmp_path: Path) -> None:
    with crashing(tmp_path, journal=False) as server:
        anna, _ = trained(server)
    assert not (tmp_path / "journal").exists()
    with crashing(tmp_path, journal=False) as again, connected(again) as stub:
        assert again.host.engine.iteration()[1] == 0
        anna.stub = stub
        anna.join()
        with pytest.raises(Refused, match="TICKET_UNKNOWN"):
            anna.push(payload(SMALL, 1.0))


def test_settings_may_change_between_lives(tmp_path: Path) -> None:
    with crashing(tmp_path, learning_rate=0.5, schedule="milestones", milestones=(2, 4)) as server:
        trained(server)
        before = everything(server)
    with crashing(tmp_path, learning_rate=0.25, max_workers=3) as again:
        assert everything(again) == before


def test_a_journal_may_be_begun_with_any_run_and_ended(tmp_path: Path) -> None:
    with crashing(tmp_path, journal=False) as server:
        trained(server)
        assert server.host.checkpoint()
    with crashing(tmp_path) as journaled:
        assert journaled.host.engine.iteration()[1] == 6
        trained(journaled)
        before = everything(journaled)
    with crashing(tmp_path, journal=False) as without:
        assert everything(without) == before
        assert not (tmp_path / "journal").exists()
        trained(without)
    with crashing(tmp_path) as again:
        assert again.host.engine.iteration()[1] == 12


def test_a_drain_leaves_an_empty_journal(tmp_path: Path) -> None:
    with crashing(tmp_path) as server:
        anna, _ = trained(server)
        before = everything(server)
        assert server.drain()
        assert not is_journal(tmp_path / "journal")
    with crashing(tmp_path) as again, connected(again) as stub:
        assert everything(again) == before
        anna.stub = stub
        assert not anna.push(payload(SMALL, 1.0)).refusal


def test_a_trace_is_written_beside_it(tmp_path: Path) -> None:
    with crashing(tmp_path / "run", trace=tmp_path / "trace.jsonl") as server:
        trained(server)
        before = everything(server)
    assert (tmp_path / "trace.jsonl").read_text().count('"pushed"') == 6
    with crashing(tmp_path / "run") as again:
        assert everything(again) == before


def test_a_checkpoint_begins_the_journal_anew(tmp_path: Path) -> None:
    with crashing(tmp_path) as server:
        trained(server)
        assert metric(server, "ormo_journal_size_bytes") > 6 * 36
        assert server.host.checkpoint()
        assert metric(server, "ormo_journal_size_bytes") == log_path(tmp_path / "journal", 2).stat().st_size
        assert metric(server, "ormo_journal_commit_seconds_count") > 6
        trained(server)
        before = everything(server)
    with crashing(tmp_path) as again:
        assert everything(again) == before


def test_a_checkpoint_is_written_when_the_journal_reaches_its_bound(tmp_path: Path) -> None:
    with crashing(tmp_path, journal_max_bytes=40_000) as server:
        for _ in range(4):
            trained(server, rounds=8)
        assert server.host.files.last_checkpoint is not None
        eventually(lambda: server.host.files.last_checkpoint.iteration > 0)  # type: ignore[union-attr]
        eventually(lambda: server.host.files.journal.size_bytes <= 40_000)
        before = everything(server)
    with crashing(tmp_path) as again:
        assert everything(again) == before


def test_a_checkpoint_that_fails_takes_nothing_from_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with crashing(tmp_path) as server:
        trained(server)
        with monkeypatch.context() as patched:
            patched.setattr(server.host.files.store, "write", _no_room)
            assert not server.host.checkpoint()
        trained(server)
        before = everything(server)
    with crashing(tmp_path) as again:
        assert everything(again) == before


def _no_room(*_: object) -> None:
    raise StoreError("no room")


# Damage


def test_damage_is_told_and_what_is_whole_is_used_and_the_rest_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with crashing(tmp_path) as server:
        anna, _ = trained(server)
    path = log_path(tmp_path / "journal", 1)
    lines = path.read_bytes().splitlines(keepends=True)
    pushes = [at for at, line in enumerate(lines) if b'"pushed"' in line]
    lines[pushes[2]] = b"#" + lines[pushes[2]][1:]
    path.write_bytes(b"".join(lines))
    with crashing(tmp_path) as again, connected(again) as stub:
        assert again.host.engine.iteration()[1] == 2
        assert "the journal can be used in part only, and all tickets are void: line 9 of" in caplog.text
        assert "at least 8 acknowledged entries" in caplog.text
        kept = next(tmp_path.glob("journal-damaged-*"))
        assert (kept / path.name).read_bytes() == b"".join(lines)
        anna.stub = stub
        with pytest.raises(Refused, match="TICKET_UNKNOWN"):  # as after any loss, all tickets are void
            anna.push(payload(SMALL, 1.0))


def test_a_state_that_cant_be_written_anew_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with crashing(tmp_path) as server:
        trained(server)
        before = everything(server)
    with monkeypatch.context() as patched:
        patched.setattr("ormo_server.store.checkpoints.CheckpointStore.write", _no_room)
        with pytest.raises(StoreError, match="no room"):
            Server(settings(tmp_path, **JOURNALED))
    with crashing(tmp_path) as again:
        assert everything(again) == before


def test_a_result_that_cant_be_had_again_stops_the_start(tmp_path: Path) -> None:
    with crashing(tmp_path) as server:
        trained(server)
    _rewrite_settings(tmp_path, momentum=0.25, learning_rate=0.125)
    with pytest.raises(StoreError, match=r"can't be repeated as it was.*alone, without what the journal says, move"):
        Server(settings(tmp_path, **JOURNALED))


def _rewrite_settings(directory: Path, **changes: Any) -> None:
    path = directory / "latest" / "checkpoint.json"
    document = json.loads(path.read_text())
    document["settings"] |= changes
    path.write_text(json.dumps(document))
    reseal(path.parent)


# The disk


class Fault:
    """Makes writes to the journal's files fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        self.suffix = ""
        self.held: threading.Event | None = None
        self.waiting = threading.Event()
        real, sync = os.pwrite, os.fdatasync

        def pwrite(descriptor: int, data: Any, offset: int) -> int:
            if self.number and _name(descriptor).endswith(self.suffix):
                raise OSError(self.number, os.strerror(self.number))
            return real(descriptor, data, offset)

        def fdatasync(descriptor: int) -> None:
            if self.held is not None and _name(descriptor).endswith(".log"):
                self.waiting.set()
                assert self.held.wait(30)
            sync(descriptor)

        monkeypatch.setattr(os, "pwrite", pwrite)
        monkeypatch.setattr(os, "fdatasync", fdatasync)


def _name(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    return Fault(monkeypatch)


# Of 12 MB: it is written while it arrives, in pieces.


@pytest.mark.parametrize("bound", [None, 1.0], ids=["as it came", "clipped"])
def test_a_large_gradient_comes_back_to_the_bit(tmp_path: Path, bound: float | None) -> None:
    with crashing(tmp_path, max_gradient_norm=bound) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE)
        worker.join()
        gradient = payload(LARGE, 0.0)
        gradient.parameters.copy_(torch.arange(gradient.parameters.numel()) % 1000 - 500)
        for _ in range(2):
            worker.pull()
            worker.push(gradient)
        before = everything_hashed(server)
    with crashing(tmp_path, max_gradient_norm=bound) as again:
        assert again.host.engine.iteration()[1] == 2
        assert everything_hashed(again) == before


@pytest.mark.parametrize("end", ["cut", "not finite"])
def test_of_a_large_gradient_that_does_not_count_the_journal_keeps_nothing(tmp_path: Path, end: str) -> None:
    with crashing(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE)
        worker.join()
        worker.pull()
        journal, gradient = server.host.engine._journal, payload(LARGE, 1.0)
        assert journal is not None
        before = journal.size_bytes
        if end == "cut":
            stream = worker.open()
            stream.send(worker.exchange(gradient))
            for chunk in list(tensor_chunks(gradient))[:3]:
                stream.send(pb.PushPullRequest(chunk=chunk))
            eventually(lambda: journal.size_bytes > before)
            stream.drop()
        else:
            gradient.parameters[-1] = float("nan")
            with pytest.raises(Refused, match="NON_FINITE"):
                worker.push(gradient)
        eventually(lambda: journal.size_bytes == before)
        worker.pull()
        assert worker.push(payload(LARGE, 1.0)).iteration.number == 1


def test_a_full_disk_refuses_gradients_until_there_is_room(
    tmp_path: Path, fault: Fault, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(writer.IN_LINE_BYTES, "always", 0)
    with crashing(tmp_path) as server:
        anna, _ = trained(server)
        before = state_of(server)
        with connected(server) as stub:
            anna.stub = stub
            fault.number, fault.suffix = errno.ENOSPC, ".bin"
            with pytest.raises(Refused, match="mend the disk; workers try again by themselves") as refused:
                anna.push(payload(SMALL, 1.0))
            assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
            assert refused.value.retry_seconds == 2.0
            assert state_of(server) == before
            anna.request -= 1
            with pytest.raises(Refused, match="DISK_FULL"):
                anna.push(payload(SMALL, 1.0))
            assert caplog.text.count("can't take more (No space left on device)") == 1, "one line for many refusals"
            fault.number, anna.request = 0, anna.request - 1
            result = anna.push(payload(SMALL, 1.0))
            assert (result.iteration.number, result.repeated) == (7, False)


def test_a_full_disk_keeps_the_result_back_and_a_retry_has_it(tmp_path: Path, fault: Fault) -> None:
    with crashing(tmp_path) as server:
        anna, _ = trained(server)
        with connected(server) as stub:
            anna.stub = stub
            fault.number, fault.suffix = errno.ENOSPC, ".log"
            with pytest.raises(Refused, match="DISK_FULL"):
                anna.push(payload(SMALL, 1.0))
            fault.number, anna.request = 0, anna.request - 1
            result = anna.push(payload(SMALL, 1.0))
            assert (result.iteration.number, result.repeated) == (7, True)
        before = everything(server)
    with crashing(tmp_path) as again:
        assert everything(again) == before


def test_a_result_nobody_heard_of_may_go_with_a_crash_and_counts_once(tmp_path: Path, fault: Fault) -> None:
    with crashing(tmp_path) as server:
        anna, _ = trained(server)
        with connected(server) as stub:
            anna.stub = stub
            fault.number, fault.suffix = errno.ENOSPC, ".log"
            with pytest.raises(Refused, match="DISK_FULL"):
                anna.push(payload(SMALL, 1.0))
        assert server.host.engine.iteration()[1] == 7
    fault.number, anna.request = 0, anna.request - 1
    with crashing(tmp_path) as again, connected(again) as stub:
        assert again.host.engine.iteration()[1] == 6
        anna.stub = stub
        result = anna.push(payload(SMALL, 1.0))
        assert (result.iteration.number, result.repeated) == (7, False)


def test_a_broken_disk_stops_the_server(tmp_path: Path, fault: Fault) -> None:
    with crashing(tmp_path) as server:
        anna, _ = trained(server)
        with connected(server) as stub:
            anna.stub = stub
            fault.number, fault.suffix = errno.EIO, ".log"
            with pytest.raises(Refused, match="this server stops"):
                anna.push(payload(SMALL, 1.0))
            assert server.host.engine.broken.is_set()
            fault.number = 0
            with pytest.raises(Refused, match=r"NOT_READY.*the server stops, try again later"):
                anna.pull()
            assert not server.host.checkpoint()


@pytest.mark.parametrize("way", ["push", "exchange", "join", "leave", "return", "rate"])
def test_no_answer_comes_before_it_is_on_the_disk(tmp_path: Path, fault: Fault, way: str) -> None:
    with crashing(tmp_path) as server, connected(server) as stub:
        anna = WireWorker(stub, "anna", start=1.0)
        anna.join()
        anna.pull()
        fault.held = threading.Event()
        answered = threading.Event()

        def act() -> None:
            if way == "push":
                anna.push(payload(SMALL, 1.0))
            elif way == "exchange":
                stream = anna.open()
                stream.begin(payload(SMALL, 1.0))
                stream.result()
            elif way == "join":
                WireWorker(stub, "bert").join()
            elif way == "return":
                stub.Heartbeat(pb.HeartbeatRequest(worker="anna", incarnation=1, returned=[anna.ticket]))
            elif way == "rate":
                stub.Control(pb.ControlRequest(set_learning_rate=pb.SetLearningRate(learning_rate=0.5)))
            else:
                stub.Leave(_leave("anna"))
            answered.set()

        thread = threading.Thread(target=act)
        thread.start()
        assert fault.waiting.wait(10)
        assert not answered.wait(0.2)
        fault.held.set()
        thread.join(10)
        assert answered.is_set()


def _leave(worker: str) -> Any:
    return pb.LeaveRequest(worker=worker, incarnation=1)


def test_a_slow_disk_keeps_nobody_else_from_the_lock(tmp_path: Path, fault: Fault) -> None:
    with crashing(tmp_path) as server, connected(server) as stub:
        anna = WireWorker(stub, "anna", start=1.0)
        anna.join()
        anna.pull()
        fault.held = threading.Event()
        thread = threading.Thread(target=anna.push, args=(payload(SMALL, 1.0),))
        thread.start()
        assert fault.waiting.wait(10)
        assert server.host.engine.view().iteration == 1  # others see, and use, the state meanwhile
        assert stub.Heartbeat(pb.HeartbeatRequest(worker="anna", incarnation=1)).iteration.number == 1
        fault.held.set()
        thread.join(10)


def test_a_ticket_that_anothers_gradient_made_possible_waits_for_that_gradient(tmp_path: Path, fault: Fault) -> None:
    """Two rounds: what bert gets in the second follows from a gradient that must not be lost any more."""
    with crashing(tmp_path, method="ssgdm", min_workers=2) as server, connected(server) as stub:
        anna, bert = (WireWorker(stub, name, start=1.0) for name in ("anna", "bert"))
        anna.join()
        bert.join()
        mine, yours = anna.open(), bert.open()
        for stream in (mine, yours):
            stream.begin(None)
        for stream in (mine, yours):
            stream.delivery()
        yours.begin(payload(SMALL, 1.0))
        yours.result()
        fault.held = threading.Event()
        mine.begin(payload(SMALL, 1.0))
        assert fault.waiting.wait(10)
        heard = threading.Event()
        thread = threading.Thread(target=lambda: (yours.delivery(), heard.set()))
        thread.start()
        assert not heard.wait(0.3)
        fault.held.set()
        thread.join(10)
        assert heard.is_set()


def test_a_reader_gets_no_parameters_that_a_crash_could_undo(tmp_path: Path, fault: Fault) -> None:
    with crashing(tmp_path) as server, connected(server) as stub:
        anna = trained(server)[0]
        anna.stub = stub
        fault.number, fault.suffix = errno.ENOSPC, ".log"
        with pytest.raises(Refused, match="DISK_FULL"):
            anna.push(payload(SMALL, 1.0))
        with pytest.raises(Refused, match="DISK_FULL"):
            WireWorker(stub, "reader").pull(ticket=False)
        fault.number = 0
        assert WireWorker(stub, "reader").pull(ticket=False).iteration.number == 7


def test_nobody_is_told_of_the_end_before_the_last_gradient_is_on_the_disk(tmp_path: Path, fault: Fault) -> None:
    with crashing(tmp_path, stop_after_gradients=7) as server, connected(server) as stub:
        anna, bert = trained(server)
        anna.stub = bert.stub = stub
        fault.number, fault.suffix = errno.ENOSPC, ".log"
        with pytest.raises(Refused, match="DISK_FULL"):
            anna.push(payload(SMALL, 1.0))
        alive = pb.HeartbeatRequest(worker="bert", incarnation=bert.incarnation)
        assert not stub.Heartbeat(alive).finished
        attempts = [
            lambda: bert.push(payload(SMALL, 1.0)),
            bert.pull,
            lambda: WireWorker(stub, "carl").join(),
            lambda: WireWorker(stub, "reader").pull(ticket=False),
        ]
        for attempt in attempts:
            with pytest.raises(Refused, match="DISK_FULL"):
                attempt()
        assert not server.host.engine.finished.is_set()
        fault.number, anna.request = 0, anna.request - 1
        assert anna.push(payload(SMALL, 1.0)).repeated
        assert stub.Heartbeat(alive).finished
    with crashing(tmp_path, stop_after_gradients=7) as again:
        assert again.host.engine.iteration()[1] == 7
        assert again.host.engine.finished.is_set()
