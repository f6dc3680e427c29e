"""The server's machine runs out of memory for tensors: training goes on, or later, and nothing acknowledged is lost."""

import contextlib
import resource
from pathlib import Path

import grpc
import pytest

from fuzz.wire_format import field
from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Payload
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from service.wire import Refused, WireWorker, payload
from system.programs import Program, Stage

MIB = 1 << 20
MODEL = Manifest.laid_out([TensorSpec("weight", (8 * MIB,), FLOAT32, PARAMETER)])  # 32 MiB
READERS = 8
OWN = [("grpc.use_local_subchannel_pool", 1)]


def memory(server: Program, what: str) -> int:
    """Bytes of the process: `VmData` is what RLIMIT_DATA limits, `VmHWM` the most that was ever resident."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(what))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("journal", [True, False])
def test_readers_that_take_all_memory_keep_nobody_from_training_for_longer_than_they_stay(
    stage: Stage, journal: bool
) -> None:
    server = stage.server(
        method="asgd", learning_rate=1, max_workers=2, slots_per_worker=1, max_readers=READERS, journal=journal
    )
    gradient, acknowledged, refused = payload(MODEL, 1.0), 0, 0
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(stage.address, OWN)) for _ in range(2)]
        worker, readers = WireWorker(ParameterServerStub(channels[0]), "w", MODEL), ParameterServerStub(channels[1])
        worker.join()
        for _ in range(3):
            worker.pull()
            worker.push(gradient)
            acknowledged += 1
        limit = memory(server, "VmData") + 3 * 32 * MIB
        resource.prlimit(server.process.pid, resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
        unread = [
            readers.PullParams(pb.PullParamsRequest(delivery=pb.DeliveryRequest(dtype=FLOAT32))) for _ in range(READERS)
        ]
        for call in unread:
            try:
                next(call)  # the header, and no more
            except grpc.RpcError as error:
                _check(Refused(error))
                refused += 1
        assert refused
        for _ in range(3):
            acknowledged += _exchanged(worker, gradient)
        for call in unread:
            call.cancel()
        stage.until(lambda _: _exchanged(worker, gradient), "an exchange")
        acknowledged += 1
        assert stage.status().iteration.number == acknowledged
        worker.pull(ticket=False)
        assert worker.params.unique().tolist() == [-float(acknowledged)]
    assert server.terminate() == 0
    assert "Traceback" not in server.log.read_text()
    stage.server(method="asgd", learning_rate=1, journal=journal)
    assert stage.status().iteration.number == acknowledged


def _exchanged(worker: WireWorker, gradient: Payload) -> bool:
    try:
        worker.pull()
        worker.push(gradient)
    except Refused as refused:
        _check(refused)
        return False
    return True


def _check(refused: Refused) -> None:
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MUCH_IN_FLIGHT")
    assert "this machine does not have that much memory" in refused.message


FLOODS = {
    "Heartbeat": b"\x1a\x00" * 2_000_000,
    "PushPull": b"\x0a\x00\x12\x00" * 1_000_000,
    "PushGradient": b"\x0a\x00\x12\x00" * 1_000_000,
    "OfferModel": field(1, 2, field(3, 2, b"\x0a\x00" * 2_000_000)),
}


def test_messages_of_millions_of_elements_take_hardly_more_memory_than_their_bytes(stage: Stage) -> None:
    """24 of 4 MB: each would make 70 to 300 MB of objects, besides what is made of these."""
    server = stage.server(method="asgd", learning_rate=1)
    before = memory(server, "VmHWM")
    with grpc.insecure_channel(stage.address, OWN) as channel:
        _flood(channel, "OfferModel")  # it is read as long as there is no model
        worker = WireWorker(ParameterServerStub(channel), "w")
        worker.join()
        for method in FLOODS.keys() - {"OfferModel"}:
            _flood(channel, method)
        worker.pull()
        assert worker.push(payload(worker.manifest, 1.0)).iteration.number == 1
        assert memory(server, "VmHWM") - before < 24 * 4_000_000 * 3


def _flood(channel: grpc.Channel, method: str) -> None:
    call = channel.stream_unary(f"/ormo.v1.ParameterServer/{method}")
    for each in [call.future(iter([FLOODS[method]]), timeout=60) for _ in range(6)]:
        assert each.exception().code() == grpc.StatusCode.INVALID_ARGUMENT
