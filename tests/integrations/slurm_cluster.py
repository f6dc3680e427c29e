"""A real Slurm on this machine: Debian's munged, slurmctld, and a slurmd for each of two nodes."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from integrations.ports import free_ports
from system.programs import ENVIRONMENT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
_SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_SECONDS = 180.0
_START_SECONDS = 60.0
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# How long credentials hold is also how long a requeued job waits.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdTimeout=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=128 Gres=gpu:16
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=128 Gres=gpu:16
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """Both nodes, and the commands that users type."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = ENVIRONMENT | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all, and wait until both nodes are idle."""
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        controller, first, second = free_ports(3)
        ports = {"controller": controller, "first": first, "second": second}
        written = _CONFIGURATION.format(folder=self.folder, host=os.uname().nodename.partition(".")[0], **ports)
        (self.folder / "slurm.conf").write_text(written)
        for number in range(16):  # GPUs that nothing touches
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.folder}/gpu[0-15]\n")
        (self.folder / "munge.key").touch(0o600)
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        places = [f"--{flag}={self.folder}/munge.{ending}" for flag, ending in munge.items()]
        self._start("munged", "--foreground", "--force", *places)
        until((self.folder / "munge.socket").exists, self.say)
        self._start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)

    def mend(self) -> None:
        """Start those nodes again that have died."""
        for node in ("n1", "n2"):
            if self.daemons[f"slurmd-{node}"].poll() is not None:
                self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start a node's daemon, and wait until it is idle."""
        self._start("slurmd", "-D", "-N", node, name=f"slurmd-{node}")
        states = ["sinfo", "--noheader", f"--nodes={node}", "--format=%t"]
        until(lambda: self.typed(*states).strip() == "idle", self.say, _START_SECONDS)

    def _start(self, program: str, *words: str, name: str = "") -> None:
        path = shutil.which(program, path=_SEARCHED)
        assert path is not None
        with (self.folder / f"{name or program}.out").open("wb") as output:
            self.daemons[name or program] = subprocess.Popen(
                [path, *words], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment
            )

    def say(self) -> str:
        """What the daemons said."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.out")))

    def typed(self, *command: object) -> str:
        """What a command prints; nothing if it fails."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout

    def kill_node(self, node: str) -> None:
        """End the daemon of a node and all that it runs at once, as when its power is cut."""
        slurmd = self.daemons[f"slurmd-{node}"]
        of_it = [psutil.Process(slurmd.pid), *self.tasks(node)]
        of_it += [step for task in self.tasks(node) if (step := task.parent()) and step.name().startswith("slurmstepd")]
        for how in (signal.SIGSTOP, signal.SIGKILL):
            for process in of_it:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(how)
        slurmd.wait(30)

    def tasks(self, node: str) -> list[psutil.Process]:
        """What jobs run on a node."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                has = process.environ()
                if has.get("SLURM_CONF") == self.environment["SLURM_CONF"] and has.get("SLURMD_NODENAME") == node:
                    found.append(process)
        return found

    def close(self) -> None:
        """End jobs and daemons."""
        for job in self.typed("squeue", "--noheader", "--format=%A").split():
            self.typed("scancel", "--full", "--signal=KILL", job)
            self.typed("scancel", job)
        with contextlib.suppress(AssertionError):
            until(lambda: not self.typed("squeue", "--noheader").strip(), self.say)
        for daemon in reversed(self.daemons.values()):
            if daemon.poll() is None:
                daemon.terminate()
        for daemon in self.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(30)
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait(10)


class Job:
    """A job that was submitted."""

    def __init__(self, slurm: Slurm, folder: Path, number: str) -> None:
        self.slurm = slurm
        self.folder = folder
        self.number = number

    @property
    def log(self) -> str:
        path = self.folder / f"ormo-{self.number}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def says(self, field: str) -> str:
        """A field of what `scontrol` shows of it."""
        shown = self.slurm.typed("scontrol", "--oneliner", "show", "job", self.number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word).get(field, "")

    def until(self, condition: Callable[[], bool]) -> None:
        until(condition, lambda: f"{self.log}\n{self.slurm.typed('scontrol', 'show', 'job', self.number)}")

    def server(self) -> psutil.Process:
        """Its server."""
        of_it = [each for each in self.slurm.tasks("n1") if each.environ().get("SLURM_JOB_ID") == self.number]
        (found,) = [each for each in of_it if "--exit-when-finished" in each.cmdline()]
        return found

    def until_logged(self, text: str, times: int = 1) -> None:
        self.until(lambda: self.log.count(text) >= times)

    def until_ended(self, state: str) -> None:
        """Wait until it is over.

        Raises:
            AssertionError: it is not, or in another state than this one.
        """
        self.until(lambda: self.says("JobState") in _ENDED)
        assert self.says("JobState") == state, self.log


def until(condition: Callable[[], bool], say: Callable[[], str], seconds: float = _SECONDS) -> None:
    """Wait until it holds.

    Raises:
        AssertionError: it does not, with what is to say then.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, say()
        time.sleep(0.1)


@contextlib.contextmanager
def slurm() -> Iterator[Slurm]:
    """Both nodes; a skipped test where they can't be had."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_SEARCHED) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid():
        pytest.skip("slurmd starts jobs as their users, which takes root")
    folder = tempfile.mkdtemp(prefix="slurm-", dir="/tmp")  # a socket's path has 107 characters at most
    made = Slurm(Path(folder))
    try:
        try:
            made.start()
        except AssertionError as error:
            pytest.skip(f"Slurm does not start here: {error}")
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)
