"""A directory that is taken away from a running server: nobody is told of what would not be found again."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ormo_server.journal import writer
from ormo_server.service.server import Server
from ormo_server.store import DirectoryLock
from service.crashing import JOURNALED, crashing, everything, trained
from service.wire import SMALL, Refused, connected, eventually, payload, settings

Loss = Callable[[Path], object]


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def move(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def replace(path: Path) -> None:
    shutil.copytree(path, path.with_name("copy"), symlinks=True)
    move(path)
    path.with_name("copy").rename(path)


def remove_file(pattern: str) -> Loss:
    return lambda run: max(run.glob(pattern)).unlink()


LOSSES: dict[str, Loss] = {
    "the directory is removed": remove,
    "the directory is moved": move,
    "the directory is replaced by a copy": replace,
    "its lock is removed": remove_file(".lock"),
}
LOSSES_OF_JOURNAL: dict[str, Loss] = {
    "the journal is removed": lambda run: remove(run / "journal"),
    "the journal is moved": lambda run: move(run / "journal"),
    "the journal is replaced by a copy": lambda run: replace(run / "journal"),
    "the log is removed": remove_file("journal/*.log"),
    "the file of gradients is removed": remove_file("journal/*.bin"),
}
CASES = [(name, True) for name in LOSSES | LOSSES_OF_JOURNAL] + [(name, False) for name in LOSSES]


@pytest.mark.parametrize(("name", "journal"), CASES)
def test_the_next_answer_is_refused_and_the_server_stops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str, journal: bool
) -> None:
    monkeypatch.setitem(writer.IN_LINE_BYTES, "always", 0)  # small gradients, too, go into a file
    run = tmp_path / "run"
    with crashing(run, journal=journal) as server:
        anna = trained(server)[0]
        with connected(server) as stub:
            anna.stub = stub
            (LOSSES | LOSSES_OF_JOURNAL)[name](run)
            there = run.exists()
            with pytest.raises(Refused, match=r"th(is|e) server stops"):
                anna.push(payload(SMALL, 1.0))
        assert server.host.engine.broken.is_set()
        assert "removed, moved or replaced" in caplog.text + server.host.engine.why_broken
        assert not server.host.checkpoint(anew=True)
        assert run.exists() == there, "nothing is written to a place that is not its own"


def test_it_is_noticed_while_nobody_says_anything(tmp_path: Path) -> None:
    with crashing(tmp_path / "run", journal=False, failure_timeout_seconds=1.0) as server:
        trained(server)
        shutil.rmtree(tmp_path / "run")
        eventually(server.host.engine.broken.is_set)


def test_a_model_is_not_taken_to_a_directory_that_has_gone(tmp_path: Path) -> None:
    with crashing(tmp_path / "run") as server:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(Refused, match="removed, moved or replaced"):
            trained(server)
        assert not (tmp_path / "run").exists()


def test_what_another_server_finds_was_told_and_what_it_does_not_find_was_not(tmp_path: Path) -> None:
    """The lock is removed, and a second server starts while the first goes on."""
    with crashing(tmp_path) as server:
        anna = trained(server)[0]
        before = everything(server)
        (tmp_path / ".lock").unlink()
        with crashing(tmp_path) as second, connected(server) as stub:
            assert everything(second) == before
            anna.stub = stub
            with pytest.raises(Refused, match=r"th(is|e) server stops"):
                anna.push(payload(SMALL, 1.0))
            assert everything(second) == before


def test_a_lock_is_held_until_it_is_released(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    assert lock.holds
    (tmp_path / ".lock").rename(tmp_path / "moved")
    assert not lock.holds
    (tmp_path / ".lock").touch()
    assert not lock.holds
    lock.release()


def test_a_directory_behind_a_link_is_as_good_as_any(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    with crashing(tmp_path / "run") as server:
        trained(server)
        before = everything(server)
    with crashing(tmp_path / "run") as again:
        assert everything(again) == before
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    Server(settings(tmp_path / "run", **JOURNALED)).close()
