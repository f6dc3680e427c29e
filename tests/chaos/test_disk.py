"""A disk that is full has no room, and has it again afterwards; with the layer, and with a file system of its own."""

import os
import subprocess
import sys
from pathlib import Path

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
