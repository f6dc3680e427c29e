"""`deploy/slurm/ormo.sbatch` under a real Slurm of two nodes. `make test-slurm` runs it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from docs.pages import ROOT, blocks, text_of
from integrations.diaries import Diaries
from integrations.ports import free_ports
from integrations.slurm_cluster import Job, Slurm, slurm
from system.programs import Stage, staged

if "TEST_SLURM" not in os.environ:
    pytest.skip("it starts a cluster: `make test-slurm` does", allow_module_level=True)
pytestmark = pytest.mark.timeout(600)
HERE = Path(__file__).parent
SCRIPT = ROOT / "deploy" / "slurm" / "ormo.sbatch"
BIN = Path(sys.executable).parent
COUNTING = {"ORMO_METHOD": "asgd", "ORMO_LEARNING_RATE": "1", "ORMO_FAILURE_TIMEOUT_SECONDS": "3"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm() as made:
        yield made


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path) as made:
        yield made


Submit = Callable[..., Job]


@pytest.fixture
def submit(cluster: Slurm, tmp_path: Path) -> Iterator[Submit]:
    """Submits the script with flags for `sbatch`, and settings in the environment."""
    jobs = []

    def submitted(*flags: str, **settings: str) -> Job:
        (port,) = free_ports(1)
        cluster.mend()
        cluster.environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", "DIARIES": str(tmp_path)}
        given = {"ORMO_TASK": f"{HERE}/diary_task.py:Diary", "ORMO_LISTEN": f"127.0.0.1:{port}"} | COUNTING | settings
        command = ["sbatch", "--parsable", "--chdir", str(tmp_path), *flags, str(SCRIPT)]
        environment = cluster.environment | {name: value for name, value in given.items() if value}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        jobs.append(Job(cluster, tmp_path, done.stdout.strip()))
        return jobs[-1]

    yield submitted
    for job in jobs:
        cluster.typed("scancel", job.number)
        job.until(lambda job=job: cluster.typed("squeue", "--noheader", "--jobs", job.number).strip() == "")


def diaries(job: Job) -> Diaries:
    return Diaries(job.folder, f"slurm-{job.number}", job.folder / "runs" / f"slurm-{job.number}")


def test_a_requeued_job_goes_on_with_all_that_was_acknowledged_and_ends_with_the_run(
    cluster: Slurm, submit: Submit
) -> None:
    job = submit("--ntasks=4", "--ntasks-per-node=2", ORMO_STOP_AFTER_GRADIENTS="3000")
    told = diaries(job)
    job.until_logged("K is 4")
    job.until(told.longer(10, range(4)))
    cluster.typed("scontrol", "requeue", job.number)
    job.until(lambda: job.says("Restarts") == "1" and job.says("JobState") == "RUNNING")
    job.until_ended("COMPLETED")
    assert sum(told.counts()) == 3000
    told.assert_counted_once(range(4), interrupted=4)
    assert re.search(r"the run is over at iteration 3000", job.log)


def test_a_job_whose_time_is_nearly_up_leaves_a_checkpoint_and_queues_itself_again(submit: Submit) -> None:
    job = submit("--ntasks=2", "--time=3", "--signal=B:USR1@60")
    told = diaries(job)
    job.until(lambda: job.says("Restarts") == "1")
    assert job.log.count("interrupted: left the run") == 2
    assert "draining" in job.log
    job.until(told.longer(10, range(2)))  # again


def test_a_job_that_is_told_to_end_leaves_a_checkpoint_and_does_not_come_back(cluster: Slurm, submit: Submit) -> None:
    job = submit("--ntasks=2")
    told = diaries(job)
    job.until(told.longer(10, range(2)))
    cluster.typed("scancel", "--batch", "--signal=TERM", job.number)
    job.until_ended("COMPLETED")
    assert job.says("Restarts") == "0"
    assert job.log.count("interrupted: left the run") == 2
    told.assert_counted_once(range(2), interrupted=2)


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_job_that_loses_a_node_starts_again_with_all_that_was_acknowledged(
    cluster: Slurm, submit: Submit, node: str
) -> None:
    job = submit("--ntasks=2", "--ntasks-per-node=1", "--nodes=2")
    told = diaries(job)
    job.until(told.longer(10, range(2)))
    cluster.kill_node(node)
    job.until(lambda: job.says("Restarts") == "1")
    cluster.mend()
    job.until(told.longer(10, range(2)))
    cluster.typed("scancel", "--batch", "--signal=TERM", job.number)
    job.until_ended("COMPLETED")
    told.assert_counted_once(range(2), interrupted=4)


def test_workers_of_a_server_elsewhere_are_requeued_one_by_one_and_k_follows(
    cluster: Slurm, submit: Submit, stage: Stage
) -> None:
    stage.server(failure_timeout_seconds=3)
    jobs = [
        submit("--ntasks=1", f"--nodelist={node}", ORMO_SERVER=stage.address, ORMO_TASK="digits")
        for node in ("n1", "n2")
    ]
    stage.until(lambda status: status.bucket_size == 2, "both are members", 180)
    cluster.kill_node("n2")
    before = stage.until(lambda status: status.bucket_size == 1, "K follows").iteration.number
    jobs[1].until(lambda: jobs[1].says("Restarts") == "1")
    stage.until(lambda status: status.iteration.number > before, "the other one goes on")
    assert jobs[0].says("JobState") == "RUNNING"
    cluster.mend()
    stage.until(lambda status: status.bucket_size == 2, "both are members again", 180)
    assert jobs[0].says("Restarts") == "0"


def test_a_server_that_is_killed_comes_back_within_the_job(cluster: Slurm, submit: Submit) -> None:
    job = submit("--ntasks=2", ORMO_STOP_AFTER_GRADIENTS="2000")
    told = diaries(job)
    job.until(told.longer(10, range(2)))
    job.server().kill()
    job.until_logged("the server ended with code 137 and is started again in 5 s")
    job.until_ended("COMPLETED")
    assert sum(told.counts()) == 2000
    told.assert_counted_once(range(2), interrupted=0)


def test_settings_that_cannot_be_used_end_the_job_at_once(submit: Submit) -> None:
    job = submit("--ntasks=1", ORMO_METHOD="none", ORMO_CONNECT_TIMEOUT_SECONDS="600")
    job.until_ended("FAILED")
    assert job.says("ExitCode") == "2:0"
    assert "method 'none' is not known" in job.log


LINES = [line for block in blocks(text_of("with/slurm.md"), "sh") for line in block.splitlines()]


@pytest.mark.parametrize("line", LINES)
def test_lines_of_the_page_are_understood_by_sbatch(cluster: Slurm, line: str) -> None:
    program, *words = shlex.split(line)
    done = subprocess.run(
        [program, "--test-only", *words], cwd=ROOT, env=cluster.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_first_line_of_the_page_trains(submit: Submit) -> None:
    *flags, script = shlex.split(LINES[0])[1:]
    assert ROOT / script == SCRIPT
    unset = dict.fromkeys(("ORMO_TASK", *COUNTING), "")
    job = submit(*flags, **unset)
    job.until_ended("COMPLETED")
    assert (job.folder / "runs" / f"slurm-{job.number}" / "latest" / "model.safetensors").exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="apt-get install shellcheck")
def test_the_script_has_nothing_that_shellcheck_complains_of() -> None:
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)
