"""The list of who may call: what it says, what is refused in it, and how it is changed while the server runs."""

import logging
from pathlib import Path

import grpc
import pytest

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_runtime.tls import Credentials
from ormo_server import security
from ormo_server.security import AccessError, read_list
from security.authority import ACCESS, TOKEN, Authority, dialled, guarded, line
from service.wire import Refused, WireWorker, eventually, served, state_of

NO_LISTS = {
    "": r"it, `?allow`?|\bfield required",
    "[[allow]]": r"\[\[allow\]\] number 1, `role`: field required",
    '[[allow]]\nrole = "root"\ncertificate = "a"': "`role`: input should be 'worker', 'reader' or 'admin'",
    '[[allow]]\nrole = "worker"': "number 1: expected either `certificate` or `token`",
    '[[allow]]\nrole = "worker"\ncertificate = "a"\n' + f'token = "{TOKEN}"\nname = "n"': "either `certificate` or",
    f'[[allow]]\nrole = "worker"\ntoken = "{TOKEN}"': "a `token` needs a `name`",
    '[[allow]]\nrole = "worker"\ntoken = "short"\nname = "n"': "a token of at least 32 characters was expected",
    '[[allow]]\nrole = "reader"\ncertificate = "a"\nworkers = ["b"]': "the role is reader",
    '[[allow]]\nrole = "worker"\ncertificate = "a"\nworker = ["b"]': "number 1, `worker`: extra inputs",
    "allow = 3": "tuple",
    "[[allow": "is not valid TOML",
}


@pytest.mark.parametrize("text", NO_LISTS)
def test_what_is_no_list_is_refused_with_a_sentence_and_never_shows_a_token(text: str, tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    path.write_text(text)
    with pytest.raises(AccessError, match=NO_LISTS[text]) as refused:
        read_list(path)
    assert TOKEN not in str(refused.value)
    assert "short" not in str(refused.value)


def test_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match=r"the access list .*none\.toml can't be read \(No such file"):
        read_list(tmp_path / "none.toml")


def test_the_example_in_the_module_is_one(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    path.write_text((security.__doc__ or "").partition("\n\n")[2])
    assert [each.role for each in read_list(path)] == ["worker", "worker"]


def outcome(stub: ParameterServerStub) -> str:
    try:
        stub.GetStatus(pb.GetStatusRequest(), timeout=5)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def test_a_token_is_known_by_all_of_it_and_by_nothing_else(tmp_path: Path, authority: Authority) -> None:
    settings = authority.server(line("reader", "people", TOKEN), client_certificates=False)
    token_file = tmp_path / "token"
    with served(tmp_path / "run", **settings) as server:
        for text, expected in {
            TOKEN: "OK",
            f"{TOKEN}\n": "OK",
            TOKEN[:-1]: "UNAUTHENTICATED",
            TOKEN + "x": "UNAUTHENTICATED",
            TOKEN.upper(): "UNAUTHENTICATED",
        }.items():
            token_file.write_text(text)
            with dialled(server, Credentials(authority.ca, token_file=token_file)) as stub:
                assert outcome(stub) == expected, text
        with dialled(server, Credentials(authority.ca)) as stub:
            for header in (TOKEN, f"Basic {TOKEN}", f"bearer {TOKEN}", "Bearer ", ""):
                with pytest.raises(grpc.RpcError) as refused:
                    stub.GetStatus(pb.GetStatusRequest(), metadata=[("authorization", header)], timeout=5)
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED, header


def test_who_brings_a_token_is_judged_by_it_and_not_by_the_certificate(tmp_path: Path, authority: Authority) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("x" * 40)
    certificate, key = authority.pair("operator")
    with guarded(tmp_path, authority) as server:
        with dialled(server, Credentials(authority.ca, certificate, key)) as stub:
            assert outcome(stub) == "OK"
        with dialled(server, Credentials(authority.ca, certificate, key, token_file)) as stub:
            assert outcome(stub) == "UNAUTHENTICATED"


def test_tokens_are_rotated_without_a_restart_of_anything(tmp_path: Path, authority: Authority) -> None:
    old, new = TOKEN + "old", TOKEN + "new"
    settings = authority.server(line("worker", "pool", old, workers='["*"]'), client_certificates=False)
    token_file = tmp_path / "token"
    token_file.write_text(old)
    with (
        served(tmp_path / "run", **settings) as server,
        dialled(server, Credentials(authority.ca, token_file=token_file)) as stub,
    ):
        assert outcome(stub) == "OK"
        authority.allow(line("worker", "pool", old) + line("worker", "pool", new))
        assert outcome(stub) == "OK"
        token_file.write_text(new)
        assert outcome(stub) == "OK"
        authority.allow(line("worker", "pool", new))
        assert outcome(stub) == "OK"
        token_file.write_text(old)
        assert outcome(stub) == "UNAUTHENTICATED"


def test_a_list_that_can_not_be_used_leaves_the_one_before_in_force(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with guarded(tmp_path, authority) as server, dialled(server, authority.credentials("gpu-1")) as stub:
        authority.allow("[[allow")
        assert outcome(stub) == "OK"
        assert any("stay in force: the access list" in said for said in caplog.messages)
        authority.allow('[[allow]]\nrole = "reader"\ncertificate = "evaluator"')
        assert outcome(stub) == "UNAUTHENTICATED"


def test_streams_of_who_is_taken_off_the_list_end(tmp_path: Path, authority: Authority) -> None:
    with (
        guarded(tmp_path, authority, failure_timeout_seconds=1.0) as server,
        dialled(server, authority.credentials("gpu-1")) as first,
        dialled(server, authority.credentials("pool.example")) as second,
    ):
        gone, stays = WireWorker(first, "gpu-1"), WireWorker(second, "pool-7")
        streams = []
        for worker in (gone, stays):
            worker.join()
            stream = worker.open()
            stream.begin(None)
            stream.delivery()
            streams.append(stream)
        before = state_of(server)[:2]
        authority.allow(ACCESS.replace('certificate = "gpu-*"', 'certificate = "cpu-*"'))
        with pytest.raises(Refused) as ended:
            streams[0].receive()
        assert ended.value.code == grpc.StatusCode.CANCELLED
        with pytest.raises(Refused, match=r"the access list has no line for a certificate of 'gpu-1', '127\.0\.0\.1'"):
            gone.pull()
        stays.stub.Heartbeat(pb.HeartbeatRequest(worker="pool-7", incarnation=1))
        streams[1].begin(None)
        streams[1].delivery()
        assert state_of(server)[:2] == before
        eventually(lambda: len(server.streams) == 1)
        streams[1].drop()


def test_whoever_is_given_another_role_loses_the_streams_of_the_one_before(
    tmp_path: Path, authority: Authority
) -> None:
    with (
        guarded(tmp_path, authority, failure_timeout_seconds=2.0) as server,
        dialled(server, authority.credentials("gpu-1")) as stub,
    ):
        worker = WireWorker(stub, "gpu-1")
        worker.join()
        stream = worker.open()
        stream.begin(None)
        stream.delivery()
        authority.allow('[[allow]]\nrole = "reader"\ncertificate = "gpu-1"\n' + ACCESS)
        with pytest.raises(Refused) as ended:
            stream.receive()
        assert ended.value.code == grpc.StatusCode.CANCELLED
        assert server.host.engine.iteration()[1] == 0


def test_a_token_that_stands_twice_is_refused_and_the_list_before_stays(tmp_path: Path, authority: Authority) -> None:
    with guarded(tmp_path, authority) as server, dialled(server, authority.credentials("evaluator")) as stub:
        authority.allow(line("worker", "a", TOKEN) + line("admin", "b", TOKEN))
        stub.GetStatus(pb.GetStatusRequest())
    with pytest.raises(AccessError, match=r"\[\[allow\]\] number 2 has the token of number 1: draw another") as refused:
        read_list(tmp_path / "access.toml")
    assert TOKEN not in str(refused.value)


def test_a_list_that_is_nested_too_deeply_is_refused_like_any_other_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    path.write_text("a = " + 100_000 * "[")
    with pytest.raises(AccessError, match="is not valid TOML"):
        read_list(path)
