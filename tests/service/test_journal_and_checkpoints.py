"""Checkpoints beside a journal: who waits for them, what may follow them, and what becomes of damaged ones."""

import threading
from pathlib import Path
from typing import Any

import pytest

from ormo_server.core.rules import UpdateRule
from ormo_server.service.server import Server
from ormo_server.store import StoreError
from service.crashing import JOURNALED, crashing, everything, trained
from service.wire import SMALL, WireWorker, connected, payload, settings


def checkpoint_under_way(server: Server, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Thread, threading.Event]:
    """A thread that has copied the state and goes on to write it when the event is set."""
    writing, go_on = threading.Event(), threading.Event()
    real = server.host._store.write

    def slowly(checkpoint: Any) -> Path:
        writing.set()
        assert go_on.wait(30)
        return real(checkpoint)

    monkeypatch.setattr(server.host._store, "write", slowly)
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
        assert server.host.last_checkpoint is not None
        assert server.host.last_checkpoint.iteration == 6
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
        assert again.host.engine.position()[1] == 6


def test_after_a_drain_no_checkpoint_voids_what_it_kept(tmp_path: Path) -> None:
    with crashing(tmp_path) as server:
        anna = trained(server)[0]
        assert server.host.checkpoint(drained=True)
        assert server.host.checkpoint(anew=True)  # by an operator, in the last moment
    with crashing(tmp_path, journal=False) as again, connected(again) as stub:
        anna.stub = stub
        assert anna.push(payload(SMALL, 1.0)).iteration.number == 7


def test_the_journal_of_a_checkpoint_that_is_damaged_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with crashing(tmp_path) as server:
        trained(server)
        server.host.checkpoint()
        trained(server)
        before = everything(server)
    sound = {path.name: path.read_bytes() for path in (tmp_path / "latest").iterdir()}
    newest = (tmp_path / "latest").resolve()
    (newest / "model.safetensors").write_bytes(sound["model.safetensors"][:-1] + b"#")
    journal = {path.name: path.read_bytes() for path in (tmp_path / "journal").iterdir()}
    with crashing(tmp_path) as again:
        assert again.host.engine.position()[1] == 0
        assert "begins with is not whole" in caplog.text
    (kept,) = tmp_path.glob("journal-damaged-*")
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == journal
    # With the checkpoint from a backup, and the journal that was kept, nothing is lost after all.
    other = tmp_path / "other"
    other.mkdir()
    kept.rename(other / "journal")
    (other / newest.name).mkdir()
    for name, content in sound.items():
        (other / newest.name / name).write_bytes(content)
    with crashing(other) as whole:
        assert everything(whole) == before


def test_a_model_that_has_diverged_replaces_no_checkpoint_and_the_way_back_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UpdateRule, "stays_finite", lambda *_: True)  # as an earlier version had it
    huge = {"method": "asgd", "momentum": 0.0, "learning_rate": 1.0}
    with crashing(tmp_path, **huge) as server, connected(server) as stub:
        anna = WireWorker(stub, "anna", start=1.0)
        anna.join()
        anna.pull()
        anna.push(payload(SMALL, 1.0))
        assert server.host.checkpoint()
        large = payload(SMALL, 0.0)
        large.parameters.fill_(3e38)
        for _ in range(2):
            anna.pull()
            anna.push(large)
        assert not server.host.checkpoint()
    with pytest.raises(StoreError, match=r"NaN or infinite.*/journal: to go on from the checkpoint alone, move that"):
        Server(settings(tmp_path, **JOURNALED | huge))
    (tmp_path / "journal").rename(tmp_path / "moved")
    with crashing(tmp_path, **huge) as again:
        assert again.host.engine.position()[1] == 1
