"""The disk is run dry, with real processes: training goes on once there is room, and nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.test_disk import may_mount


def test_a_disk_that_runs_dry_costs_nothing_but_time(tmp_path: Path) -> None:
    if not may_mount(tmp_path):
        pytest.skip("mounting is not permitted here")
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-m", "system.dry_disk", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["alive while it is full"]
    assert said["refused"] == ["", "DISK_FULL"]
    assert said["acknowledged"] >= 30, "three times ten with room"
    assert said["parameters"] == [-said["acknowledged"]]
    code, sentence = said["a start while it is full"]
    assert code == 1
    assert "make room there" in sentence
    assert "Nothing is lost" in sentence
    assert "away" not in sentence
    assert (said["errors of the last start"], said["exit"]) == (0, 0)
