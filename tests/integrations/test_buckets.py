"""A mirror in a real server of S3, through the real library, with all that goes wrong between the two."""

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("obstore", reason="`make test-integrations` installs it")
pytest.importorskip("moto", reason="`make test-integrations` installs it")

from chaos.proxy import Way
from docs.pages import blocks, text_of
from integrations.s3 import S3, s3_server
from mirror.mirrored import Trainer, iterations_in, metric, replaces_only_what_was_read, until
from ormo_server.core.errors import SettingsError
from ormo_server.export import ExportSettings, export
from ormo_server.mirror.buckets import Bucket, BucketError, ChangedError, bucket_at
from ormo_server.mirror.copies import copies
from ormo_server.mirror.lease import read_record
from ormo_server.service.server import Server
from ormo_server.store import StoreError
from service.wire import LARGE, SMALL, WireWorker, connected, payload, served, settings
from system import programs
from system.forked import ran
from system.programs import Program, Stage

SILENCE = 3.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server(tmp_path_factory.mktemp("s3")) as made:
        yield made


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setitem(programs.ENVIRONMENT, name, value)
    server.mend()
    return server


@pytest.fixture
def address(s3: S3) -> str:
    """Of a folder in a bucket of the test's own."""
    bucket = f"bucket-{uuid4().hex}"
    s3.ask("PUT", bucket)
    return f"s3://{bucket}/runs/mine"


@pytest.fixture
def bucket(address: str) -> Bucket:
    return bucket_at(address)


# The library


def test_objects_come_back_as_they_were_and_in_folders(bucket: Bucket, tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000  # 10 MB: in parts, each way
    (tmp_path / "source").write_bytes(content)
    bucket.upload(tmp_path / "source", "a/b/large")
    (tmp_path / "source").write_bytes(b"")
    bucket.upload(tmp_path / "source", "a/empty")
    assert bucket.sizes() == {"a/b/large": len(content), "a/empty": 0}
    assert bucket.sizes("a/b") == {"a/b/large": len(content)}
    for name, expected in (("a/b/large", content), ("a/empty", b"")):
        bucket.download(name, tmp_path / "target")
        assert (tmp_path / "target").read_bytes() == expected
    bucket.remove(["a/b/large", "a/none"])
    assert bucket.sizes() == {"a/empty": 0}


def test_an_object_is_replaced_only_as_it_was_read(bucket: Bucket) -> None:
    second = replaces_only_what_was_read(bucket)
    bucket.remove(["x"])
    with pytest.raises(ChangedError):
        bucket.replace("x", b"3", second)


def test_a_bucket_that_is_not_there_is_not_an_empty_one(s3: S3, tmp_path: Path) -> None:
    bucket = bucket_at("s3://no-such-bucket/run")
    for use in (bucket.sizes, lambda: bucket.read("x"), lambda: bucket.replace("x", b"", None)):
        with pytest.raises(BucketError, match="NoSuchBucket: The specified bucket does not exist"):
            use()
    with pytest.raises(StoreError, match="so no new run begins"):
        Server(settings(tmp_path / "run", mirror="s3://no-such-bucket/run"))


def test_a_profile_that_is_not_there_is_a_sentence(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(SettingsError, match=r"credentials for s3://.* can't be read: .*\(work\) could not be found"):
        bucket_at(address)
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    assert bucket_at(address).sizes() == {}


# A run


def run_of(directory: Path, address: str, **changes: Any) -> Any:
    return served(directory, mirror=address, failure_timeout_seconds=SILENCE, **changes)


def test_a_wiped_directory_comes_back(
    tmp_path: Path, address: str, bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    with run_of(run, address) as server, connected(server) as stub:
        trainer = Trainer(server, stub, start=5.0).push(4).kept()
        before = trainer.parameter
        trainer.push(3)
        until(lambda: (found := read_record(bucket)) and found[0].iteration == 7, "the lease says it")
    shutil.rmtree(run)
    with run_of(run, address) as server, connected(server) as stub:
        assert f"restored iteration 4 from {address}" in caplog.text
        assert "Not there are iterations 5 to 7, which process" in caplog.text
        trainer = Trainer(server, stub, incarnation=2)
        assert trainer.parameter == before
        trainer.push(1).kept()
        assert server.drain()
    found = read_record(bucket)
    assert found is not None
    assert (found[0].released, found[0].iteration) == (True, 5)


def test_a_second_server_is_refused_and_takes_over_once_the_first_is_dead(
    tmp_path: Path, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with run_of(tmp_path / "first", address) as server, connected(server) as stub:
        Trainer(server, stub).push(2).kept()
        with pytest.raises(StoreError, match=r"is the mirror of another server: process .* writes there: stop it"):
            Server(settings(tmp_path / "second", mirror=address))
    caplog.clear()
    with run_of(tmp_path / "second", address) as server:
        assert server.host.engine.iteration()[1] == 2
    assert "if it is dead, the mirror is free in" in caplog.text


def test_a_bucket_that_is_away_from_the_start_stops_no_run(
    s3: S3, tmp_path: Path, address: str, bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    with served(run) as server, connected(server) as stub:
        Trainer(server, stub).push(2)
        assert server.drain()
    s3.cut()
    with run_of(run, address) as server, connected(server) as stub:
        trainer = Trainer(server, stub, incarnation=2).push(3)
        assert server.host.checkpoint()
        until(lambda: metric(server, "failures_total") >= 2, "it is tried again")
        assert metric(server, "behind_seconds") > 0
        s3.mend()
        trainer.kept()
        assert metric(server, "behind_seconds") == 0
    assert iterations_in(bucket) == [5]
    assert "training goes on without copies, and it is tried again" in caplog.text


def test_an_empty_directory_begins_no_run_while_the_bucket_is_away(s3: S3, tmp_path: Path, address: str) -> None:
    s3.cut()
    with pytest.raises(StoreError, match=r"whether the mirror has one can't be seen, so no new run begins: .*--fresh"):
        Server(settings(tmp_path / "run", mirror=address))
    with run_of(tmp_path / "run", address, fresh=True) as server, connected(server) as stub:
        trainer = Trainer(server, stub).push(2)
        s3.mend()
        trainer.kept()


def push(worker: WireWorker) -> None:
    worker.pull()
    worker.push(payload(worker.manifest, 1.0))


def test_an_upload_that_is_cut_off_is_no_copy_and_is_made_up_for(
    s3: S3, tmp_path: Path, address: str, bucket: Bucket
) -> None:
    """Several parts of 8 MB each: the line breaks in the middle of them."""
    with served(tmp_path / "run", mirror=address) as server, connected(server) as stub:
        worker = WireWorker(stub, "w", LARGE)
        worker.join()
        until(lambda: metric(server, "last_success_timestamp_seconds"), "the model's own checkpoint is copied")
        push(worker)
        began = s3.line.carried[Way.TO_SERVER]
        assert server.host.checkpoint()
        until(lambda: s3.line.carried[Way.TO_SERVER] > began + 16e6, "12 MB of the model and some of the state")
        s3.cut()
        until(lambda: metric(server, "failures_total") >= 1, "it is missed")
        s3.mend()
        assert [copy.whole for copy in copies(bucket)] == [True, False]
        s3.cut()
        push(worker)
        assert metric(server, "iteration") == 0
        s3.mend()
        until(lambda: metric(server, "iteration") == 1, "it is made up for")
    assert iterations_in(bucket) == [0, 1]


def test_a_line_on_which_nothing_comes_keeps_nobody_from_training(s3: S3, tmp_path: Path, address: str) -> None:
    with served(tmp_path / "run", mirror=address, checkpoints_kept=1) as server, connected(server) as stub:
        trainer = Trainer(server, stub).push(1).kept()
        with s3.line.silent(Way.TO_SERVER):
            for _ in range(4):
                trainer.push(1)
                assert server.host.checkpoint()
            assert server.host.engine.iteration()[1] == 5
            assert metric(server, "iteration") == 1
            assert metric(server, "behind_seconds") > 0
        s3.line.reset()
        trainer.kept()


def test_access_that_is_denied_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with s3_server(tmp_path) as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        s3.ask("PUT", "mine")
        run, address = tmp_path / "run", "s3://mine/run"
        with run_of(run, address) as server, connected(server) as stub:
            trainer = Trainer(server, stub).push(1).kept()
            s3.deny()
            trainer.push(1)
            assert server.host.checkpoint()
            until(lambda: metric(server, "failures_total") >= 1, "it is told")
            assert "InvalidAccessKeyId: The AWS Access Key Id you provided does not exist" in caplog.text
            assert "Access is denied: the credentials in force need to list, get, put and delete there" in caplog.text
            assert server.drain(), "what counts is on the disk"
        shutil.rmtree(run)
        with pytest.raises(StoreError, match=r"Access is denied: .* so no new run begins"):
            Server(settings(run, mirror=address))


# Models


@pytest.mark.timeout(300)
def test_a_model_comes_from_a_bucket_and_goes_into_one(stage: Stage, tmp_path: Path, address: str) -> None:
    run = tmp_path / "first"
    with run_of(run, address) as server, connected(server) as stub:
        Trainer(server, stub, start=3.0).push(1).kept()
        assert server.drain()
    expected = load_file(run / "latest" / "model.safetensors")
    pt = stage.folder / "model.pt"
    for model, into, kind in [
        (address, f"{address}-models/model.safetensors", "safetensors"),
        (f"{address}-models/model.safetensors", f"{address}-models/model.pt", "torch"),
        (f"{address}-models/model.pt", str(pt), "torch"),
    ]:
        assert export(ExportSettings(model=model, into=into, format=kind)) == 0
    command = ["export", "--model", f"{address}-models", "--into", "again.safetensors"]
    assert stage.program("export", *command, module="ormo_server").printed() == (
        0,
        f"again.safetensors: 4 tensors from {address}-models, safetensors\n",
    )
    for found in (
        torch.load(pt, weights_only=True),
        load_file(stage.folder / "again.safetensors"),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    model = f"{address}-models/model.pt"
    with served(tmp_path / "second", model=model) as server, connected(server) as stub:
        worker = WireWorker(stub, "w", SMALL, start=77.0)
        worker.join()
        worker.pull()
        assert worker.params[0] == 2.0
    assert not list((tmp_path / "second").glob(".model-*"))


def test_a_model_that_is_not_in_the_bucket_is_a_sentence(tmp_path: Path, address: str) -> None:
    with pytest.raises(StoreError, match=r"/runs/mine/model\.pt can't be read: .* 404 Not Found$"):
        Server(settings(tmp_path / "run", model=f"{address}/model.pt"))


# Real programs


@pytest.mark.timeout(300)
def test_a_killed_server_whose_disk_is_wiped_goes_on_with_its_worker(
    stage: Stage, address: str, bucket: Bucket
) -> None:
    flags = {"mirror": address, "checkpoint-seconds": 0.5, "failure-timeout-seconds": SILENCE, "journal": True}
    first = stage.server(**flags)
    stage.worker("w", batch_size=8, slow_factor=4.0)
    until(lambda: len(iterations_in(bucket)) >= 3 and iterations_in(bucket)[-1] > 5, "some copies")
    first.kill()
    shutil.rmtree(stage.folder / "run")
    kept = iterations_in(bucket)[-1]
    second = stage.server(**flags)
    said = second.log.read_text()
    assert f"restored iteration {kept} from {address}" in said
    (error,) = [line for line in said.splitlines() if "ERROR" in line]
    assert "the mirror has checkpoints only, no journal" in error
    stage.until(lambda status: status.iteration.number > kept + 20, "the same worker goes on")
    assert second.terminate(60) == 0
    record = read_record(bucket)
    assert record is not None
    assert record[0].released
    assert iterations_in(bucket)[-1] == record[0].iteration > kept + 20


# The page


@pytest.mark.timeout(300)
def test_the_page_does_what_it_says(stage: Stage, address: str, bucket: Bucket) -> None:
    """Its commands as they stand, but for the address and the free ports; each server has its worker beside it."""
    page = text_of("with/buckets.md").replace("s3://my-bucket/runs/mine", address)
    install, first, second, export = blocks(page, "sh")
    assert install == "pip install 'ormo-parameter-server[buckets]'\n"
    for number, block in enumerate((first, second), 1):
        lines = block.splitlines()
        remove, (serve, work) = lines[:-2], lines[-2:]
        assert remove == ["rm -r runs/mine"] * (number - 1)
        if remove:
            shutil.rmtree(stage.folder / "runs/mine")
        server = typed(stage, f"server-{number}", serve, "--listen", stage.address, "--metrics-listen", "")
        assert server.process.stdout is not None
        stage.address = server.process.stdout.readline().split()[1].partition("=")[2]
        worker = typed(stage, f"worker-{number}", work, "--server", stage.address)
        assert (worker.wait(100), server.wait(60)) == (0, 0), server.log.read_text()
    assert f"restored iteration 200 from {address}" in server.log.read_text()
    assert iterations_in(bucket)[-1] == 400
    assert typed(stage, "export", export).wait() == 0
    (code,) = blocks(page, "python")
    script = stage.folder / "program.py"
    script.write_text(code)
    assert ran(script).stdout.endswith(" numbers\n")


def typed(stage: Stage, name: str, line: str, *more: str) -> Program:
    program, *words = shlex.split(line)
    return stage.program(name, *words, *more, module=program.replace("-", "_"))
