"""What goes wrong. Each fault is here once: it happens, and is over when its function returns."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from chaos.network import losing
from chaos.proxy import Way
from chaos.stage import Broken, Stage
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub

Fault = Callable[[Stage, random.Random, float], None]
CLOCK_LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
_CLOCK_FILE = "clock"


def clock_environment(folder: Path) -> dict[str, str]:
    """What lets the wall clock of a server jump; nothing where libfaketime is not installed."""
    if CLOCK_LIBRARY is None:
        return {}
    (folder / _CLOCK_FILE).write_text("+0")
    return {
        "LD_PRELOAD": str(CLOCK_LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(folder / _CLOCK_FILE),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def kill_server(stage: Stage, dice: random.Random, lease: float) -> None:
    """SIGKILL; it is started again at once."""
    with _while_down(stage):
        stage.end_server(signal.SIGKILL)
        stage.start_server()


def drain_server(stage: Stage, dice: random.Random, lease: float) -> None:
    """SIGTERM, as in an upgrade."""
    with _while_down(stage):
        code = stage.end_server(signal.SIGTERM)
        if code:
            raise Broken(f"a drain ended with {code}: see the server's log")
        stage.start_server()


def kill_starting_server(stage: Stage, dice: random.Random, lease: float) -> None:
    """SIGKILL while it loads, restores, or does again what the journal says; once or a few times."""
    with _while_down(stage):
        stage.end_server(signal.SIGKILL)
        for _ in range(dice.randrange(1, 4)):
            stage.begin_server()
            time.sleep(dice.uniform(0.0, stage.start_seconds))
            stage.end_server(signal.SIGKILL)
        stage.start_server()


def kill_draining_server(stage: Stage, dice: random.Random, lease: float) -> None:
    """SIGTERM, and SIGKILL before it has drained."""
    assert stage.server is not None
    with _while_down(stage):
        os.kill(stage.server.pid, signal.SIGTERM)
        time.sleep(dice.uniform(0.0, 0.2))
        stage.end_server(signal.SIGKILL)
        stage.start_server()


def stop_server(stage: Stage, dice: random.Random, lease: float) -> None:
    """SIGSTOP for a while."""
    assert stage.server is not None
    with _while_down(stage), _stopped(stage.server.pid):
        time.sleep(dice.uniform(0.2, 1.5 * lease))


def kill_worker(stage: Stage, dice: random.Random, lease: float) -> None:
    """SIGKILL; a new process takes its place."""
    column = dice.choice(list(stage.workers))
    stage.end_worker(column, signal.SIGKILL)
    time.sleep(dice.choice([0.0, 0.5 * lease]))
    stage.start_worker(column)


def stop_worker(stage: Stage, dice: random.Random, lease: float) -> None:
    """SIGSTOP, for shorter or longer than its lease."""
    column, worker = dice.choice(list(stage.workers.items()))
    with _while_down(stage, f"w{column}"), _stopped(worker.pid):
        time.sleep(dice.uniform(0.2, 2.0 * lease))


def reset_connections(stage: Stage, dice: random.Random, lease: float) -> None:
    """Every connection breaks, several times."""
    with _while_down(stage):
        for _ in range(dice.randrange(1, 5)):
            stage.proxy.reset()
            time.sleep(dice.uniform(0.0, 0.3))


def half_open(stage: Stage, dice: random.Random, lease: float) -> None:
    """Connections that look open and carry nothing, until they break."""
    with _while_down(stage), stage.proxy.silent(*Way):
        time.sleep(dice.uniform(0.2, 2.0 * lease))
        stage.proxy.reset()


def one_way(stage: Stage, dice: random.Random, lease: float) -> None:
    """Only one direction is cut; what was held back arrives late."""
    with _while_down(stage), stage.proxy.silent(dice.choice(list(Way))):
        time.sleep(dice.uniform(0.2, 2.0 * lease))


def lose_packets(stage: Stage, dice: random.Random, lease: float) -> None:
    """Some packets never arrive, in both directions; TCP sends them again, slower and slower."""
    with _while_down(stage), losing(dice.choice([2, 10, 30])):
        time.sleep(dice.uniform(0.5, 2.0 * lease))


def slow_disk(stage: Stage, dice: random.Random, lease: float) -> None:
    """Every fsync takes long."""
    stage.set_disk(sync_seconds=dice.uniform(0.05, 0.4))
    with _while_down(stage), _sound_again(stage):
        time.sleep(dice.uniform(1.0, 3.0))


def full_disk(stage: Stage, dice: random.Random, lease: float) -> None:
    """No room for a while."""
    stage.set_disk(full=True)
    with _while_down(stage), _sound_again(stage):
        time.sleep(dice.uniform(0.5, 3.0))


def full_disk_and_kill(stage: Stage, dice: random.Random, lease: float) -> None:
    """No room, and then the power."""
    stage.set_disk(full=True)
    with _while_down(stage):
        with _sound_again(stage):
            time.sleep(dice.uniform(0.2, 1.0))
            stage.end_server(signal.SIGKILL)
        stage.start_server()


def slow_reader(stage: Stage, dice: random.Random, lease: float) -> None:
    """Somebody asks for parameters and does not take them."""
    with grpc.insecure_channel(stage.address) as channel:
        wish = pb.DeliveryRequest(dtype=pb.DTYPE_FLOAT32)
        call = ParameterServerStub(channel).PullParams(pb.PullParamsRequest(delivery=wish))
        next(call)
        time.sleep(dice.uniform(0.5, 2.0))
        call.cancel()


def jump_clock(stage: Stage, dice: random.Random, lease: float) -> None:
    """The wall clock of the server's machine is set, by up to a day."""
    (stage.folder / _CLOCK_FILE).write_text(f"{dice.choice([-86400, -3600, -30, 30, 3600, 86400]):+d}")
    time.sleep(0.5)


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
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def _sound_again(stage: Stage) -> Iterator[None]:
    try:
        yield
    finally:
        stage.set_disk()
