"""Checkpoints beside a journal: who waits for them, what may follow them, and what becomes of damaged ones."""

import errno
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from ormo_server.core.effects import Effects
from ormo_server.core.errors import NormTooLarge
from ormo_server.core.inputs import Gradient, Input, Push
from ormo_server.core.machine import StateMachine
from ormo_server.core.rules import UpdateRule
from ormo_server.journal.records import log_path
from ormo_server.service.server import Server
from ormo_server.store import StoreError
from service.crashing import JOURNALED, crashing, everything, trained
from service.wire import SMALL, Refused, WireWorker, connected, payload, settings


def checkpoint_under_way(server: Server, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Thread, threading.Event]:
    """A thread that has copied the state and goes on to write it when the event is set."""
    writing, go_on = threading.Event(), threading.Event()
    real = server.host.files.store.write

    def slowly(checkpoint: Any) -> Path:
        writing.set()
        assert go_on.wait(30)
        return real(checkpoint)

    monkeypatch.setattr(server.host.files.store, "write", slowly)
    thread = threading.Thread(target=server.host.checkpoint)
    thread.start()
    assert writing.wait(10)
    return thread, go_on


def test_workers_go_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the copy of the state is made under the lock."""
    with crashing(tmp_path) as server, connected(server) as stub:
        anna = trained(server)[0]
        anna.stub = stub
        thread, go_on = checkpoint_under_way(server, monkeypatch)
        for number in range(7, 12):
            assert anna.push(payload(SMALL, 1.0)).iteration.number == number
            anna.pull()
        go_on.set()
        thread.join(10)
        assert server.host.files.last_checkpoint is not None
        assert server.host.files.last_checkpoint.iteration == 6
        before = everything(server)
    with crashing(tmp_path) as again:
        assert everything(again) == before


def test_a_server_that_ends_waits_for_its_checkpoint_and_writes_none_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would write it into the next server's files."""
    with crashing(tmp_path) as server:
        trained(server)
        thread, go_on = checkpoint_under_way(server, monkeypatch)
        ending = threading.Thread(target=server.close)
        ending.start()
        with pytest.raises(StoreError, match="is in use by another program"):
            Server(settings(tmp_path, **JOURNALED))
        go_on.set()
        thread.join(10)
        ending.join(10)
        assert not server.host.checkpoint(anew=True)
    with crashing(tmp_path) as again:
        assert again.host.engine.iteration()[1] == 6


def test_after_a_drain_no_checkpoint_voids_what_it_kept(tmp_path: Path) -> None:
    with crashing(tmp_path) as server:
        anna = trained(server)[0]
        assert server.host.checkpoint(drained=True)
        assert server.host.checkpoint(anew=True)  # by an operator, in the last moment
    with crashing(tmp_path, journal=False) as again, connected(again) as stub:
        anna.stub = stub
        assert anna.push(payload(SMALL, 1.0)).iteration.number == 7


# What of them is there at a start


def test_the_journal_of_a_checkpoint_that_is_damaged_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with crashing(tmp_path) as server:
        trained(server)
        server.host.checkpoint()
        trained(server)
        before = everything(server)
    sound = {path.name: path.read_bytes() for path in (tmp_path / "latest").iterdir()}
    newest = (tmp_path / "latest").resolve()
    damage(newest / "state.safetensors")
    journal = content(tmp_path / "journal")
    with crashing(tmp_path) as again:
        assert again.host.engine.iteration()[1] == 0
        assert "inputs-00000001.log of" in caplog.text
        assert "is missing, with at least 32 acknowledged entries" in caplog.text
    (kept,) = tmp_path.glob("journal-damaged-*")
    damaged = kept / newest.name
    assert (damaged / "state.safetensors").exists()
    damaged.rename(tmp_path / "damaged")
    assert content(kept) == journal
    # With the checkpoint from a backup, and the journal that was kept, nothing is lost after all.
    other = tmp_path / "other"
    other.mkdir()
    kept.rename(other / "journal")
    (other / newest.name).mkdir()
    for name, data in sound.items():
        (other / newest.name / name).write_bytes(data)
    with crashing(other) as whole:
        assert everything(whole) == before


@pytest.mark.parametrize("without", [True, False])
def test_no_log_has_the_number_again_that_an_earlier_checkpoint_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, without: bool
) -> None:
    """The journal was removed, and then the newest checkpoint is damaged: the one before names a log that is gone."""
    with crashing(tmp_path) as server:
        trained(server)
    shutil.rmtree(tmp_path / "journal")
    if without:
        with crashing(tmp_path, journal=False):
            pass
    with crashing(tmp_path) as server:
        trained(server)
    newest = (tmp_path / "latest").resolve()
    damage(newest / "state.safetensors")
    if without:
        damage(newest.with_name("checkpoint-00000002-iteration-0") / "state.safetensors")
    with crashing(tmp_path) as again:
        assert again.host.engine.iteration()[1] == 0
        assert "inputs-00000001.log of" in caplog.text
        assert "is missing, with at least 16 acknowledged entries" in caplog.text


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"#")


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_one_before_will_do_as_long_as_the_journal_since_then_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kill right after a checkpoint, and that one is damaged."""
    with crashing(tmp_path) as server:
        trained(server)
        monkeypatch.setattr(server.host.files.journal, "forget_before", lambda log: None)
        assert server.host.checkpoint()
        trained(server)
        before = everything(server)
    damage((tmp_path / "latest").resolve() / "state.safetensors")
    with crashing(tmp_path) as again:
        assert everything(again) == before
        assert "anything newer is lost if no journal has it" in caplog.text
        assert "all tickets are void" not in caplog.text
    assert not list(tmp_path.glob("journal-damaged-*"))


@pytest.mark.parametrize("stray", ["a model that is damaged", "a folder without files"])
def test_what_no_start_needs_sets_nothing_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, stray: str) -> None:
    with crashing(tmp_path) as server:
        trained(server)
        assert server.host.checkpoint()
        trained(server)
        before = everything(server)
    if stray == "a model that is damaged":
        damage((tmp_path / "latest").resolve() / "model.safetensors")
    else:
        (tmp_path / "checkpoint-99999999-iteration-5").mkdir()
    with crashing(tmp_path) as again:
        assert everything(again) == before
        assert "ERROR" not in caplog.text
        assert (tmp_path / "latest").resolve().name == "checkpoint-00000003-iteration-12"
    assert not list(tmp_path.glob("journal-damaged-*"))


@pytest.mark.parametrize("journal", [True, False])
def test_no_new_run_begins_where_a_journal_has_lost_its_checkpoints(tmp_path: Path, journal: bool) -> None:
    with crashing(tmp_path) as server:
        trained(server)
    for path in (*tmp_path.glob("checkpoint-*"), tmp_path / "latest"):
        path.rename(tmp_path / f"moved-{path.name}")
    before = content(tmp_path / "journal")
    with pytest.raises(
        StoreError, match=r"has a journal of at least 16 acknowledged entries, .*3 of 'anna', 3 of 'bert', and the ch"
    ):
        Server(settings(tmp_path, **JOURNALED | {"journal": journal}))
    assert content(tmp_path / "journal") == before


def test_a_journal_whose_checkpoint_is_missing_is_kept_where_an_older_run_had_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with crashing(tmp_path, journal=False) as server:
        trained(server)
        assert server.drain()
    first = (tmp_path / "latest").resolve()
    with crashing(tmp_path) as server:
        anna = trained(server)[0]
    for path in tmp_path.glob("checkpoint-*"):
        if path.name > first.name:
            path.rename(tmp_path / f"moved-{path.name}")
    (tmp_path / "latest").unlink()
    before = content(tmp_path / "journal")
    with crashing(tmp_path) as again, connected(again) as stub:
        assert again.host.engine.iteration()[1] == 6
        assert "follows a checkpoint that is missing; lost: at least 16 acknowledged entries" in caplog.text
        anna.stub = stub
        with pytest.raises(Refused):
            anna.push(payload(SMALL, 1.0))
    (kept,) = tmp_path.glob("journal-damaged-*")
    assert content(kept) == before


def test_a_journal_that_a_run_without_one_could_not_remove_is_known_to_be_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with crashing(tmp_path) as server:
        trained(server)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", _refuse)
        with crashing(tmp_path, journal=False) as without:
            trained(without)
            assert without.host.checkpoint()
            before = everything(without)
    assert list((tmp_path / "journal").iterdir())
    caplog.clear()
    with crashing(tmp_path, journal=False) as again:
        assert everything(again)[1] == before[1]
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
        assert not (tmp_path / "journal").exists()


def _refuse(path: Path, *_: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_lines_that_stand_there_twice_are_left_out_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with crashing(tmp_path) as server:
        anna = trained(server)[0]
        before = everything(server)
    log = log_path(tmp_path / "journal", 1)
    log.write_bytes(log.read_bytes() + b"".join(log.read_bytes().splitlines(keepends=True)[-2:]))
    with crashing(tmp_path) as again, connected(again) as stub:
        assert everything(again) == before
        anna.stub = stub
        assert not anna.push(payload(SMALL, 1.0)).refusal
        assert "appear a second time after its end: everything acknowledged is before them" in caplog.text
        assert "ERROR" not in caplog.text
    assert len(list(tmp_path.glob("journal-damaged-*"))) == 1


@pytest.mark.parametrize("links", [True, False])
def test_what_is_damaged_is_kept_before_a_checkpoint_makes_it_needless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, links: bool
) -> None:
    """A kill right after that checkpoint: the next start removes the journal before, and knows nothing of damage."""
    before = damaged_journal(tmp_path)
    with monkeypatch.context() as patched:
        if not links:
            patched.setattr("os.link", _refuse)
        patched.setattr("ormo_server.service.files.RunFiles.forget_older_journal", _killed)
        with pytest.raises(KeyboardInterrupt):
            Server(settings(tmp_path, **JOURNALED))
    caplog.clear()
    with crashing(tmp_path):
        assert "ERROR" not in caplog.text
    (kept,) = tmp_path.glob("journal-damaged-*")
    assert content(kept) == before


def damaged_journal(directory: Path) -> dict[str, bytes]:
    with crashing(directory) as server:
        trained(server)
    path = log_path(directory / "journal", 1)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], b"#" + lines[5][1:], *lines[6:]]))
    return content(directory / "journal")


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_cant_be_kept_is_not_removed_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = damaged_journal(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("os.link", _refuse)
        patched.setattr("shutil.copyfile", _no_room)
        with pytest.raises(StoreError, match=r"the damaged journal can't be kept in .*: make room there"):
            Server(settings(tmp_path, **JOURNALED))
    assert content(tmp_path / "journal") == before
    with crashing(tmp_path):
        (kept,) = tmp_path.glob("journal-damaged-*")
        assert content(kept) == before


def _no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_start_that_fails_keeps_no_copies_and_says_that_something_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged_journal(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("ormo_server.store.checkpoints.write_files", _no_room)
        with pytest.raises(StoreError, match="Nothing more is lost"):
            Server(settings(tmp_path, **JOURNALED))
    assert not list(tmp_path.glob("journal-damaged-*"))


# A model that has diverged

HUGE: dict[str, Any] = {"method": "asgd", "momentum": 0.0, "learning_rate": 1.0}


def diverged(directory: Path) -> WireWorker:
    """As servers of before let it: the third gradient left no room, the fourth made the parameters infinite."""
    with crashing(directory, **HUGE) as server, connected(server) as stub:
        anna, bad = (WireWorker(stub, name, start=1.0) for name in ("anna", "bad"))
        anna.join()
        bad.join()
        huge = payload(SMALL, 0.0)
        huge.parameters.fill_(3e38)
        for worker, gradient in (
            (anna, payload(SMALL, 1.0)),
            (anna, payload(SMALL, 1.0)),
            (bad, huge),
            (bad, huge),
            (anna, payload(SMALL, 1.0)),
        ):
            worker.pull()
            with server.host.engine.inspect() as machine:
                worker.request += 1
                journal, ticket = server.host.engine._journal, worker.ticket
                assert ticket is not None
                assert journal is not None
                who = worker.name, worker.incarnation, 0, worker.request
                given = Push(server.host.clock(), *who, ticket.number, ticket.epoch)
                stored = journal.store(journal.begin(gradient))
                journal.append(given, machine.step(given, Gradient(gradient.parameters)).redeemed, stored)
        server.host.engine.wait_durable()
        anna.pull()
        assert not server.host.checkpoint()
        return anna


def test_a_state_that_is_not_finite_is_undone_up_to_the_gradient_that_made_it_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    anna = diverged(tmp_path)
    before = content(tmp_path / "journal")
    with crashing(tmp_path, **HUGE) as again, connected(again) as stub:
        assert again.host.engine.iteration()[1] == 2
        assert "the gradient of worker 'bad', led to NaN or infinite values" in caplog.text
        assert "continues from before it, at iteration 2" in caplog.text
        anna.stub = stub
        with pytest.raises(Refused, match="TICKET_UNKNOWN"):
            anna.push(payload(SMALL, 1.0))
        anna.pull()
        assert anna.push(payload(SMALL, 1.0)).iteration.number == 3
        after = everything(again)
    (kept,) = tmp_path.glob("journal-damaged-*")
    assert content(kept) == before
    with crashing(tmp_path, **HUGE) as whole:
        assert everything(whole) == after


def test_a_gradient_that_would_be_refused_today_is_where_a_replay_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    diverged(tmp_path)
    real = StateMachine.step

    def careful(self: StateMachine, given: Input, gradient: Gradient | None = None) -> Effects:
        if gradient is not None and gradient.values.max() > 1e38:
            raise NormTooLarge("too large", worker="bad")
        return real(self, given, gradient)

    monkeypatch.setattr(StateMachine, "step", careful)
    with crashing(tmp_path, **HUGE) as again:
        assert again.host.engine.iteration()[1] == 2
        assert "the gradient of worker 'bad', led to NaN or infinite values" in caplog.text


@pytest.mark.parametrize("kept", ["in the journal", "in the checkpoint"])
def test_a_finite_state_that_any_gradient_may_make_infinite_is_undone_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kept: str
) -> None:
    """Else the next ordinary gradient ends the server, and so it does after each start."""
    changes = HUGE | {"method": "asgdm", "momentum": 0.9}
    with crashing(tmp_path, **changes) as server, connected(server) as stub, monkeypatch.context() as earlier:
        earlier.setattr(UpdateRule, "stays_finite", lambda *_: True)
        anna = WireWorker(stub, "anna", start=1.0)
        anna.join()
        anna.pull()
        anna.push(payload(SMALL, 1.0))
        assert server.host.checkpoint()
        anna.pull()
        anna.push(payload(SMALL, 3e37))
        if kept == "in the checkpoint":
            assert server.host.checkpoint()
    with crashing(tmp_path, **changes) as again, connected(again) as stub:
        assert again.host.engine.iteration()[1] == 1
        assert kept == "in the journal" or "has values so large that any gradient may make them infinite" in caplog.text
        anna.stub = stub
        for number in range(2, 20):
            anna.pull()
            assert anna.push(payload(SMALL, 1.0)).iteration.number == number
        after = everything(again)
    caplog.clear()
    with crashing(tmp_path, **changes) as whole:
        assert everything(whole) == after
        assert "ERROR" not in caplog.text
    assert len(list(tmp_path.glob("journal-damaged-*"))) == 1


@pytest.mark.parametrize("kept", ["in the journal", "in the checkpoint"])
def test_a_learning_rate_that_no_operator_may_set_today_is_where_a_replay_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kept: str
) -> None:
    with crashing(tmp_path, **HUGE) as server, connected(server) as stub, monkeypatch.context() as earlier:
        earlier.setattr("ormo_server.core.step_size.HIGHEST", 1e300)
        earlier.setattr(UpdateRule, "stays_finite", lambda *_: True)
        anna = WireWorker(stub, "anna", start=1.0)
        anna.join()
        anna.pull()
        anna.push(payload(SMALL, 1.0))
        server.host.engine.set_learning_rate(1e30)
        if kept == "in the checkpoint":
            assert server.host.checkpoint()
        anna.pull()
        anna.push(payload(SMALL, 0.0))
    with crashing(tmp_path, **HUGE) as again, connected(again) as stub:
        assert again.host.engine.iteration()[1] == 1
        culprit = "the learning rate 1e+30" if kept == "in the journal" else "the gradient of worker 'anna'"
        assert f"{culprit}, led to NaN or infinite values, or might have" in caplog.text
        anna.stub = stub
        anna.pull()
        assert anna.push(payload(SMALL, 1.0)).learning_rate == 1.0
    assert len(list(tmp_path.glob("journal-damaged-*"))) == 1
