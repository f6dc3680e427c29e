"""A run's checkpoints are copied elsewhere, and a server whose disk is gone comes back from there."""

import logging
import shutil
import threading
import time
from pathlib import Path

import pytest

from mirror.mirrored import SILENCE, Trainer, iterations, iterations_in, metric, trained, until
from ormo_server.metrics import Metrics
from ormo_server.mirror.buckets import Folder
from ormo_server.mirror.copies import copies
from ormo_server.mirror.lease import read_record
from ormo_server.service.server import Server
from ormo_server.store import StoreError
from service.wire import connected, served, settings

# A disk that is gone


def test_a_wiped_directory_comes_back_with_what_the_newest_copy_had_and_says_what_is_lost(
    run: Path, mirror: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = trained(run, mirror, 4, 3, drained=False)
    shutil.rmtree(run)
    with served(run, mirror=mirror, failure_timeout_seconds=SILENCE) as server, connected(server) as stub:
        assert server.host.engine.iteration()[1] == 4
        (said,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert f"restored iteration 4 from {mirror}" in said.getMessage()
        assert "Not there are iterations 5 to 7, which process" in said.getMessage()
        assert "and what it applied after that" in said.getMessage()
        trainer = Trainer(server, stub, incarnation=2)
        assert trainer.parameter == before
        trainer.push(2).kept()
    assert iterations_in(Folder(mirror))[-1] == 6
    assert not (run / ".restoring").exists()


def test_a_server_that_ended_in_order_left_everything_in_its_mirror(
    run: Path, mirror: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(run, mirror, 2, 3, drained=True)
    shutil.rmtree(run)
    with served(run, mirror=mirror) as server:
        assert server.host.engine.iteration()[1] == 5
    assert "ended with it, so none is missing" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_restored_run_goes_on_with_a_journal_of_its_own(run: Path, mirror: Path) -> None:
    trained(run, mirror, 3, 2, drained=False, journal=True)
    shutil.rmtree(run)
    with served(run, mirror=mirror, failure_timeout_seconds=SILENCE, journal=True) as server, connected(server) as stub:
        Trainer(server, stub, incarnation=2).push(2)
    with served(run, mirror=mirror, failure_timeout_seconds=SILENCE, journal=True) as server:
        assert server.host.engine.iteration()[1] == 5, "3 from the mirror, and 2 that only its journal had"


def test_tickets_of_before_are_void_after_a_restore(run: Path, mirror: Path) -> None:
    """Whatever was applied with them after the copy is lost, and they must not count twice, or differently."""
    trained(run, mirror, 1, 0, drained=True)
    shutil.rmtree(run)
    with served(run, mirror=mirror) as server, server.host.engine.inspect() as machine:
        assert not machine.state.tickets
        assert machine.state.iteration == 1


def test_a_restore_that_was_cut_off_is_begun_again(run: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(run, mirror, 2, 0, drained=False)
    shutil.rmtree(run)
    with monkeypatch.context() as patched:
        patched.setattr("ormo_server.service.run.RunHost._restore", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Server(settings(run, mirror=mirror, failure_timeout_seconds=SILENCE))
    assert (run / ".restoring").exists()
    with served(run, mirror=mirror, failure_timeout_seconds=SILENCE) as server:
        assert server.host.engine.iteration()[1] == 2


def test_the_mirror_stays_ours_however_long_a_restore_takes(
    run: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trained(run, mirror, 2, 0, drained=True)
    shutil.rmtree(run)
    download, bucket = Folder.download, Folder(mirror)

    def renewals() -> int:
        found = read_record(bucket)
        assert found is not None
        return found[0].renewal

    def slowly(folder: Folder, name: str, target: Path) -> None:
        before = renewals()
        until(lambda: renewals() >= before + 2, "it is renewed meanwhile")
        download(folder, name, target)

    monkeypatch.setattr(Folder, "download", slowly)
    with served(run, mirror=mirror, failure_timeout_seconds=1.0) as server:
        assert server.host.engine.iteration()[1] == 2


# Copies that can't be used


def test_a_copy_that_was_cut_off_is_not_used(run: Path, mirror: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(run, mirror, 2, 1, drained=True)
    newest = copies(Folder(mirror))[-1]
    (mirror / newest.object_of("SHA256SUMS")).unlink()
    shutil.rmtree(run)
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
    shutil.rmtree(run)
    with served(run, mirror=mirror) as server:
        assert server.host.engine.iteration()[1] == 2
    assert "state.safetensors has the SHA-256" in caplog.text


def test_where_no_copy_is_whole_no_new_run_begins(run: Path, mirror: Path) -> None:
    trained(run, mirror, 2, 0, drained=True)
    for sums in mirror.rglob("SHA256SUMS"):
        sums.unlink()
    shutil.rmtree(run)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"none of the checkpoints of this run .* is whole"):
            Server(settings(run, mirror=mirror))
    with served(run, mirror=mirror, fresh=True) as server:
        assert not server.host.has_model


def test_a_run_of_which_nothing_was_copied_is_not_forgotten(run: Path, mirror: Path) -> None:
    trained(run, mirror, 2, 0, drained=True)
    for folder in mirror.glob("*/checkpoint-*"):
        shutil.rmtree(folder)
    shutil.rmtree(run)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"a run that had iteration 2 at .*, and has no checkpoint of it"):
            Server(settings(run, mirror=mirror))


def test_copies_that_nothing_says_whose_they_are_begin_no_new_run(run: Path, mirror: Path) -> None:
    trained(run, mirror, 2, 0, drained=True)
    (mirror / "lease.json").unlink()
    shutil.rmtree(run)
    with pytest.raises(StoreError, match=r"has checkpoints, but no lease\.json"):
        Server(settings(run, mirror=mirror))


# A mirror that is away


def test_an_empty_directory_begins_no_new_run_while_the_mirror_is_away(run: Path, mirror: Path) -> None:
    trained(run, mirror, 2, 0, drained=True)
    shutil.rmtree(run)
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


def test_a_stop_waits_for_no_mirror_that_hangs(
    run: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ormo_server.service.server._MIRROR_SECONDS", 6.0)
    with served(run, mirror=mirror) as server, connected(server) as stub:
        trainer = Trainer(server, stub).push(1).kept()
        hangs = threading.Event()
        for name in ("upload", "replace"):
            monkeypatch.setattr(Folder, name, lambda *_: hangs.wait())
        trainer.push(1)
        began = time.monotonic()
        try:
            assert server.drain()
            assert time.monotonic() - began < server.stop_seconds
        finally:
            hangs.set()
    assert "iteration-2 is not in the mirror" in caplog.text


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
