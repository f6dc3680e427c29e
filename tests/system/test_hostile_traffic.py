"""Broken and hostile traffic to the port during training: training does not notice."""

import os
import sys
import time

import grpc
import psutil

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from system.hostile import KINDS, Hostile, overheard
from system.programs import Stage

SECONDS = float(os.environ.get("HOSTILE_SECONDS", "4"))
SEED = int(os.environ.get("HOSTILE_SEED", "1"))


def test_training_goes_on_as_if_nothing_came(stage: Stage) -> None:
    server = stage.server(learning_rate=0.01, failure_timeout=10.0, journal=True)
    workers = [stage.worker(name) for name in ("a", "b")]
    stage.until(lambda s: s.iteration.number > 50 and len(s.workers) == 2, "training")
    with overheard(stage.address) as (address, heard), grpc.insecure_channel(address) as channel:
        stub = ParameterServerStub(channel)
        stub.GetStatus(pb.GetStatusRequest())
        assert list(stub.PullParams(pb.PullParamsRequest(delivery=pb.DeliveryRequest(dtype=pb.DTYPE_FLOAT32))))
    before, memory = stage.status(), psutil.Process(server.process.pid).memory_info().rss
    with Hostile(stage.address, bytes(heard), SEED) as hostile:
        time.sleep(SECONDS)
        during = stage.status()
    assert set(hostile.connections) == set(KINDS), hostile.connections
    after = stage.until(lambda s: s.iteration.number > during.iteration.number + 50, "training afterwards")
    assert during.iteration.number > before.iteration.number + 50
    assert after.iteration.epoch == before.iteration.epoch
    # Who lost its place and joined again would count anew.
    counts = [{worker.worker: worker.applied for worker in status.workers} for status in (before, during, after)]
    assert [sorted(count) for count in counts] == [["a", "b"]] * 3
    assert all(counts[0][name] < counts[1][name] < counts[2][name] for name in "ab")
    assert [program.process.poll() for program in (*workers, server)] == [None, None, None]
    assert psutil.Process(server.process.pid).memory_info().rss < memory + 100_000_000
    assert server.terminate() == 0
    complaints = server.log.read_bytes().count(b"Traceback")
    assert complaints <= 5 * (2 + SECONDS / 10), "whoever reaches the port must not fill the disk"
    assert server.log.stat().st_size < 30_000 + 2000 * SECONDS
    sys.stdout.write(f"{sum(hostile.connections.values())} connections: {hostile.connections}\n")
