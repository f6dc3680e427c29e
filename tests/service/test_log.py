"""What an operator reads in the server's log."""

import logging
from pathlib import Path

import pytest

from ormo_protos.v1 import parameter_server_pb2 as pb
from service.wire import SMALL, Refused, WireWorker, connected, payload, served


def test_log_tells_who_joins_and_leaves_and_warns_once_of_gradients_that_are_not_finite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "w0")
        worker.join()
        worker.join()
        for _ in range(5):
            worker.pull()
            with pytest.raises(Refused):
                worker.push(payload(SMALL, float("nan")))
        stub.Leave(pb.LeaveRequest(worker="w0", incarnation=1))
        stub.Leave(pb.LeaveRequest(worker="w0", incarnation=1))
    told = [record.message for record in caplog.records]
    assert told.count("worker w0 joined (rank 0, 1 slots); K is 1") == 1
    assert told.count("worker w0 left") == 1
    warned = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert "the gradient of worker 'w0'" in warned[0]
