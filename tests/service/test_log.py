"""What an operator reads in the server's log."""

import logging
from pathlib import Path

import pytest

from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.v1 import parameter_server_pb2 as pb
from service.wire import SMALL, Refused, WireWorker, connected, payload, served
from system.forked import ran


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_log_tells_who_joins_and_leaves_and_warns_of_gradients_that_are_not_finite(
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
    assert told.count("worker w0 joined (rank 0, 1 slot) from '127.0.0.1'; K is 1") == 1
    assert told.count("worker w0 left") == 1
    about = [record for record in caplog.records if "NON_FINITE" in record.message]
    assert len(about) == 5, "one line for each"
    assert {(record.levelname, record.__dict__["worker"]) for record in about} == {("WARNING", "w0")}
    assert all("the gradient of worker 'w0'" in record.message for record in about)


def test_refusals_of_whatever_kind_are_few_lines(tmp_path: Path) -> None:
    (tmp_path / "refusing.py").write_text("""
from ormo_runtime.logs import set_up
from ormo_server.core.errors import OrmoError
from ormo_server.service.refusals import log_refusal

set_up("info", "text")
for kind in OrmoError.__subclasses__():
    for _ in range(20):
        log_refusal(kind("not so"), "ipv4:10.0.0.7:5", "")
""")
    done = ran(tmp_path / "refusing.py")
    assert done.returncode == 0, done.stderr
    told = [line.split()[2:4] for line in done.stderr.splitlines()]
    assert {tuple(words): told.count(words) for words in told} == {
        ("INFO", "refused"): 5,
        ("WARNING", "denied"): 5,
        ("WARNING", "refused"): 5,
    }


def test_failures_of_the_server_s_own_are_few_tracebacks_however_many_calls_cause_them(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(f"""
import grpc
from ormo_runtime.logs import set_up
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.settings import ServerSettings
from ormo_server.service.engine import Engine
from ormo_server.service.server import Server
from ormo_server.service.servicer import Servicer

SAID = "a mistake in here"  # so that no line of the code in a traceback says it

def failing(*_):
    raise RuntimeError(SAID)

set_up("info", "text")
Servicer._welcome = Servicer._ask_for_model = failing
server = Server(ServerSettings(listen="127.0.0.1:0", metrics_listen="", directory={str(tmp_path / "run")!r}))
server.start()
with grpc.insecure_channel(server.address) as channel:
    for _ in range(200):
        try:
            ParameterServerStub(channel).Join(pb.JoinRequest(worker="w", protocol_version=1, slots=1))
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.INTERNAL
server.close()
""")
    done = ran(tmp_path / "failing.py")
    assert done.returncode == 0, done.stderr
    assert 1 <= done.stderr.count("Traceback (most recent call last)") == done.stderr.count("a mistake in here") <= 10


def test_log_warns_once_for_each_number_of_slots_that_a_staleness_bound_keeps_idle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"scheduler": "bounded-staleness", "staleness_bound": 2}
    with served(tmp_path, **changes) as server, connected(server) as stub:
        workers = [WireWorker(stub, f"w{number}") for number in range(4)]
        workers[0].join()
        workers[1].join()
        workers[2].join()
        assert warnings(caplog) == []
        workers[3].join(slots=2)
        workers[3].join(slots=2)
        first = "a staleness bound of 2 keeps 2 of 5 slots idle: set it to at least 4 for all to be busy"
        assert warnings(caplog) == [first]
        stub.Leave(pb.LeaveRequest(worker="w3", incarnation=1))
        workers[3].join(slots=2)
        assert warnings(caplog) == [first]
        stub.Leave(pb.LeaveRequest(worker="w3", incarnation=1))
        workers[3].join(slots=1)
        second = "a staleness bound of 2 keeps 1 of 4 slots idle: set it to at least 3 for all to be busy"
        assert warnings(caplog) == [first, second]
        server.drain()
    caplog.clear()
    with served(tmp_path, **changes):
        assert second in warnings(caplog)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "1,000,000 parameters: 8.0 MB of state, up to 24.0 MB for exchanges (all slots at once), 8.0 MB for a"),
        # w and six vectors of slots
        ({"method": "shifted"}, "28.0 MB of state (shifted keeps a vector for each of up to 6 slots), up to 24.0 MB"),
        ({"method": "dc-asgd"}, "28.0 MB of state (dc keeps a vector for each of up to 6 slots), up to 24.0 MB"),
        # w, the momentum, what the bucket gathered
        ({"method": "smega2"}, "12.0 MB of state, up to 24.0 MB"),
        # w, u, the round's opening
        ({"method": "ssgdm"}, "12.0 MB of state, up to 24.0 MB"),
    ],
)
def test_log_tells_the_memory_that_the_rule_needs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, str], said: str
) -> None:
    model = Manifest.laid_out([TensorSpec("weight", (1_000_000,), FLOAT32, PARAMETER)])
    with caplog.at_level(logging.INFO), served(tmp_path, max_workers=3, **changes) as server, connected(server) as stub:
        WireWorker(stub, "a", model).join()
    assert said in caplog.text
