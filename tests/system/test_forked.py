"""Programs that are forked are programs like those that are started."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from system.forked import Forked

CODE = """
import os, sys
print(*sys.argv[1:], os.getcwd(), sorted(os.environ), sys.stdin.read() == "", os.getpid(), sep="|", flush=True)
print("said", file=sys.stderr)
if sys.argv[1] == "waits":
    import time
    time.sleep(100)
if sys.argv[1] == "fails":
    raise ValueError("spoilt")
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "acted.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return "acted"


def forked(module: str, folder: Path, word: str) -> Forked:
    return Forked(module, [word], folder=folder, log=folder / "log", environment={"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(("word", "code"), [("0", 0), ("7", 7), ("fails", 1)])
def test_it_does_as_one_that_is_started(module: str, tmp_path: Path, word: str, code: int) -> None:
    program = forked(module, tmp_path, word)
    with program.stdout:
        said = program.stdout.read()
    assert said == f"{word}|{tmp_path}|['OMP_NUM_THREADS']|True|{program.pid}\n"
    assert program.wait(10) == program.poll() == code
    log = (tmp_path / "log").read_text()
    assert log.startswith("said\n")
    assert ("ValueError: spoilt" in log) == (code == 1)
    started = [sys.executable, tmp_path / "acted.py", word]
    assert subprocess.run(started, capture_output=True, check=False, stdin=subprocess.DEVNULL).returncode == code


def test_it_can_be_waited_for_and_killed(module: str, tmp_path: Path) -> None:
    program = forked(module, tmp_path, "waits")
    with program.stdout:
        assert program.stdout.readline()
        assert program.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(0.01)
        os.kill(program.pid, signal.SIGTERM)
        assert program.wait(10) == -signal.SIGTERM
