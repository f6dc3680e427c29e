"""A server with a mirror in a folder, and a worker of its own."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ormo_server.mirror.buckets import Bucket, ChangedError, Folder
from ormo_server.mirror.copies import copies
from ormo_server.mirror.lease import read_record
from ormo_server.service.server import Server
from service.wire import SMALL, WireWorker, connected, payload, served

# Of silence after which another may take the mirror: long enough for a busy machine, short enough to wait for.
SILENCE = 2.0


def until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        time.sleep(0.02)


def replaces_only_what_was_read(bucket: Bucket) -> Any:
    """Of an object x; returns the version that is there then."""
    assert bucket.read("x") is None
    first = bucket.replace("x", b"1", None)
    with pytest.raises(ChangedError):
        bucket.replace("x", b"2", None)
    second = bucket.replace("x", b"2", first)
    with pytest.raises(ChangedError):
        bucket.replace("x", b"3", first)
    there = bucket.read("x")
    assert there is not None
    assert (there.content, there.version) == (b"2", second)
    return second


def iterations_in(bucket: Bucket) -> list[int]:
    """Of the whole copies of the run, oldest first."""
    found = read_record(bucket)
    lineage = found[0].lineage if found else None
    return [int(copy.name.rpartition("-")[2]) for copy in copies(bucket, lineage) if copy.whole]


def iterations(mirror: Path) -> list[int]:
    """Of all whole copies."""
    return [int(copy.name.rpartition("-")[2]) for copy in copies(Folder(mirror)) if copy.whole]


def metric(server: Server, name: str) -> float:
    value = server.metrics.registry.get_sample_value(f"ormo_mirror_{name}")
    assert value is not None, name
    return value


class Trainer:
    """A worker that pushes gradients of 1."""

    def __init__(self, server: Server, stub: Any, incarnation: int = 1, start: float = 0.0) -> None:
        self.server, self.worker = server, WireWorker(stub, "w", incarnation=incarnation, start=start)
        self.worker.join()

    def push(self, count: int = 1) -> "Trainer":
        for _ in range(count):
            self.worker.pull()
            self.worker.push(payload(SMALL, 1.0))
        return self

    def kept(self) -> "Trainer":
        """In a checkpoint, and in the mirror."""
        assert self.server.host.checkpoint()
        iteration = self.server.host.engine.iteration()[1]
        until(lambda: metric(self.server, "iteration") == iteration, f"iteration {iteration} in the mirror")
        return self

    @property
    def parameter(self) -> float:
        self.worker.pull()
        return self.worker.params[0].item()


def trained(run: Path, mirror: Path, saved: int, unsaved: int, *, drained: bool, **changes: Any) -> float:
    """The parameter after `saved` gradients, which are mirrored, and some more, which are not unless it is drained."""
    with served(run, mirror=mirror, failure_timeout_seconds=SILENCE, **changes) as server, connected(server) as stub:
        trainer = Trainer(server, stub, start=5.0).push(saved).kept()
        at_checkpoint = trainer.parameter
        trainer.push(unsaved)
        until(
            lambda: (found := read_record(Folder(mirror))) and found[0].iteration == saved + unsaved,
            "the lease says what the server has",
        )
        if drained:
            assert server.drain()
        return at_checkpoint
