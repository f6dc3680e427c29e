"""The trace's rows of gradients that were refused, through the real socket."""

from pathlib import Path

import pytest

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.core.inputs import Leave, Push, Request
from ormo_server.trace import Recorded, Segment, read_trace
from ormo_server.trace import Refused as RefusedRow
from service.wire import SMALL, Refused, WireWorker, connected, payload, refusals, served

NAN = payload(SMALL, float("nan"))


def traced(path: Path) -> Segment:
    (segment,) = read_trace(path)
    assert segment.start.refusals
    return segment


def refused(path: Path) -> list[tuple[int, int, str]]:
    """Request, ticket and reason."""
    rows = [taken for taken in traced(path).inputs if isinstance(taken, RefusedRow)]
    return [(row.request, row.ticket, row.reason) for row in rows]


def test_each_refused_gradient_has_a_row_before_what_it_asked_for(tmp_path: Path) -> None:
    with served(tmp_path / "run", trace=tmp_path / "t") as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        stream = worker.open()
        stream.begin(None)
        stream.delivery()
        stream.begin(NAN)
        assert stream.result().refusal == "NON_FINITE"
        stream.delivery()
        stream.begin(payload(SMALL, 1.0), wants=False)
        stream.result()
        stream.begin(payload(SMALL, 1.0), wants=False, ticket=pb.Ticket(epoch=5, number=-7))
        assert stream.result().refusal == "TICKET_UNKNOWN"
        stream.finish()
    inputs = traced(tmp_path / "t").inputs
    kinds = [type(entry.input) if isinstance(entry, Recorded) else type(entry) for entry in inputs]
    assert kinds[1:6] == [Request, RefusedRow, Request, Push, RefusedRow]
    assert refused(tmp_path / "t") == [(2, 1, "NON_FINITE"), (4, -7, "TICKET_UNKNOWN")]


def test_a_refused_gradient_that_comes_again_and_again_has_one_row(tmp_path: Path) -> None:
    with served(tmp_path / "run", trace=tmp_path / "t") as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        for _ in range(20):
            worker.request = 4
            with pytest.raises(Refused, match="NON_FINITE"):
                worker.push(NAN)
        stream = worker.open()
        exchange = stream.begin(NAN)
        stream.result()
        stream.delivery()
        stream.replay(exchange, NAN)  # its answer was lost
        stream.result()
        stream.delivery()
        stream.finish()
    assert refused(tmp_path / "t") == [(5, 1, "NON_FINITE"), (6, 1, "NON_FINITE")]


def test_gradients_of_nobody_and_of_a_run_that_is_over_have_no_row(tmp_path: Path) -> None:
    with served(tmp_path / "run", trace=tmp_path / "t", stop_after_gradients=1) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        with pytest.raises(Refused, match="NOT_A_MEMBER"):
            WireWorker(stub, "b").push(NAN)
        worker.push(payload(SMALL, 1.0))
        with pytest.raises(Refused, match="FINISHED"):
            worker.push(payload(SMALL, 1.0))
    assert refused(tmp_path / "t") == []


def test_who_lost_its_lease_within_a_stream_is_told_so_though_its_gradient_is_not_finite(tmp_path: Path) -> None:
    with served(tmp_path / "run", trace=tmp_path / "t") as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        stream = worker.open()
        stream.begin(None)
        stream.delivery()
        with server.host.engine.inspect() as machine:
            machine.step(Leave(1.0, "a", 1))  # its stream is ended a moment later
        message = worker.exchange(NAN, wants=False)
        message.data = bytes(NAN.memory)
        stream.send(message)
        with refusals(), pytest.raises(Refused, match="NOT_A_MEMBER"):
            stream.receive()
    assert refused(tmp_path / "t") == []
