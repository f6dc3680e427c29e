"""Ends that nobody asked for, and ends in which something hangs."""

import contextlib
import logging
import os
import signal
import threading
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest

from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.cli import _run_until_told
from ormo_server.service.server import Server
from ormo_server.store import Checkpoint, StoreError
from service.crashing import JOURNALED, everything, trained, unserved
from service.wire import WireWorker, eventually, payload, served
from system.forked import Forked


def says(server: Server, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{server.metrics_address}{path}", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


# That is how the thread dies.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_that_can_not_take_calls_is_not_alive_and_ends_with_its_state_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path, metrics_listen="127.0.0.1:0", **JOURNALED) as server:
        trained(server)
        before = everything(server)
        assert len(server._serving) == 1
        assert (says(server, "/alive"), says(server, "/ready")) == (200, 200)
        unserved(server, monkeypatch)
        assert (says(server, "/alive"), says(server, "/ready")) == (503, 503)
        with caplog.at_level(logging.CRITICAL):
            assert _run_until_told(server, threading.Event()) == 1
        assert "gRPC's thread that accepts calls has ended" in caplog.text
    with served(tmp_path, **JOURNALED) as again:
        assert everything(again) == before
        assert again.host.files.last_checkpoint is not None


HANGING = """
import os, sys, threading
from ormo_server.service import server
server._STOP_SECONDS = 1.0
real = os.fsync
def fsync(descriptor):
    if "hang" in os.listdir("."):
        open("hanging", "w").close()
        threading.Event().wait()
    real(descriptor)
os.fsync = fsync
from ormo_server.cli import main
sys.exit(main(sys.argv[1:]))
"""


LOG = "log"


def ended(process: Forked, folder: Path) -> str:
    """The log of a process that was told to end, and does so by itself with exit code 1."""
    try:
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 1
    finally:
        closed(process)
    log = (folder / LOG).read_text()
    assert "the process ends now" in log
    assert "Traceback" not in log
    return log


def started(folder: Path, *flags: str) -> Forked:
    (folder / "hanging.py").write_text(HANGING)
    always = ["--listen", "127.0.0.1:0", "--metrics-listen", "", "--directory", "run", "--max-workers", "3"]
    words = ["serve", *always, "--drain-seconds", "1", *flags]
    return Forked(folder / "hanging.py", words, folder=folder, log=folder / LOG, environment=os.environ)


def closed(process: Forked) -> None:
    process.kill()
    process.wait(10)
    process.stdout.close()


def opened(path: Path) -> int | None:
    """A FIFO's writing end, once somebody reads it."""
    with contextlib.suppress(OSError):
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    return None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_start_at_once_whatever_it_waits_for(tmp_path: Path, number: signal.Signals) -> None:
    os.mkfifo(tmp_path / "hangs")
    process = started(tmp_path, "--model", "hangs")
    ends: list[int] = []
    try:
        eventually(lambda: ends.extend(filter(None, [opened(tmp_path / "hangs")])) or ends, seconds=60)
        os.kill(process.pid, number)
        assert process.wait(60) == -number
    finally:
        closed(process)
        for end in ends:
            os.close(end)
    assert "Traceback" not in (tmp_path / LOG).read_text()


def test_a_stop_ends_within_its_limit_also_if_the_checkpoint_at_the_runs_end_hangs(tmp_path: Path) -> None:
    with served(tmp_path / "run") as server:
        trained(server)
        assert server.host.checkpoint()
        done = server.host.engine.iteration()[1]
    process = started(tmp_path, "--stop-after-gradients", str(done + 1), "--checkpoint-seconds", "1000")
    address = process.stdout.readline().split()[1].removeprefix("address=")
    with grpc.insecure_channel(address) as channel:
        worker = WireWorker(ParameterServerStub(channel), "last")
        worker.join()
        worker.pull()
        (tmp_path / "hang").touch()
        worker.push(payload(worker.manifest, 1.0))
        eventually((tmp_path / "hanging").exists, seconds=20)
    assert "waits for the end of a checkpoint" in ended(process, tmp_path)


def test_a_stop_ends_within_its_limit_also_if_the_disk_hangs(tmp_path: Path) -> None:
    """As a real process, since all threads of it go."""
    with served(tmp_path / "run") as server:
        trained(server)
        assert server.host.checkpoint()
    process = started(tmp_path)
    assert process.stdout.readline().startswith("serving address=")
    (tmp_path / "hang").touch()
    log = ended(process, tmp_path)
    assert "the stop has taken 2" in log
    assert "waits for the last checkpoint" in log


def test_a_last_checkpoint_that_can_not_be_written_is_tried_again_once_the_connections_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path) as server:
        trained(server)
        before, write = everything(server), server.host.files.store.write

        def crowded(checkpoint: Checkpoint) -> Path:
            if server.stop_stage == "the last checkpoint" and not server._pool._shutdown:
                raise StoreError("too many open files")
            return write(checkpoint)

        monkeypatch.setattr(server.host.files.store, "write", crowded)
        assert server.drain()
    with served(tmp_path) as again:
        assert everything(again) == before
