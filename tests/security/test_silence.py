"""Who calls and says nothing holds nobody up: whoever is not known is sent away, and whoever is has a limit."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.tls import Credentials, Dialer
from ormo_server.service.server import Server
from ormo_server.service.streams import SILENT_CALLS
from security.authority import TOKEN, Authority, dialled, guarded, line
from service.wire import SMALL, WireWorker, eventually, payload, served, state_of

# Two workers' streams, two readers and the reserve make 38 threads.
FEW = {"max_workers": 2, "slots_per_worker": 1, "max_readers": 2, "failure_timeout_seconds": 2.0}
METHODS = ["/ormo.v1.ParameterServer/GetStatus", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"]


@contextlib.contextmanager
def silent_calls(server: Server, credentials: Credentials, method: str, count: int) -> Iterator[list[grpc.Future]]:
    """Calls without the message that the method expects; each some to a connection, as a limit on these would want."""
    silence = threading.Event()
    with contextlib.ExitStack() as stack:
        calls = []
        for _ in range(0, count, 8):
            own = [("grpc.use_local_subchannel_pool", 1)]
            channel = stack.enter_context(Dialer(server.address, credentials, own).dial())
            kind = channel.stream_stream if method.endswith("Watch") else channel.stream_unary
            call = kind(method, request_serializer=bytes, response_deserializer=bytes)
            for _ in range(8):
                made = (
                    call(iter(silence.wait, True))
                    if method.endswith("Watch")
                    else call.future(iter(silence.wait, True))
                )
                calls.append(made)
        yield calls
        silence.set()


@pytest.mark.parametrize("method", METHODS)
def test_whoever_is_not_known_is_sent_away_before_a_message_is_waited_for(
    method: str, tmp_path: Path, authority: Authority
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    settings = authority.server(line("worker", "pool", TOKEN, workers='["w"]'), client_certificates=False)
    known = Credentials(authority.ca, token_file=tmp_path / "token")
    with served(tmp_path / "run", **FEW, **settings) as server, dialled(server, known) as stub:
        worker = WireWorker(stub, "w")
        worker.join()
        worker.pull()
        before = state_of(server)
        with silent_calls(server, Credentials(authority.ca), method, 64) as calls:
            eventually(lambda: all(call.done() for call in calls))
            assert {call.code() for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
            stub.GetStatus(pb.GetStatusRequest(), timeout=5)
        assert state_of(server) == before
        assert server.metrics.traffic.refused() == {"UNAUTHENTICATED": 64}


@pytest.mark.parametrize("method", METHODS)
def test_whoever_is_known_has_few_calls_without_a_message_and_not_for_long(
    method: str, tmp_path: Path, authority: Authority
) -> None:
    with guarded(tmp_path, authority, **FEW) as server, dialled(server, authority.credentials("gpu-1")) as stub:
        worker = WireWorker(stub, "gpu-1")
        worker.join()
        worker.pull()
        before = state_of(server)
        with silent_calls(server, authority.credentials("evaluator"), method, 64) as calls:
            eventually(lambda: sum(call.done() for call in calls) == 64 - SILENT_CALLS)
            assert {call.code() for call in calls if call.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert worker.push(payload(SMALL, 1.0)).iteration.number == 1
            assert state_of(server) != before
            eventually(lambda: all(call.done() for call in calls), 10.0)
            assert sum(call.code() == grpc.StatusCode.CANCELLED for call in calls) == SILENT_CALLS


def test_a_call_that_ends_without_its_message_is_told_so(tmp_path: Path, authority: Authority) -> None:
    with (
        guarded(tmp_path, authority) as server,
        Dialer(server.address, authority.credentials("evaluator")).dial() as channel,
    ):
        call = channel.stream_unary(METHODS[0], request_serializer=bytes, response_deserializer=bytes)
        with pytest.raises(grpc.RpcError) as refused:
            call(iter(()))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "has ended without its request: expected one message" in refused.value.details()


def test_who_is_taken_off_the_list_watches_no_longer(tmp_path: Path, authority: Authority) -> None:
    with (
        guarded(tmp_path, authority, failure_timeout_seconds=2.0) as server,
        Dialer(server.address, authority.credentials("evaluator")).dial() as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        authority.allow('[[allow]]\nrole = "admin"\ncertificate = "operator"\n')
        with pytest.raises(grpc.RpcError) as ended:
            next(watch)
        assert ended.value.code() == grpc.StatusCode.CANCELLED
