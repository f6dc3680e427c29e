"""A state that has become infinite all the same, as an earlier version's could: it is served and kept no further."""

import contextlib
import math
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.service.server import Server
from service.wire import SMALL, Refused, WireWorker, connected, payload, served
from system.forked import Forked

# Gradients are taken as they were before anybody asked whether they may be.
SERVE_AS_BEFORE = """
import sys
from ormo_server.cli import main
from ormo_server.core.rules import UPDATE_RULES
for rule in UPDATE_RULES.values():
    rule.stays_finite = lambda *_: True
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def poison(server: Server) -> None:
    with server.host.engine.inspect() as machine:
        machine.state.params[-1] = math.inf


def ready(server: Server) -> int:
    try:
        with urllib.request.urlopen(f"http://{server.metrics_address}/ready", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def check_is_refused(server: Server, worker: WireWorker) -> None:
    assert server.host.engine.broken.is_set()
    assert ready(server) == 503
    with pytest.raises(
        Refused, match=r"the model.* has NaN or infinite values: the server stops, try again"
    ) as refused:
        worker.push(payload(SMALL, 1.0))
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
    assert server.host.engine.iteration()[1] == 1


@contextlib.contextmanager
def trained(directory: Path) -> Iterator[tuple[Server, WireWorker]]:
    """A server that is at iteration 1, and a worker that has its next ticket."""
    with served(directory, metrics_listen="127.0.0.1:0") as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        worker.push(payload(SMALL, 1.0))
        worker.pull()
        yield server, worker


def test_the_next_checkpoint_finds_it_and_nothing_is_taken_any_more(tmp_path: Path) -> None:
    with trained(tmp_path) as (server, worker):
        before = server.host.files.last_checkpoint
        assert ready(server) == 200
        poison(server)
        assert not server.host.checkpoint()
        check_is_refused(server, worker)
        assert not server.host.checkpoint()
        assert server.host.files.last_checkpoint == before


def test_the_first_gradient_that_comes_of_it_finds_it(tmp_path: Path) -> None:
    with trained(tmp_path) as (server, worker):
        with pytest.raises(Refused, match="NON_FINITE"):
            worker.push(payload(SMALL, math.nan))
        assert not server.host.engine.broken.is_set(), "the model is sound: it is the gradient that is not"
        poison(server)
        with pytest.raises(Refused, match=r"NOT_READY.*the model has NaN or infinite values"):
            worker.push(payload(SMALL, math.nan))
        check_is_refused(server, worker)


def test_a_server_that_stops_or_is_closed_is_not_ready(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        asked = health_pb2.HealthCheckRequest()
        with grpc.insecure_channel(server.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(asked).status == health_pb2.HealthCheckResponse.SERVING
            server._stop_serving("the test")
            assert health.Check(asked).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_the_process_ends_with_a_sentence_and_a_restart_trains_on_from_before(tmp_path: Path) -> None:
    script, log = tmp_path / "before.py", tmp_path / "log"
    script.write_text(SERVE_AS_BEFORE)

    @contextlib.contextmanager
    def start() -> Iterator[Forked]:
        flags = ["--listen", "127.0.0.1:0", "--metrics-listen", "", "--directory", "run", "--method", "asgd"]
        flags += ["--learning-rate", "1", "--checkpoint-seconds", "1e6"]
        process = Forked(script, flags, folder=tmp_path, log=log, environment=os.environ)
        try:
            yield process
        finally:
            process.kill()
            process.wait(10)
            process.stdout.close()

    def worker_of(process: Forked, channels: list[grpc.Channel]) -> WireWorker:
        channels.append(grpc.insecure_channel(process.stdout.readline().split()[1].removeprefix("address=")))
        worker = WireWorker(ParameterServerStub(channels[-1]), "a", incarnation=len(channels))
        worker.join()
        worker.pull()
        return worker

    channels: list[grpc.Channel] = []
    with start() as process:
        worker = worker_of(process, channels)
        for _ in range(2):
            worker.push(payload(SMALL, 3e38))
            worker.pull()
        assert worker.params[0].item() == -math.inf
        with pytest.raises(Refused):
            worker.push(payload(SMALL, math.nan))
        assert process.wait(60) == 1
        critical = [line for line in log.read_text().splitlines() if " CRITICAL " in line]
        assert len(critical) == 1
        assert (
            "can't be kept on disk (the model has NaN or infinite values): stopping; a restart continues" in critical[0]
        )
    with start() as again:
        worker = worker_of(again, channels)
        assert worker.push(payload(SMALL, 1.0)).iteration.number == 1
        os.kill(again.pid, signal.SIGTERM)
        assert again.wait(60) == 0
    for channel in channels:
        channel.close()
