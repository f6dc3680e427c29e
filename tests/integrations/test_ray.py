"""`ormo-ray` on a real cluster of several nodes. `make test-ray` runs it."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from chaos.archive import Archive
from chaos.evidence import Evidence
from chaos.lives import read_lives
from integrations.diaries import Diaries
from integrations.ports import free_ports
from integrations.ray_cluster import Cluster, Command, Node, cluster, until
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub

pytestmark = [
    pytest.mark.skipif("TEST_RAY" not in os.environ, reason="it starts clusters: `make test-ray` does"),
    pytest.mark.timeout(600),
]

HERE = Path(__file__).parent
COUNTING = "--method asgd --learning-rate 1 --metrics-listen '' --checkpoint-seconds 1e6 --failure-timeout-seconds 3"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with two CPUs each, for tests that leave them as they are."""
    folder = tmp_path_factory.mktemp("cluster")
    with cluster(folder, DIARIES=str(folder)) as made:
        made.add(cpus=2)
        made.add(cpus=2)
        yield made


class Launched:
    """A run of `ormo-ray`."""

    def __init__(self, on: Cluster, folder: Path, name: str, *words: object, server_flags: str = COUNTING) -> None:
        (port,) = free_ports(1)
        self.cluster = on
        self.folder = folder
        self.name = name
        self.diaries = Diaries(Path(on.environment["DIARIES"]), name, folder / "run")
        self.server = f"127.0.0.2:{port}"
        own = ["--server-port", port, "--directory", "run", f"--server-flags={server_flags}"]
        given = ["--name", name, "--address", on.address, "--working-dir", HERE, "--task", "diary_task.py:Diary"]
        self.command = Command(folder / "ormo-ray.log", on.environment, *ORMO_RAY, *given, *own, *words)

    def status(self) -> pb.GetStatusResponse:
        with grpc.insecure_channel(self.server) as channel:
            return ParameterServerStub(channel).GetStatus(pb.GetStatusRequest(), timeout=5, wait_for_ready=True)

    def until_size(self, workers: int) -> pb.GetStatusResponse:
        """Wait until K is this number, and that many workers are members."""
        found = []

        def reached() -> bool:
            try:
                found[:] = [self.status()]
            except grpc.RpcError:
                return False  # not yet, or not any more
            return found[0].bucket_size == len(found[0].workers) == workers

        until(reached, self.command.log, self.command.process)
        return found[0]

    def until_acknowledged(self, more: int, numbers: Iterable[int]) -> None:
        """Wait until each of these workers was told so many times more that its gradient was applied."""
        until(self.diaries.longer(more, numbers), self.command.log, self.command.process)


ORMO_RAY = [sys.executable, "-m", "ormo_worker.integrations.ray.cli"]


@pytest.fixture
def launched(shared: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Launched]:
    """A run with what the test asks for."""
    run = Launched(shared, tmp_path, *request.param)
    yield run
    run.command.close()


def program(of: Node, module: str) -> psutil.Process:
    """The first process on a node that has become this program of ours."""
    return next(
        each
        for each in of.processes()
        if each.cmdline()[1:3] == ["-m", module] and each.status() != psutil.STATUS_ZOMBIE
    )


def test_a_node_that_dies_takes_nothing_that_was_acknowledged_and_k_follows(tmp_path: Path) -> None:
    with cluster(tmp_path, DIARIES=str(tmp_path)) as made:
        made.add(cpus=2)
        dying = made.add(cpus=2)
        archive = Archive(tmp_path / "run", tmp_path / "archive")
        archive.begin_life()
        run = Launched(made, tmp_path, "four", "--workers", 4)
        try:
            run.until_size(4)
            run.until_acknowledged(20, range(4))
            before = run.status().iteration.number
            dying.kill()
            left = {worker.worker for worker in run.until_size(2).workers}  # no room for the others
            assert len(left) == 2
            stayed = sorted(int(name.rpartition("-")[2]) for name in left)
            run.until_acknowledged(20, stayed)
            assert run.status().iteration.number > before
            made.add(cpus=2)
            again = {worker.worker for worker in run.until_size(4).workers}
            assert again == {f"four-{number}" for number in range(4)}
            run.until_acknowledged(20, range(4))
            run.command.signal(signal.SIGTERM)
            assert run.command.wait() == 130
        finally:
            run.command.close()
            archive.close()
        moved = [number for number in range(4) if number not in stayed]
        run.command.until(*(f"four-{number} is on node 127.0.0.4 now" for number in moved))
        run.diaries.assert_counted_once(range(4), interrupted=6)
        assert_journal_tells_the_same(run, tmp_path / "archive")


def assert_journal_tells_the_same(run: Launched, archive: Path) -> None:
    """The journal leads to the last checkpoint's bits, and has each acknowledged gradient where its worker was told."""
    evidence = Evidence()
    read_lives(evidence, archive, journal=True)
    assert evidence.differences == []
    assert evidence.applied is not None
    assert [each.iteration for each in evidence.applied] == list(range(1, evidence.end + 1))
    owners = {each.iteration: each.name[0] for each in evidence.applied}
    for number in range(4):
        name = f"{run.name}-{number}"
        assert [at for at in run.diaries.acknowledged(number) if owners[at] != name] == []


@pytest.mark.parametrize(
    "launched",
    [("deaths", "--workers", 2, "--server-flags=" + COUNTING + " --stop-after-gradients 4000")],
    indirect=True,
)
def test_programs_that_are_killed_are_started_again_and_nothing_that_was_acknowledged_is_lost(
    launched: Launched,
) -> None:
    launched.until_acknowledged(5, range(2))
    program(launched.cluster.nodes[0], "ormo_server").kill()
    launched.command.until("the server ended with code -9 and is started again in 5 s; workers wait")
    launched.until_acknowledged(5, range(2))
    program(launched.cluster.nodes[1], "ormo_worker").kill()
    launched.command.until("ended with code -9 and is started again (1 of 10)")
    assert launched.command.wait() == 0
    assert "the run is over at iteration 4000; its model is in " in launched.command.text
    assert sum(launched.diaries.counts()) == 4000
    launched.diaries.assert_counted_once(range(2), interrupted=1)


@pytest.mark.parametrize("launched", [("scaled", "--workers", 1)], indirect=True)
def test_a_run_is_scaled_while_it_trains(launched: Launched, tmp_path: Path) -> None:
    def scale(*words: object) -> Command:
        environment = launched.cluster.environment
        return Command(
            tmp_path / "scale.log", environment, *ORMO_RAY, "scale", "--address", launched.cluster.address, *words
        )

    launched.until_size(1)
    up = scale("--name", "scaled", "--workers", 3)
    assert up.wait() == 0
    assert "3 workers are wanted now, and were 1 before" in up.text
    launched.until_size(3)
    assert scale("--name", "scaled", "--workers", 2).wait() == 0
    left = launched.until_size(2)
    assert {worker.worker for worker in left.workers} == {"scaled-0", "scaled-1"}
    launched.command.until("scaled-2 leaves", "scaled-2 has left")
    nobody = scale("--name", "other", "--workers", 3)
    assert nobody.wait() == 1
    assert "the cluster has no run named 'other': give --name as the run was started with" in nobody.text
    (tmp_path / "second").mkdir()
    second = Launched(launched.cluster, tmp_path / "second", "scaled", "--workers", 1)
    assert second.command.wait() == 2
    assert "the cluster has a run named 'scaled': give this one another --name and --server-port" in second.command.text
    launched.command.signal(signal.SIGINT)
    assert launched.command.wait() == 130
    assert "the run stands at iteration " in launched.command.text
    launched.diaries.assert_counted_once(range(3), interrupted=3)
