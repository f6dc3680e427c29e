"""Threads and descriptors run dry, as real processes: training goes on, or the server ends with a sentence."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from system.programs import Program, Stage

pytestmark = pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit is not there")

# 48 threads answer calls, and 64 are for all else.
SMALL = {"max_workers": 2, "max_readers": 8, "learning_rate": 0.001, "journal": True, "checkpoint_seconds": 0.5}
NEEDED_THREADS = 112
# HTTP/2's first bytes and an empty SETTINGS: a connection that is complete, and says no more.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"


def applied(stage: Stage) -> int:
    return int(stage.status().iteration.number)


def trains_on(stage: Stage, worker: Program, *, by: int = 50) -> None:
    begun = applied(stage)
    stage.until(lambda status: status.iteration.number >= begun + by, "it trains on")
    assert worker.process.poll() is None


def kept(stage: Stage) -> set[str]:
    return {path.name for path in (stage.folder / "run").glob("checkpoint-*")}


def writes_a_checkpoint(stage: Stage) -> None:
    """And with it begins the journal's next files."""
    before = kept(stage)
    stage.until(lambda _: bool(kept(stage) - before), "a checkpoint is written")


@contextlib.contextmanager
def strangers(address: str, count: int, says: bytes) -> Iterator[None]:
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            with contextlib.suppress(OSError):  # cut off as they come
                connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
                connection.sendall(says)
        yield


def answers(stage: Stage, path: str) -> int:
    with urllib.request.urlopen(f"http://{stage.metrics}{path}", timeout=20) as answer:
        return int(answer.status)


@pytest.mark.parametrize("where", ["gRPC", "gRPC, without a word", "metrics"])
def test_joined_workers_train_on_while_strangers_take_all_connections(stage: Stage, where: str) -> None:
    limit = 160
    server = stage.server(
        through=["prlimit", f"--nofile={limit // 2}:{limit}"],
        metrics_listen="127.0.0.1:0",
        failure_timeout_seconds=5,
        **SMALL,
    )
    worker = stage.worker("w", failure_timeout_seconds=5)
    stage.until(lambda status: status.iteration.number > 10, "it trains")
    with grpc.insecure_channel(stage.address) as operator:  # joined before the flood, as the worker
        status = ParameterServerStub(operator).GetStatus
        begun = status(pb.GetStatusRequest(), timeout=20, wait_for_ready=True).iteration.number
        address = stage.metrics if where == "metrics" else stage.address
        says = {"gRPC": PREFACE, "metrics": b"GET /metrics HTTP/1.1\r\nX: "}.get(where, b"")
        before = kept(stage)
        with strangers(address, 2 * limit, says):
            descriptors = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
            assert descriptors <= limit - 40, "those that the journal may need are left"
            while status(pb.GetStatusRequest(), timeout=20).iteration.number < begun + 50 or not kept(stage) - before:
                assert server.process.poll() is None, server.log.read_text()
            assert answers(stage, "/alive") == 200
            assert worker.process.poll() is None
    trains_on(stage, worker)
    writes_a_checkpoint(stage)
    assert worker.terminate() == 0
    assert server.terminate() == 0
    assert not [line for line in server.log.read_text().splitlines() if " ERROR " in line or "Traceback" in line]


def test_a_server_without_descriptors_for_its_workers_says_how_many_it_needs(stage: Stage) -> None:
    server = stage.program(
        "server", "serve", "--listen", "127.0.0.1:0", module="ormo_server", through=["prlimit", "--nofile=100:100"]
    )
    assert server.wait() == 1
    assert "file descriptors, and may have 100: raise the limit (`ulimit -n`), or lower" in server.log.read_text()


# Threads


class OtherUser:
    """A user with few processes, whom the limit counts apart from all others. Root, who makes it, has none."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.number = random.randrange(1 << 20, 1 << 30)
        os.chown(folder, self.number, self.number)
        rights = "+dac_override,+dac_read_search"  # the folders of tests are root's alone
        self.through = [
            *("setpriv", f"--reuid={self.number}", f"--regid={self.number}", "--clear-groups"),
            *(f"--inh-caps={rights}", f"--ambient-caps={rights}", "--bounding-set=-sys_resource,-sys_admin"),
            *("prlimit", f"--nproc={processes}:{processes}"),
        ]


as_root = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv, to be another user"
)

# Starts threads until there are no more, and says so.
HOG = """
import sys, threading
wait = threading.Event()
count = 0
try:
    while True:
        threading.Thread(target=wait.wait, daemon=True).start()
        count += 1
except RuntimeError:
    print(count, flush=True)
sys.stdin.read()
"""


@as_root
def test_training_goes_on_while_no_thread_can_be_started(stage: Stage) -> None:
    user = OtherUser(stage.folder, NEEDED_THREADS + 20)
    server = stage.server(through=user.through, metrics_listen="127.0.0.1:0", **SMALL)
    worker = stage.worker("w")
    stage.until(lambda status: status.iteration.number > 10, "it trains")
    with subprocess.Popen(
        [*user.through, sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as hog:
        assert hog.stdout is not None
        assert hog.stdin is not None
        try:
            assert int(hog.stdout.readline()) > 0
            with strangers(stage.metrics, 30, b"GET /metrics HTTP/1.1\r\nX: "):
                assert answers(stage, "/alive") == 200
                trains_on(stage, worker)
            second = stage.worker("second")
            stage.until(lambda status: len(status.workers) == 2, "another one joins")
            writes_a_checkpoint(stage)
            assert [one.terminate() for one in (worker, second)] == [0, 0]
            assert server.terminate(60) == 0
        finally:
            hog.stdin.close()
    assert "Traceback" not in server.log.read_text()


@as_root
def test_a_server_without_threads_for_its_calls_says_how_many_it_needs(stage: Stage) -> None:
    user = OtherUser(stage.folder, NEEDED_THREADS - 20)
    flags = ("--listen", "127.0.0.1:0", "--metrics-listen", "", "--max-workers", "2")
    server = stage.program("server", "serve", *flags, module="ormo_server", through=user.through)
    assert server.wait() == 1
    log = server.log.read_text()
    assert f"this server needs {NEEDED_THREADS} threads, and the system does not give it that many" in log
    assert f"`ulimit -u`, for all of this user's programs: {NEEDED_THREADS - 20}" in log
    assert "Traceback" not in log
