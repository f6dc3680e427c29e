"""Of several servers one writes into a mirror, each into a folder of its own; and what stays of what they wrote."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from mirror.mirrored import SILENCE, Trainer, iterations, metric, trained, until
from ormo_server.mirror import mirroring
from ormo_server.mirror.buckets import BucketError, Folder
from ormo_server.mirror.copies import copies, prune
from ormo_server.mirror.lease import read_record
from ormo_server.service.server import Server
from ormo_server.store import StoreError
from service.wire import connected, served, settings

# More than one writer


def test_a_second_server_is_refused_while_the_first_lives(run: Path, mirror: Path) -> None:
    with served(run, mirror=mirror, failure_timeout_seconds=SILENCE):
        for fresh in (False, True):
            with pytest.raises(StoreError, match="is the mirror of another server: process"):
                Server(settings(run.with_name("other"), mirror=mirror, fresh=fresh))
    assert not list(run.with_name("other").glob("checkpoint-*"))


def test_a_server_that_lost_its_mirror_copies_nothing_more_and_trains_on(
    run: Path, mirror: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with served(run, mirror=mirror, failure_timeout_seconds=SILENCE) as first, connected(first) as stub:
        trainer = Trainer(first, stub).push(1).kept()
        record = read_record(Folder(mirror))
        assert record is not None
        lease, mine = mirror / "lease.json", mirror / record[0].writer
        # As a successor's that has taken it, when this one had been silent for long.
        other = record[0].model_copy(update={"writer": "other", "holder": "h", "continues": (record[0].writer,)})
        lease.write_text(other.model_dump_json())
        until(lambda: "has taken it over" in caplog.text, "it hears of it")
        there = sorted(path.name for path in mine.iterdir())
        trainer.push(1)
        assert first.host.checkpoint()
        assert first.drain()
        assert sorted(path.name for path in mine.iterdir()) == there
        assert lease.read_text() == other.model_dump_json(), "nor does it give back what is not its own"
    assert "until a restart no more checkpoints are copied, and training goes on" in caplog.text
    with pytest.raises(StoreError, match="has gone on with the run of this directory"):
        Server(settings(run, mirror=mirror))


def test_two_runs_take_turns_without_touching_each_others_copies(
    run: Path, mirror: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(run, mirror, 2, 0, drained=True)
    before = iterations(mirror)
    with served(run, mirror=mirror, fresh=True) as server, connected(server) as stub:
        Trainer(server, stub).push(3).kept()
        assert server.drain()
    assert "its copies stay in the folder" not in caplog.text, "it is the same directory's"
    assert sorted(iterations(mirror))[: len(before)] <= sorted([*before, 3])
    shutil.rmtree(run)
    with served(run, mirror=mirror) as server:
        assert server.host.engine.iteration()[1] == 3
    assert 2 in iterations(mirror), "--fresh removes nothing"


# What stays


def test_as_many_copies_stay_as_checkpoints(run: Path, mirror: Path) -> None:
    with served(run, mirror=mirror, checkpoints_kept=2) as server, connected(server) as stub:
        trainer = Trainer(server, stub)
        for _ in range(4):
            trainer.push(1).kept()
        until(lambda: iterations(mirror) == [3, 4], "older ones are removed")
        assert server.drain()
    assert len(list(mirror.glob("*/checkpoint-*"))) == 2, "with their folders"


def test_the_mirror_is_given_back_when_old_copies_are_gone(
    run: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prune_slowly(*arguments: Any) -> tuple[str, ...]:
        time.sleep(0.5)
        return prune(*arguments)

    monkeypatch.setattr(mirroring, "prune", prune_slowly)
    with served(run, mirror=mirror, checkpoints_kept=1) as server, connected(server) as stub:
        Trainer(server, stub).push(1).kept().push(1)
        assert server.drain()
        assert len(list(mirror.glob("*/checkpoint-*"))) == 1


def test_copies_of_the_writers_before_go_once_there_are_enough_newer_ones(run: Path, mirror: Path) -> None:
    trained(run, mirror, 1, 0, drained=True)
    shutil.rmtree(run)
    with served(run, mirror=mirror, checkpoints_kept=2) as server, connected(server) as stub:
        trainer = Trainer(server, stub, incarnation=2)
        for _ in range(3):
            trainer.push(1).kept()
        until(lambda: iterations(mirror) == [3, 4], "older ones are removed")
        until(lambda: (found := read_record(Folder(mirror))) and not found[0].continues, "it stands alone")
    assert len([path for path in mirror.iterdir() if path.is_dir()]) == 1


def test_pruning_leaves_the_copy_that_is_under_way_and_removes_what_others_left(mirror: Path) -> None:
    def put(writer: str, number: int, *, whole: bool) -> None:
        folder = mirror / writer / f"checkpoint-{number:08d}-iteration-{number}"
        folder.mkdir(parents=True)
        for name in ("state.safetensors", *(["SHA256SUMS"] if whole else [])):
            (folder / name).write_text("x")

    for number, whole in enumerate([True, False, True, True, False, True, False], 1):
        put("b" if number > 2 else "a", number, whole=whole)
    put("stranger", 1, whole=True)
    assert prune(Folder(mirror), ("b", "a"), keep=2) == ()
    left = [(copy.writer, copy.serial) for copy in copies(Folder(mirror))]
    assert left == [("b", 4), ("b", 6), ("b", 7), ("stranger", 1)]


def test_a_checkpoint_stays_on_the_disk_while_it_is_copied(
    run: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying may take longer than many checkpoints do; what is copied must not be removed meanwhile."""
    with served(run, mirror=mirror, checkpoints_kept=1) as server, connected(server) as stub:
        trainer = Trainer(server, stub)
        upload, seen = Folder.upload, []

        def slowly(folder: Folder, source: Path, name: str) -> None:
            if not seen:
                seen.append(source)
                for _ in range(3):
                    trainer.push(1)
                    assert server.host.checkpoint()
            upload(folder, source, name)

        trainer.push(1).kept()
        monkeypatch.setattr(Folder, "upload", slowly)
        trainer.push(1)
        assert server.host.checkpoint()
        until(lambda: metric(server, "iteration") == 5, "that one, and then the newest")
        assert metric(server, "failures_total") == 0
        assert "iteration-2" in seen[0].parent.name


def test_an_upload_that_failed_goes_on_where_it_was(
    run: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with served(run, mirror=mirror) as server, connected(server) as stub:
        trainer = Trainer(server, stub).push(1).kept()
        upload, asked = Folder.upload, []

        def failing_once(folder: Folder, source: Path, name: str) -> None:
            asked.append(source.name)
            if len(asked) == 2:
                raise BucketError("the line was cut")
            upload(folder, source, name)

        monkeypatch.setattr(Folder, "upload", failing_once)
        trainer.push(1).kept()
    assert asked == ["model.safetensors", "state.safetensors", "state.safetensors", "checkpoint.json", "SHA256SUMS"]
    assert "copying to the mirror failed, and is tried again in 1 s" in caplog.text


def test_a_checkpoint_that_somebody_removed_is_not_asked_for_again(run: Path, mirror: Path) -> None:
    with served(run, mirror=mirror) as server, connected(server) as stub:
        Trainer(server, stub).push(1).kept()
        assert server.host.files.mirror is not None
        server.host.files.mirror.notice(run / "checkpoint-00000099-iteration-99")
        until(lambda: metric(server, "behind_seconds") == 0, "it has the newest that is there")
        assert metric(server, "failures_total") == 0
