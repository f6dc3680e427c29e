"""A log that takes no more, and callers who try to fill it: training goes on, and what it grows by is bounded."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import grpc
import pytest

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from service.wire import SMALL, Refused, WireWorker, payload
from system.programs import ENVIRONMENT

PUSHES = 100


@contextlib.contextmanager
def full_pipe() -> Iterator[int]:
    """The writing end of one that nobody reads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    try:
        yield writer
    finally:
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def stderr_that_is(kind: str) -> Iterator[int | None]:
    if kind == "a pipe that nobody reads":
        with full_pipe() as writer:
            yield writer
    elif kind == "on a full disk":
        with open("/dev/full", "wb") as full:  # noqa: PTH123
            yield full.fileno()
    else:
        yield None


@contextlib.contextmanager
def serving(folder: Path, stderr: int | IO[bytes] | None, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "ormo_server", "serve", "--listen", "127.0.0.1:0", "--metrics-listen", ""]
    command += ["--directory", str(folder / "run"), *flags]
    if stderr is None:
        command = ["sh", "-c", 'exec "$0" "$@" 2>&-', *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().split()[1].removeprefix("address=")
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["a pipe that nobody reads", "on a full disk", "closed"])
def test_training_goes_on_and_ends_in_order_with_a_stderr_that_is(kind: str, tmp_path: Path) -> None:
    with (
        stderr_that_is(kind) as stderr,
        serving(tmp_path, stderr, "--log-level", "debug", "--journal") as (process, address),
        grpc.insecure_channel(address) as channel,
    ):
        worker = WireWorker(ParameterServerStub(channel), "a")
        worker.join()
        for number in range(PUSHES):
            worker.pull()
            assert worker.push(payload(SMALL, 1.0)).iteration.number == number + 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert (tmp_path / "run" / "latest").resolve().name.endswith(f"iteration-{PUSHES}")


def test_whatever_callers_do_the_log_grows_by_little(tmp_path: Path) -> None:
    log, began = tmp_path / "log", time.monotonic()
    with (
        log.open("wb") as stderr,
        serving(tmp_path, stderr) as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        stub = ParameterServerStub(channel)
        for _ in range(200):  # offers that break off: each is told the memory that it needs
            worker = WireWorker(stub, "w")
            worker.ask_to_join()
            with contextlib.suppress(Refused):
                worker.offer(iter(()))
        for number in range(300):
            worker = WireWorker(stub, "w", incarnation=number + 1)
            worker.join()
            worker.pull()
            with contextlib.suppress(Refused):
                worker.push(payload(SMALL, float("nan")))
            stub.Leave(pb.LeaveRequest(worker="w", incarnation=worker.incarnation))
    told, spells = log.read_text(), 2 + (time.monotonic() - began) // 10
    for kind in (" joined ", " left", " a model of "):
        assert 50 <= told.count(kind) <= 50 * spells, kind
    assert told.count("\n") <= (3 * 50 + 2 * 5 + 20) * spells
    assert len(told) <= 200 * told.count("\n")
