"""The shells that stand before worker and evaluator, run as they are with a stand-in for the program."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from deploy.kubernetes.rendering import Pod, overlay

# Does as the real worker: leaves on SIGTERM with code 0.
STAND_IN = """#!/bin/sh
echo "$0 $*" >> "$LOG"
trap 'echo left >> "$LOG"; exit 0' TERM
echo started
[ "$CODE" = stay ] || exit "$CODE"
while true; do sleep 0.05; done
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    program = tmp_path / "ormo-worker"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    return tmp_path / "log"


def start(pod: Pod, log: Path, code: str) -> subprocess.Popen[str]:
    environment = {"PATH": f"{log.parent}:{os.environ['PATH']}", "LOG": str(log), "CODE": code}
    return subprocess.Popen(
        [*pod.container["command"], *pod.container["args"]],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> int:
    try:
        process.communicate(timeout=20)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode


def worker() -> Pod:
    return overlay("local").pods("ormo-worker")[0]


def evaluator() -> Pod:
    return overlay("local").pods("ormo-evaluator")[0]


@pytest.mark.parametrize("code", [0, 1, 2, 3, 137])
def test_exit_code_of_a_worker_that_ends_by_itself_is_passed_on(log: Path, code: int) -> None:
    assert ended(start(worker(), log, str(code))) == code
    assert log.read_text().endswith("/ormo-worker run\n")


def test_evicted_worker_leaves_the_run_and_is_not_taken_for_done(log: Path) -> None:
    process = start(worker(), log, "stay")
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    assert ended(process) == 128 + signal.SIGTERM
    assert log.read_text().endswith("left\n")


@pytest.mark.parametrize("code", [1, 2])
def test_failure_of_an_evaluator_ends_its_container(log: Path, code: int) -> None:
    assert ended(start(evaluator(), log, str(code))) == code


@pytest.mark.parametrize("code", ["stay", "0"])
def test_evaluator_stays_after_the_run_and_ends_at_once_when_told(log: Path, code: str) -> None:
    process = start(evaluator(), log, code)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == 128 + signal.SIGTERM
