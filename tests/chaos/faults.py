"""What goes wrong. Each fault is here once: it is over when its function returns, which says whether it took effect."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil

from chaos.network import losing, lost
from chaos.proxy import Proxy, Way
from chaos.stage import Broken, Stage
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub

Fault = Callable[[Stage, random.Random, float], bool]
CLOCK_LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
_CLOCK_FILE = "clock"


def clock_environment(folder: Path) -> dict[str, str]:
    """What lets the wall clock of a server jump."""
    (folder / _CLOCK_FILE).write_text("+0")
    return {
        "LD_PRELOAD": str(CLOCK_LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(folder / _CLOCK_FILE),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def kill_server(stage: Stage, dice: random.Random, lease: float) -> bool:
    """SIGKILL; it is started again at once."""
    with _while_down(stage):
        code = stage.end_server(signal.SIGKILL)
        stage.start_server()
    return code == -signal.SIGKILL


def drain_server(stage: Stage, dice: random.Random, lease: float) -> bool:
    """SIGTERM, as in an upgrade."""
    with _while_down(stage):
        code = stage.end_server(signal.SIGTERM)
        if code:
            raise Broken(f"a drain ended with {code}: see the server's log")
        stage.start_server()
    return True


def kill_starting_server(stage: Stage, dice: random.Random, lease: float) -> bool:
    """SIGKILL while it loads, restores, or does again what the journal says; once or a few times."""
    with _while_down(stage):
        codes = [stage.end_server(signal.SIGKILL)]
        for _ in range(dice.randrange(1, 4)):
            stage.begin_server()
            time.sleep(dice.uniform(0.0, stage.start_seconds))
            codes.append(stage.end_server(signal.SIGKILL))
        stage.start_server()
    return set(codes) == {-signal.SIGKILL}


def kill_draining_server(stage: Stage, dice: random.Random, lease: float) -> bool:
    """SIGTERM, and SIGKILL before it has drained."""
    assert stage.server is not None
    with _while_down(stage):
        os.kill(stage.server.pid, signal.SIGTERM)
        time.sleep(dice.uniform(0.0, 0.2))
        code = stage.end_server(signal.SIGKILL)
        stage.start_server()
    return code == -signal.SIGKILL


def stop_server(stage: Stage, dice: random.Random, lease: float) -> bool:
    """SIGSTOP for a while."""
    assert stage.server is not None
    with _while_down(stage), _stopped(stage.server.pid) as process:
        time.sleep(dice.uniform(0.2, 1.5 * lease))
        return process.status() == psutil.STATUS_STOPPED


def kill_worker(stage: Stage, dice: random.Random, lease: float) -> bool:
    """SIGKILL; a new process takes its place."""
    column = dice.choice(list(stage.workers))
    code = stage.end_worker(column, signal.SIGKILL)
    time.sleep(dice.choice([0.0, 0.5 * lease]))
    stage.start_worker(column)
    return code == -signal.SIGKILL


def stop_worker(stage: Stage, dice: random.Random, lease: float) -> bool:
    """SIGSTOP, for shorter or longer than its lease."""
    column, worker = dice.choice(list(stage.workers.items()))
    with _while_down(stage, f"w{column}"), _stopped(worker.pid) as process:
        time.sleep(dice.uniform(0.2, 2.0 * lease))
        return process.status() == psutil.STATUS_STOPPED


def reset_connections(stage: Stage, dice: random.Random, lease: float) -> bool:
    """Every connection breaks, several times."""
    broken = 0
    with _while_down(stage):
        for _ in range(dice.randrange(1, 5)):
            broken += stage.proxy.reset()
            time.sleep(dice.uniform(0.0, 0.3))
    return broken > 0


def half_open(stage: Stage, dice: random.Random, lease: float) -> bool:
    """Connections that look open and carry nothing, until they break."""
    before = stage.proxy.held
    with _while_down(stage), stage.proxy.silent(*Way):
        time.sleep(dice.uniform(0.2, 2.0 * lease))
        return stage.proxy.reset() > 0 and stage.proxy.held > before


def one_way(stage: Stage, dice: random.Random, lease: float) -> bool:
    """Only one direction is cut; what was held back arrives late."""
    before = stage.proxy.held
    with _while_down(stage), stage.proxy.silent(dice.choice(list(Way))):
        time.sleep(dice.uniform(0.2, 2.0 * lease))
    return stage.proxy.held > before


def lose_packets(stage: Stage, dice: random.Random, lease: float) -> bool:
    """Some packets never arrive, in both directions; TCP sends them again, slower and slower."""
    with _while_down(stage), losing(dice.choice([2, 10, 30])):
        time.sleep(dice.uniform(0.5, 2.0 * lease))
        return lost() > 0


def slow_disk(stage: Stage, dice: random.Random, lease: float) -> bool:
    """Every fsync takes long."""
    before = stage.disk.faults()
    with _while_down(stage), stage.disk.slow(dice.uniform(0.05, 0.4)):
        time.sleep(dice.uniform(1.0, 3.0))
    return stage.disk.faults() > before


def full_disk(stage: Stage, dice: random.Random, lease: float) -> bool:
    """No room for a while."""
    with _while_down(stage), stage.disk.full():
        return _filled(stage, dice.uniform(0.5, 3.0))


def full_disk_and_kill(stage: Stage, dice: random.Random, lease: float) -> bool:
    """No room, and then the power."""
    with _while_down(stage):
        with stage.disk.full():
            filled = _filled(stage, dice.uniform(0.2, 1.0))
            stage.end_server(signal.SIGKILL)
        stage.start_server()
    return filled


def _filled(stage: Stage, seconds: float) -> bool:
    """Whether there was no room for another gradient, after a while."""
    before = stage.disk.faults()
    time.sleep(seconds)
    if stage.disk.is_real:
        return stage.disk.free_bytes < max(4 * stage.load.elements, 4096)
    return stage.disk.faults() > before


def slow_reader(stage: Stage, dice: random.Random, lease: float) -> bool:
    """Somebody asks for parameters and does not take them: the server must keep what the windows do not hold."""
    way, small = Proxy(), [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
    way.lead_to(stage.address)
    try:
        with grpc.insecure_channel(way.address, small) as channel:
            wish = pb.DeliveryRequest(dtype=pb.DTYPE_FLOAT32)
            call = ParameterServerStub(channel).PullParams(pb.PullParamsRequest(delivery=wish))
            next(call)
            time.sleep(dice.uniform(0.5, 2.0))
            carried = way.carried[Way.TO_WORKER]
            call.cancel()
    finally:
        way.close()
    return carried < 4 * stage.load.elements


def jump_clock(stage: Stage, dice: random.Random, lease: float) -> bool:
    """The wall clock of the server's machine is set, by up to a day, in a life of its own.

    With libfaketime 0.9.10 Python's waits end at once instead of in time, so that the server does little but wait: no
    other life should.
    """
    with _while_down(stage):
        stage.end_server(signal.SIGKILL)
        stage.start_server(clock_environment(stage.folder))
        assert stage.server is not None
        jumped = "libfaketime" in Path(f"/proc/{stage.server.pid}/maps").read_text()
        for _ in range(2):
            time.sleep(0.5)
            (stage.folder / _CLOCK_FILE).write_text(f"{dice.choice([-86400, -3600, -30, 30, 3600, 86400]):+d}")
        stage.until_answered(3, "after a jump of the wall clock")
        stage.end_server(signal.SIGKILL)
        stage.start_server()
    return jumped


FAULTS: dict[str, Fault] = {
    "SIGKILL of the server": kill_server,
    "SIGTERM of the server": drain_server,
    "SIGKILL at the start": kill_starting_server,
    "SIGTERM, then SIGKILL": kill_draining_server,
    "SIGSTOP of the server": stop_server,
    "SIGKILL of a worker": kill_worker,
    "SIGSTOP of a worker": stop_worker,
    "connections reset": reset_connections,
    "half-open connections": half_open,
    "one-way partition": one_way,
    "packet loss": lose_packets,
    "slow disk": slow_disk,
    "full disk": full_disk,
    "full disk, then SIGKILL": full_disk_and_kill,
    "slow reader": slow_reader,
    "jump of the wall clock": jump_clock,
}
KILLS = ("SIGKILL of the server", "SIGKILL at the start", "SIGTERM, then SIGKILL", "full disk, then SIGKILL")
# What can go wrong while something else does: these leave the server's process alone, the others the disk and network.
LASTING = ("packet loss", "one-way partition", "slow disk", "slow reader", "SIGSTOP of a worker")
SUDDEN = ("SIGKILL of the server", "SIGTERM of the server", "SIGSTOP of the server", "connections reset")


@contextlib.contextmanager
def _while_down(stage: Stage, worker: str | None = None) -> Iterator[None]:
    """Workers may be silent meanwhile, or this one."""
    began = time.monotonic()
    try:
        yield
    finally:
        stage.trouble.append((began, time.monotonic(), worker))


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[psutil.Process]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield psutil.Process(pid)
    finally:
        os.kill(pid, signal.SIGCONT)
