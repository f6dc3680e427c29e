"""`ormo-ray` on a real cluster of several nodes. `make test-ray` runs it."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest
import yaml
from jsonschema import ValidationError
from safetensors.torch import load_file

from chaos.archive import Archive
from chaos.evidence import Evidence
from chaos.lives import read_lives
from docs.pages import ROOT, blocks, example, text_of
from integrations.diaries import Diaries
from integrations.ports import free_ports
from integrations.ray_cluster import APART, Cluster, Command, Node, cluster, until
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from system.programs import ENVIRONMENT, staged

if "TEST_RAY" not in os.environ:
    pytest.skip("it starts clusters: `make test-ray` does", allow_module_level=True)
pytestmark = pytest.mark.timeout(600)

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


@pytest.mark.parametrize("launched", [("actors", "--workers", 2)], indirect=True)
def test_an_actor_that_dies_takes_its_program_with_it_and_comes_back_with_it(launched: Launched) -> None:
    launched.until_acknowledged(5, range(2))
    for module in ("ormo_server", "ormo_worker"):
        of_actor = program(launched.cluster.nodes[0], module)
        of_actor.parent().kill()
        of_actor.wait(60)
        launched.until_acknowledged(5, range(2))
    launched.command.signal(signal.SIGTERM)
    assert launched.command.wait() == 130
    launched.diaries.assert_counted_once(range(2), interrupted=3)


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


PAGE = text_of("with/ray.md")
LINES = [line for block in blocks(PAGE, "sh") for line in block.splitlines()]


@pytest.mark.parametrize("launched", [("refused", "--server-flags=--method none")], indirect=True)
def test_a_server_that_cannot_start_ends_the_run_with_its_sentence(launched: Launched) -> None:
    assert launched.command.wait() == 2
    assert "ormo-ray: the server did not start: " in launched.command.text
    assert "method 'none' is not known" in launched.command.text


def test_workers_of_a_server_elsewhere_come_and_end_with_its_run(shared: Cluster, tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        server = stage.server(stop_after_gradients=200)
        words = [*ORMO_RAY, "--name", "elsewhere", "--address", shared.address, "--server", stage.address]
        run = Command(tmp_path / "run.log", shared.environment, *words, "--workers", 2)
        assert run.wait() == 0, run.text
        assert "the run is over at iteration 200\n" in run.text
        assert server.process.poll() is None
        unusable = Command(tmp_path / "unusable.log", shared.environment, *words, "--task", "no.such:Task")
        assert unusable.wait() == 2
        assert "elsewhere-1 ended with code 2 and is not started again" in unusable.text
        assert "all workers failed; the last one with code 2: " in unusable.text


def test_without_a_cluster_a_sentence_says_how_to_start_one(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    run = Command(tmp_path / "run.log", ENVIRONMENT | APART, *ORMO_RAY, "--address", f"127.0.0.1:{port}")
    assert run.wait() == 1
    assert f"ormo-ray: no Ray cluster at --address 127.0.0.1:{port} (" in run.text
    assert "start one with `ray start --head`" in run.text


def test_the_first_line_of_the_page_trains(tmp_path: Path) -> None:
    program, *words = shlex.split(LINES[0])
    assert program == "ormo-ray"
    run = Command(tmp_path / "run.log", ENVIRONMENT | APART, *ORMO_RAY, *words, "--server-port", *free_ports(1))
    assert run.wait() == 0, run.text
    found = re.search(r"the run is over at iteration 1500; its model is in (.*)$", run.text, re.MULTILINE)
    assert found is not None
    assert load_file(Path(found[1]) / "model.safetensors")


def test_the_actors_of_the_page_train(shared: Cluster, tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        stage.server(stop_after_gradients=100, min_workers=2, learning_rate=0.01)
        code = (
            example("with/ray.md", "actors").replace("127.0.0.1:50051", stage.address).replace("auto", shared.address)
        )
        (tmp_path / "own.py").write_text(code)
        own = Command(tmp_path / "own.log", shared.environment, sys.executable, "own.py")
        assert own.wait() == 0, own.text
        first, second = map(int, re.findall(r"^\[(\d+), (\d+)\]$", own.text, re.MULTILINE)[0])
        assert min(first, second) > 0
        assert first + second == 100


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("ray ")])
def test_lines_for_ray_are_understood_by_it(line: str) -> None:
    from ray.scripts.scripts import cli

    command, words = cli, shlex.split(line)[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("ray", words)


def test_the_example_of_a_cluster_is_one_that_ray_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    written = yaml.safe_load((ROOT / "deploy" / "ray" / "cluster.yaml").read_text())
    validate_config(prepare_config(written))
    with pytest.raises(ValidationError):
        validate_config(prepare_config(written | {"cluster_names": "x"}))
