"""A run's checkpoints are copied elsewhere, and a server whose disk is gone comes back from there."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ormo_server.metrics import Metrics
from ormo_server.mirror.buckets import Bucket, BucketError, Folder
from ormo_server.mirror.copies import copies, prune
from ormo_server.mirror.lease import read_record
from ormo_server.service.server import Server
from ormo_server.store import StoreError
from service.wire import SMALL, WireWorker, connected, payload, served, settings

# Of silence after which another may take the mirror: long enough for a busy machine, short enough to wait for.
SILENCE = 2.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    (tmp_path / "mirror").mkdir()
    return tmp_path / "mirror"


def until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        time.sleep(0.02)


def iterations_in(bucket: Bucket) -> list[int]:
    """Of the whole copies of the run, oldest first."""
    found = read_record(bucket)
    lineage = found[0].lineage if found else None
    return [int(copy.name.rpartition("-")[2]) for copy in copies(bucket, lineage) if copy.whole]


def iterations(mirror: Path) -> list[int]:
    """Of all whole copies."""
    return [int(copy.name.rpartition("-")[2]) for copy in copies(Folder(mirror)) if copy.whole]


def metric(server: Server, name: str) -> float:
    value = server.metrics.registry.get_sample_value(f"ormo_mirror_{name}")
    assert value is not None, name
    return value


class Trainer:
    """A worker that pushes gradients of 1."""

    def __init__(self, server: Server, stub: Any, incarnation: int = 1, start: float = 0.0) -> None:
        self.server, self.worker = server, WireWorker(stub, "w", incarnation=incarnation, start=start)
        self.worker.join()

    def push(self, count: int = 1) -> "Trainer":
        for _ in range(count):
            self.worker.pull()
            self.worker.push(payload(SMALL, 1.0))
        return self

    def kept(self) -> "Trainer":
        """In a checkpoint, and in the mirror."""
        assert self.server.host.checkpoint()
        iteration = self.server.host.engine.iteration()[1]
        until(lambda: metric(self.server, "iteration") == iteration, f"iteration {iteration} in the mirror")
        return self

    @property
    def parameter(self) -> float:
        self.worker.pull()
        return self.worker.params[0].item()


def trained(run: Path, mirror: Path, saved: int, unsaved: int, *, drained: bool, **changes: Any) -> float:
    """The parameter after `saved` gradients, which are mirrored, and some more, which are not unless it is drained."""
    with served(run, mirror=mirror, failure_timeout_seconds=SILENCE, **changes) as server, connected(server) as stub:
        trainer = Trainer(server, stub, start=5.0).push(saved).kept()
        at_checkpoint = trainer.parameter
        trainer.push(unsaved)
        until(
            lambda: (found := read_record(Folder(mirror))) and found[0].iteration == saved + unsaved,
            "the lease says what the server has",
        )
        if drained:
            assert server.drain()
        return at_checkpoint


def wipe(run: Path) -> None:
    shutil.rmtree(run)


# A disk that is gone


def test_a_wiped_directory_comes_back_with_what_the_newest_copy_had_and_says_what_is_lost(
    run: Path, mirror: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = trained(run, mirror, 4, 3, drained=False)
    wipe(run)
    with served(run, mirror=mirror, failure_timeout_seconds=SILENCE) as server, connected(server) as stub:
        assert server.host.engine.iteration()[1] == 4
        (said,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert f"restored iteration 4 from {mirror}" in said.getMessage()
        assert "Not there are iterations 5 to 7, which process" in said.getMessage()
        assert "and what it applied after that" in said.getMessage()
        trainer = Trainer(server, stub, incarnation=2)
        assert trainer.parameter == before
        trainer.push(2).kept()
    assert iterations(mirror)[-1] == 6
    assert not (run / ".restoring").exists()


def test_a_server_that_ended_in_order_left_everything_in_its_mirror(
    run: Path, mirror: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(run, mirror, 2, 3, drained=True)
    wipe(run)
    with served(run, mirror=mirror) as server:
        assert server.host.engine.iteration()[1] == 5
    assert "ended with it, so none is missing" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_restored_run_goes_on_with_a_journal_of_its_own(run: Path, mirror: Path) -> None:
    trained(run, mirror, 3, 2, drained=False, journal=True)
    wipe(run)
    with served(run, mirror=mirror, failure_timeout_seconds=SILENCE, journal=True) as server, connected(server) as stub:
        Trainer(server, stub, incarnation=2).push(2)
    with served(run, mirror=mirror, failure_timeout_seconds=SILENCE, journal=True) as server:
        assert server.host.engine.iteration()[1] == 5, "3 from the mirror, and 2 that only its journal had"


def test_tickets_of_before_are_void_after_a_restore(run: Path, mirror: Path) -> None:
    """Whatever was applied with them after the copy is lost, and they must not count twice, or differently."""
    trained(run, mirror, 1, 0, drained=True)
    wipe(run)
    with served(run, mirror=mirror) as server, server.host.engine.inspect() as machine:
        assert not machine.state.tickets
        assert machine.state.iteration == 1


def test_a_restore_that_was_cut_off_is_begun_again(run: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(run, mirror, 2, 0, drained=False)
    wipe(run)
    with monkeypatch.context() as patched:
        patched.setattr("ormo_server.service.run.RunHost._restore", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Server(settings(run, mirror=mirror, failure_timeout_seconds=SILENCE))
    assert (run / ".restoring").exists()
    with served(run, mirror=mirror, failure_timeout_seconds=SILENCE) as server:
        assert server.host.engine.iteration()[1] == 2


# Copies that can't be used


def test_a_copy_that_was_cut_off_is_not_used(run: Path, mirror: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(run, mirror, 2, 1, drained=True)
    newest = copies(Folder(mirror))[-1]
    (mirror / newest.object_of("SHA256SUMS")).unlink()
    wipe(run)
    with served(run, mirror=mirror) as server:
        assert server.host.engine.iteration()[1] == 2
    assert f"in the mirror: {newest.name} is there in part" in caplog.text
    assert "Not there are iterations 3 to 3" in caplog.text


def test_a_copy_that_is_damaged_is_not_used(run: Path, mirror: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(run, mirror, 2, 1, drained=True)
    path = mirror / copies(Folder(mirror))[-1].object_of("state.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    wipe(run)
    with served(run, mirror=mirror) as server:
        assert server.host.engine.iteration()[1] == 2
    assert "state.safetensors has the SHA-256" in caplog.text


def test_where_no_copy_is_whole_no_new_run_begins(run: Path, mirror: Path) -> None:
    trained(run, mirror, 2, 0, drained=True)
    for sums in mirror.rglob("SHA256SUMS"):
        sums.unlink()
    wipe(run)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"none of the checkpoints of this run .* is whole"):
            Server(settings(run, mirror=mirror))
    with served(run, mirror=mirror, fresh=True) as server:
        assert not server.host.has_model


def test_a_run_of_which_nothing_was_copied_is_not_forgotten(run: Path, mirror: Path) -> None:
    trained(run, mirror, 2, 0, drained=True)
    for folder in mirror.glob("*/checkpoint-*"):
        shutil.rmtree(folder)
    wipe(run)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"a run that had iteration 2 at .*, and has no checkpoint of it"):
            Server(settings(run, mirror=mirror))


def test_copies_that_nothing_says_whose_they_are_begin_no_new_run(run: Path, mirror: Path) -> None:
    trained(run, mirror, 2, 0, drained=True)
    (mirror / "lease.json").unlink()
    wipe(run)
    with pytest.raises(StoreError, match=r"has checkpoints, but no lease\.json"):
        Server(settings(run, mirror=mirror))


# A mirror that is away


def test_an_empty_directory_begins_no_new_run_while_the_mirror_is_away(run: Path, mirror: Path) -> None:
    trained(run, mirror, 2, 0, drained=True)
    wipe(run)
    mirror.rename(mirror.with_name("away"))
    with pytest.raises(StoreError, match=r"so no new run begins: start again when the mirror can be read, .* --fresh"):
        Server(settings(run, mirror=mirror))
    with served(run, mirror=mirror, fresh=True) as server, connected(server) as stub:
        Trainer(server, stub).push(1)
        assert metric(server, "failures_total") >= 1


def test_a_run_goes_on_without_its_mirror_and_copies_when_it_is_there(
    run: Path, mirror: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with served(run) as server, connected(server) as stub:
        Trainer(server, stub).push(2)
        assert server.drain()
    mirror.rename(mirror.with_name("away"))
    with served(run, mirror=mirror, failure_timeout_seconds=SILENCE) as server, connected(server) as stub:
        trainer = Trainer(server, stub, incarnation=2).push(3)
        assert server.host.checkpoint()
        until(lambda: metric(server, "failures_total") >= 2, "it is tried again")
        assert metric(server, "behind_seconds") > 0
        assert "training goes on" in caplog.text
        mirror.with_name("away").rename(mirror)
        trainer.kept()
        assert metric(server, "behind_seconds") == 0
    assert iterations(mirror) == [5]


def test_a_mirror_that_goes_away_in_between_is_made_up_for(run: Path, mirror: Path) -> None:
    with served(run, mirror=mirror, failure_timeout_seconds=SILENCE) as server, connected(server) as stub:
        trainer = Trainer(server, stub).push(1).kept()
        mirror.rename(mirror.with_name("away"))
        for _ in range(2):
            trainer.push(1)
            assert server.host.checkpoint()
        until(lambda: metric(server, "failures_total") >= 1, "it is missed")
        assert metric(server, "iteration") == 1
        mirror.with_name("away").rename(mirror)
        trainer.kept()
    assert iterations(mirror)[-1] == 3


def test_a_stop_waits_for_no_mirror_that_is_away(run: Path, mirror: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(run, mirror=mirror) as server, connected(server) as stub:
        trainer = Trainer(server, stub).push(1).kept()
        mirror.rename(mirror.with_name("away"))
        trainer.push(1)
        assert server.drain(), "what counts is on the disk"
    assert "iteration-2 is not in the mirror: the next start with this directory copies it" in caplog.text
    mirror.with_name("away").rename(mirror)
    with served(run, mirror=mirror) as server:
        until(lambda: metric(server, "iteration") == 2, "it is copied")


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
    wipe(run)
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


def test_copies_of_the_writers_before_go_once_there_are_enough_newer_ones(run: Path, mirror: Path) -> None:
    trained(run, mirror, 1, 0, drained=True)
    wipe(run)
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


# Settings


@pytest.mark.parametrize("where", [".", "below", ".."])
def test_a_mirror_in_the_directory_itself_is_refused(run: Path, where: str) -> None:
    with pytest.raises(ValueError, match="lie in each other: expected a folder elsewhere"):
        settings(run, mirror=run / where)


def test_an_address_of_an_unknown_kind_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="begins with ftp://: expected s3://, gs://, az://, file:// or the path of a"):
        settings(run, mirror="ftp://host/folder")


def test_without_a_mirror_its_metrics_are_zero() -> None:
    metrics = Metrics()
    for name in ("failures_total", "iteration", "behind_seconds", "last_success_timestamp_seconds"):
        assert metrics.registry.get_sample_value(f"ormo_mirror_{name}") == 0
