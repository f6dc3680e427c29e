"""A Docker Engine of the tests' own, from Debian's packages, with all that it starts in namespaces that end with them.

`make test-containers` starts pytest itself in a network, and a numbering of processes, of its own: whatever happens to
it, no container, bridge, rule or mount is left.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from deploy.docker.tree import ROOT
from deploy.platforms.trees import Trees

# The folder of the trees; only the Makefile's word sets it, which starts pytest in namespaces as well.
VARIABLE = "ORMO_CONTAINERS"
_READY_SECONDS = 120.0
_CGROUPS = Path("/sys/fs/cgroup")


def needed() -> None:
    """Leave out the module that says so, where `make test-containers` did not prepare anything."""
    if VARIABLE not in os.environ:
        pytest.skip("it starts containers: `make test-containers` does", allow_module_level=True)


class Engine:
    """An engine that runs.

    Attributes:
        trees: what there is to make images of.
        folder: of this run, with the same path in the engine; it goes with it.
    """

    def __init__(self, trees: Trees, folder: Path, process: "subprocess.Popen[bytes]") -> None:
        self.trees = trees
        self.folder = folder
        self.process = process

    def docker(self, *words: object, seconds: float = 1800.0, env: Mapping[str, str] | None = None) -> str:
        """What a command of `docker` prints to stdout; AssertionError with all that it said if it fails."""
        ran = subprocess.run(
            self._client(words),
            capture_output=True,
            text=True,
            timeout=seconds,
            env=_environment(env),
            check=False,
        )
        command = " ".join(["docker", *map(str, words)])
        assert ran.returncode == 0, f"{command} ended with {ran.returncode}:\n{ran.stdout[-5000:]}{ran.stderr[-5000:]}"
        return ran.stdout

    def begin(self, *words: object, **how: Any) -> "subprocess.Popen[str]":
        """Start a command of `docker` that goes on."""
        return subprocess.Popen(self._client(words), env=_environment(None), text=True, **how)

    def both_outputs(self, container: str) -> tuple[list[str], list[str]]:
        """The lines of a container's stdout and stderr since it was made."""
        ran = subprocess.run(
            self._client(["logs", container]), capture_output=True, text=True, env=_environment(None), check=True
        )
        return ran.stdout.splitlines(), ran.stderr.splitlines()

    def _client(self, words: Sequence[object]) -> list[str]:
        inside = ["nsenter", f"--mount=/proc/{self.process.pid}/ns/mnt", "--"]
        return [*inside, "docker", *map(str, words)]

    def is_ready(self) -> bool:
        assert self.process.poll() is None, f"the engine ended with {self.process.returncode}:\n{self.log()}"
        asked = subprocess.run(self._client(["version"]), capture_output=True, env=_environment(None), check=False)
        return asked.returncode == 0

    def log(self) -> str:
        """The end of what the engine says."""
        return (self.folder / "engine.log").read_text()[-5000:]


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    """Nothing of this machine gets into a container by way of the client."""
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"} | dict(more or {})


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """Run one until the block ends."""
    trees = Trees(Path(os.environ[VARIABLE]).resolve())
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for left in trees.engine.parent.glob("run-*"):  # of one that was killed
        shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=trees.engine.parent))
    folder.chmod(0o755)  # containers read files in it, as nobody in particular
    (folder / "docker").mkdir()
    cgroup = f"ormo-{Path('/proc/self/ns/net').stat().st_ino}"
    script = Path(__file__).with_name("engine.sh")
    words = [script, trees.engine, folder / "docker", f"/{cgroup}", ROOT, trees.engine.parent]
    with (folder / "engine.log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", *map(str, words)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        made = Engine(trees, folder, process)
        _until_ready(made)
        yield made
    finally:
        _end(process)
        _remove_cgroups(cgroup)
        shutil.rmtree(folder)


def _until_ready(made: Engine) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not made.is_ready():
        assert time.monotonic() < deadline, f"the engine does not answer:\n{made.log()}"
        time.sleep(0.2)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM has the engine stop its containers and take its mounts away."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


def _remove_cgroups(name: str) -> None:
    """The one thing that belongs to no namespace."""
    found = [*_CGROUPS.glob(name), *_CGROUPS.glob(f"*/{name}")]
    for top in found:
        for path in sorted(top.rglob("*"), reverse=True):
            if path.is_dir():
                path.rmdir()
        top.rmdir()
