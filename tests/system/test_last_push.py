"""The push that ends a run, whose exchange wants a ticket that will not come, and a kill right after its answer."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from service.wire import SMALL, WireWorker, payload
from system.programs import Stage

LAST = 3
FLAGS = {"journal": True, "checkpoint_seconds": 3600, "stop_after_gradients": LAST, "min_workers": 2}


@contextmanager
def connected(stage: Stage) -> Iterator[ParameterServerStub]:
    with grpc.insecure_channel(stage.address) as channel:
        yield ParameterServerStub(channel)


@pytest.mark.parametrize("scheduler", ["asynchronous", "synchronous", "bounded-staleness"])
def test_the_push_that_ends_the_run_is_kept_with_its_result_though_no_ticket_follows(
    stage: Stage, scheduler: str
) -> None:
    """The input that took effect is in the journal also though the next one of its exchange was refused."""
    bound = {"staleness_bound": 1} if scheduler == "bounded-staleness" else {}
    flags = FLAGS | bound | {"scheduler": scheduler}
    server = stage.server(**flags)
    with connected(stage) as stub:
        a, b = WireWorker(stub, "a"), WireWorker(stub, "b")
        a.join()
        b.join()
        streams = {worker.name: worker.open() for worker in (a, b)}
        for stream in streams.values():
            stream.begin(None)
        for stream in streams.values():
            stream.delivery()
        for name in "ab":
            streams[name].begin(payload(SMALL, 1.0, buffers=True))
            assert not streams[name].result().refusal
        for stream in streams.values():
            stream.delivery()
        last = streams["a"].begin(payload(SMALL, 2.0, buffers=True))
        result = streams["a"].result()
        assert (result.iteration.number, result.refusal) == (LAST, "")
        assert streams["a"].receive().finished.iteration.number == LAST
        assert stub.Heartbeat(pb.HeartbeatRequest(worker="b", incarnation=b.incarnation)).finished
        server.kill()

    server = stage.server(**flags)
    with connected(stage) as stub:
        status = stage.status()
        assert (status.phase, status.iteration.number) == (pb.GetStatusResponse.PHASE_FINISHED, LAST)
        a.stub = stub
        stream = a.open()
        stream.replay(last, payload(SMALL, 2.0, buffers=True))
        again = stream.result()
        assert again.repeated
        result.repeated, result.iteration.epoch = True, again.iteration.epoch
        assert again == result
        assert stream.receive().WhichOneof("part") == "finished"
    assert server.terminate() == 0
