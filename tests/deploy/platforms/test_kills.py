"""The server's container is killed under load, with the journal on a volume, and nothing is lost or doubled.

Load, evidence and checker are those of `make chaos`.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, cast

import pytest

from chaos.checker import violations
from chaos.closed_form import deviations
from chaos.diaries import read_diaries
from chaos.disk import Disk
from chaos.evidence import Evidence
from chaos.faults import kill_server
from chaos.lives import read_lives
from chaos.stage import Load, Stage
from deploy.docker.tree import ROOT
from deploy.platforms.checks import USER
from deploy.platforms.engine import Engine, needed

needed()
pytestmark = pytest.mark.timeout(1200)
KILLS = 50
WORKERS = 3
_LEASE_SECONDS = 2.0
_SILENCE_SECONDS = 12.0  # as in `make chaos`
_NAME = "killed-server"
# As compose.yaml has it; no `init`, so that the program is process 1 and nothing softens its end.
_CONTAINED = (
    *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"),
    *("--tmpfs", "/tmp:size=64m,mode=1777", "--memory", "2g", "--pids-limit", "512"),
    *("--env", "ORMO_INSECURE=true", "--env", "OMP_NUM_THREADS=1", "--publish", "127.0.0.1:50051:50051"),
)
_FLAGS = (
    *("--method", "asgd", "--learning-rate", "1", "--failure-timeout-seconds", str(_LEASE_SECONDS)),
    *("--checkpoint-seconds", "0.7", "--max-workers", str(2 * WORKERS), "--journal", "--journal-fsync", "always"),
)


class _Attached:
    """A container's life as the stage knows processes: what it prints, its number, its end."""

    def __init__(self, engine: Engine, log: Path) -> None:
        self._engine = engine
        with log.open("ab") as stderr:
            self._client = engine.begin("start", "--attach", _NAME, stdout=subprocess.PIPE, stderr=stderr)
        self.stdout = self._client.stdout

    @property
    def pid(self) -> int:
        """Of process 1 in the container."""
        return int(self._engine.docker("inspect", _NAME, "-f", "{{.State.Pid}}"))

    def poll(self) -> int | None:
        return self._client.poll()

    def wait(self, seconds: float) -> int:
        """A container's code for a signal is 128 more; a process' is the negative one."""
        code = self._client.wait(seconds)
        assert self.stdout is not None
        self.stdout.close()
        return 128 - code if code == 128 + signal.SIGKILL else code


class ContainerStage(Stage):
    """A stage whose server is a container, always the same, with a volume on the stage's disk."""

    def __init__(self, engine: Engine, folder: Path, disk: Disk, load: Load) -> None:
        super().__init__(folder, disk, [], load)
        self._engine = engine
        os.chown(disk.path, USER, USER)
        place = ("--opt", "type=none", "--opt", "o=bind", "--opt", f"device={disk.path}")
        engine.docker("volume", "create", *place, _NAME)
        given = ("--name", _NAME, "--volume", f"{_NAME}:/data", *_CONTAINED)
        engine.docker("create", *given, "ormo-server:local", "serve", *_FLAGS)

    def begin_server(self, environment: dict[str, str] | None = None) -> None:
        self.archive.begin_life()
        self.server = cast(Any, _Attached(self._engine, self.folder / "server.log"))

    def end_server(self, how: signal.Signals) -> int:
        assert self.server is not None
        self.memory.look()
        self._engine.docker("kill", "--signal", how.name, _NAME)
        return self.server.wait(60)

    def close(self) -> None:
        super().close()
        self._engine.docker("rm", "--force", _NAME)
        self._engine.docker("volume", "rm", _NAME)


def test_fifty_kills_of_the_server_s_container_lose_and_double_nothing(
    docker: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT / "tests")  # where the load is a module
    folder, seed = docker.folder / "kills", random.SystemRandom().randrange(1 << 32)
    folder.mkdir()
    dice, disk = random.Random(seed), Disk(folder, mounting=False)
    stage = ContainerStage(docker, folder, disk, Load(WORKERS, 80_000, 0.005, _LEASE_SECONDS))
    try:
        stage.start_server()
        for column in range(WORKERS):
            stage.start_worker(column)
        stage.until_answered(10, "at the start", each=1)
        for number in range(KILLS):
            time.sleep(dice.uniform(0.05, 1.0))  # of training, when the kill may come at any moment
            assert kill_server(stage, dice, _LEASE_SECONDS)
            stage.until_answered(10, f"after kill {number + 1}, seed {seed}")
        wrong = stage.finish()
    finally:
        stage.close()
    evidence = judged(folder, disk.path / "archive")
    found = violations(evidence, workers=WORKERS, bound_seconds=_SILENCE_SECONDS, plain_sgd=True, long=False)
    assert [*wrong, *found, *deviations(disk.path / "archive", WORKERS)] == [], f"seed {seed}"
    assert len(evidence.starts) == KILLS + 1
    assert evidence.applied is not None
    with capsys.disabled():
        print(f"\n{KILLS} kills: {len(evidence.told):,} acknowledged, {len(evidence.applied):,} applied")  # noqa: T201


def judged(folder: Path, archive: Path) -> Evidence:
    evidence = Evidence()
    read_diaries(evidence, folder)
    read_lives(evidence, archive, journal=True)
    return evidence
