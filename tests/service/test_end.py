"""Ends that nobody asked for, and ends in which something hangs."""

import logging
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from ormo_server.cli import _run_until_told
from ormo_server.service.server import Server
from ormo_server.store import Checkpoint, StoreError
from service.crashing import JOURNALED, everything, trained, unserved
from service.wire import served


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
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with served(tmp_path, metrics_listen="127.0.0.1:0", **JOURNALED) as server:
        trained(server)
        before = everything(server)
        assert len(server._serving) == 1
        assert (says(server, "/alive"), says(server, "/ready")) == (200, 200)
        unserved(server)
        assert (says(server, "/alive"), says(server, "/ready")) == (503, 503)
        with caplog.at_level(logging.CRITICAL):
            assert _run_until_told(server, threading.Event()) == 1
        assert "gRPC's thread that takes calls has ended" in caplog.text
    with served(tmp_path, **JOURNALED) as again:
        assert everything(again) == before
        assert again.host.last_checkpoint is not None


HANGING = """
import os, sys, threading
from ormo_server.service import server
server._STOP_SECONDS = 1.0
real = os.fsync
def fsync(descriptor):
    if "hang" in os.listdir("."):
        threading.Event().wait()
    real(descriptor)
os.fsync = fsync
from ormo_server.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_stop_ends_within_its_limit_also_if_the_disk_hangs(tmp_path: Path) -> None:
    """As a real process, since all threads of it go."""
    with served(tmp_path / "run") as server:
        trained(server)
        assert server.host.checkpoint()
    flags = ["--listen", "127.0.0.1:0", "--metrics-listen", "", "--directory", "run", "--max-workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, "serve", *flags, "--drain-seconds", "1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving address=")
        (tmp_path / "hang").touch()
        os.kill(process.pid, signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "the stop has taken 2" in log
    assert "waits for the last checkpoint: the process ends now" in log
    assert "Traceback" not in log


def test_a_last_checkpoint_that_can_not_be_written_is_tried_again_once_the_connections_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path) as server:
        trained(server)
        before, write = everything(server), server.host._store.write

        def crowded(checkpoint: Checkpoint) -> Path:
            if server.stop_stage == "the last checkpoint" and not server._pool._shutdown:
                raise StoreError("too many open files")
            return write(checkpoint)

        monkeypatch.setattr(server.host._store, "write", crowded)
        assert server.drain()
    with served(tmp_path) as again:
        assert everything(again) == before
