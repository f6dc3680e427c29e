"""A disk that is full has no room, and has it again afterwards; with the layer, and with a file system of its own."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from chaos.disk import Disk

PROBE = """
import errno, os, sys
from pathlib import Path
from chaos.disk import Disk
from chaos.faulty_server import make_faulty

disk = Disk(Path(sys.argv[1]), mounting=sys.argv[2] == "own")
make_faulty(disk.control)
file = os.open(disk.path / "file", os.O_RDWR | os.O_CREAT)

def written(offset):
    try:
        return os.pwrite(file, b"x" * (1 << 20), offset)
    except OSError as error:
        return errno.errorcode[error.errno]

said = [disk.is_real, written(0)]
with disk.full():
    said += [written(1 << 20), written(2 << 20), disk.free_bytes < (1 << 20) or disk.faults() > 0]
print(*said, written(0), sep=",")
"""


def probed(folder: Path, how: str, *before: str) -> str:
    command = [*before, sys.executable, "-c", PROBE, str(folder), how]
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": paths})
    return done.stdout.strip()


def test_how_long_it_lasts_follows_from_what_was_written_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("chaos.disk.time.monotonic", lambda: now)
    monkeypatch.setattr(Disk, "used_bytes", 1 << 30)
    monkeypatch.setattr("chaos.disk.psutil.virtual_memory", lambda: SimpleNamespace(available=10 << 30))  # so it has 4
    disk = Disk(tmp_path, mounting=False)
    assert disk.lasts(1e9), "a layer is not used up"
    disk.is_real, now = True, 110.0
    assert disk.lasts(29.0)
    assert not disk.lasts(31.0)


def may_mount(folder: Path) -> bool:
    words = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_the_layer_lets_no_gradient_through(tmp_path: Path) -> None:
    assert probed(tmp_path, "shared") == "False,1048576,ENOSPC,ENOSPC,True,1048576"


def test_a_real_one_has_no_room(tmp_path: Path) -> None:
    if not may_mount(tmp_path):
        pytest.skip("mounting is not permitted here")
    assert probed(tmp_path, "own", "unshare", "--mount") == "True,1048576,ENOSPC,ENOSPC,True,1048576"


def test_nothing_is_mounted_where_it_would_be_for_all(tmp_path: Path) -> None:
    assert not Disk(tmp_path, mounting=False).is_real
