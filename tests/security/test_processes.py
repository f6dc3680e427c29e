"""Real programs that prove who they are to each other: training, strangers, stolen tickets, and rotation."""

import json
import re
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest

from ormo_protos.manifest import Manifest
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_runtime.channels import Dialer
from ormo_runtime.tls import Credentials
from security.authority import TOKEN, Authority, line
from service.wire import Refused, WireWorker, payload, refusals
from system.programs import Program, Stage

BRIEF = {"task": "digits", "connect_timeout_seconds": 3, "failure_timeout_seconds": 5}


def flags(credentials: Credentials) -> dict[str, Any]:
    given = {
        "tls_ca": credentials.ca,
        "tls_cert": credentials.certificate,
        "tls_key": credentials.key,
        "token_file": credentials.token_file,
    }
    return {name: value for name, value in given.items() if value is not None}


class Guarded(Stage):
    """Servers that ask for certificates; the operator looks at them."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        super().__init__(folder)
        self.authority = authority
        self.operator = authority.credentials("operator")

    def start(self, **more: Any) -> Program:
        return self.server(**(self.authority.server() | {"learning_rate": 0.02, "failure_timeout_seconds": 5} | more))

    def join(self, name: str, credentials: Credentials | None = None, **more: Any) -> Program:
        return self.worker(name, **(BRIEF | flags(credentials or self.authority.credentials(name)) | more))

    def status(self) -> pb.GetStatusResponse:
        with Dialer(self.address, self.operator).dial() as channel:
            return ParameterServerStub(channel).GetStatus(pb.GetStatusRequest(), timeout=5, wait_for_ready=True)


@pytest.fixture
def guarded(stage: Stage, authority: Authority) -> Guarded:
    made = Guarded(stage.folder, authority)
    made.programs = stage.programs  # which end with it
    return made


def ended(worker: Program) -> tuple[int, str]:
    return worker.wait(100), worker.log.read_text()  # several start at once, each with some seconds of the processor


def test_a_run_of_known_programs_and_a_crash_of_the_server(guarded: Guarded, authority: Authority) -> None:
    server = guarded.start(journal=True)
    workers = [guarded.join(f"gpu-{number}") for number in range(2)]
    guarded.until(lambda status: status.iteration.number > 30 and len(status.workers) == 2, "both at work")
    server.kill()
    server = guarded.start(journal=True)
    evaluator = guarded.evaluator("evaluator", task="digits", once=True, **flags(authority.credentials("evaluator")))
    assert evaluator.wait() == 0, evaluator.log.read_text()
    command = guarded.program(
        "look", "status", "--server", guarded.address, *words(flags(guarded.operator)), module="ormo_server"
    )
    assert command.wait() == 0, command.log.read_text()
    before = guarded.status().iteration.number
    guarded.until(lambda status: status.iteration.number > before + 20, "both at work again")
    assert [worker.terminate() for worker in workers] == [0, 0]
    assert server.terminate() == 0
    assert guarded.model().exists()


def words(given: dict[str, Any]) -> list[str]:
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.timeout(240)
def test_programs_that_can_not_prove_who_they_are_end_with_a_sentence(guarded: Guarded, authority: Authority) -> None:
    guarded.start()
    good = guarded.join("gpu-1")
    guarded.until(lambda status: status.iteration.number > 5, "training")
    elsewhere = Authority(guarded.folder)
    strangers = {
        "no TLS": guarded.worker("gpu-2", **BRIEF),
        "no certificate": guarded.join("gpu-3", Credentials(authority.ca)),
        "another authority's certificate": guarded.join("gpu-4", elsewhere.credentials("gpu-4", trusting=authority)),
        "an expired one": guarded.join("gpu-5", authority.credentials("gpu-5", expired=True)),
        "trusting another authority": guarded.join("gpu-6", authority.credentials("gpu-6", trusting=elsewhere)),
        "not on the list": guarded.join("stranger"),
        "another's name": guarded.join("gpu-7", authority.credentials("gpu-8")),
        "a reader's certificate": guarded.join("gpu-9", authority.credentials("evaluator")),
    }
    said = {
        "not on the list": r"UNAUTHENTICATED: the access list has no line for a certificate of 'stranger', '127",
        "another's name": "PERMISSION_DENIED: 'gpu-8' may not use the worker id 'gpu-7', only 'gpu-8'",
        "a reader's certificate": "PERMISSION_DENIED: 'evaluator' has the role reader, but .*/Join is for worker",
    }
    for what, worker in strangers.items():
        code, log = ended(worker)
        assert code == 1, (what, log)
        assert re.search(said.get(what, r"no parameter server answered .*--tls-ca"), log), (what, log)
    status = guarded.status()
    assert [worker.worker for worker in status.workers] == ["gpu-1"]
    assert status.refusals["PERMISSION_DENIED"] == 2
    before = status.iteration.number
    guarded.until(lambda status: status.iteration.number > before, "training still")
    assert good.terminate() == 0


def test_a_stolen_ticket_is_worth_nothing(guarded: Guarded, authority: Authority) -> None:
    """Whoever has another worker's certificate, ticket, incarnation and request numbers can't push in its place."""
    guarded.start(stop_after_gradients=10_000)
    guarded.join("gpu-1", leave_after_gradients=1).wait()  # offers the model
    with (
        Dialer(guarded.address, authority.credentials("gpu-2")).dial() as own,
        Dialer(guarded.address, authority.credentials("gpu-3")).dial() as thiefs,
    ):
        victim = WireWorker(ParameterServerStub(own), "gpu-2")
        welcome = victim.join()
        victim.manifest = Manifest.from_message(welcome.manifest)
        victim.pull()
        thief = WireWorker(ParameterServerStub(thiefs), "gpu-2", victim.manifest)
        thief.ticket, thief.request = victim.ticket, victim.request
        before = guarded.status().iteration.number
        for attempt in (thief.pull, thief.ask_to_join, lambda: push(thief)):
            with pytest.raises(Refused, match="'gpu-3' may not use the worker id 'gpu-2'") as refused, refusals():
                attempt()
            assert refused.value.code == grpc.StatusCode.PERMISSION_DENIED
        assert guarded.status().iteration.number == before
        assert push(victim).iteration.number == before + 1


def push(worker: WireWorker) -> pb.PushResult:
    return worker.push(payload(worker.manifest, 0.0))


def test_everybodys_certificates_are_replaced_while_they_train(guarded: Guarded, authority: Authority) -> None:
    """As cert-manager does it: the files change, and nobody restarts for it; the old authority is out in the end."""
    server = guarded.start(stop_after_gradients=10**6, journal=True)
    own = authority.pair("gpu-1", into="mine")
    trusted = guarded.folder / "trusted.pem"
    trusted.write_bytes(authority.ca.read_bytes())
    worker = guarded.join("gpu-1", Credentials(trusted, *own), connect_timeout_seconds=60)
    guarded.until(lambda status: status.iteration.number > 5, "training")
    old, new = authority.credentials("gpu-2"), Authority(guarded.folder)
    new.pair("gpu-1", into="mine")
    new.pair("localhost", into="server")
    for path in (trusted, authority.ca):
        new_file = path.with_suffix(".new")
        new_file.write_bytes(new.ca.read_bytes())
        new_file.rename(path)
    guarded.authority, guarded.operator = new, new.credentials("operator")
    assert len(guarded.status().workers) == 1, "a new connection with new certificates, and the old one goes on"
    code, log = ended(guarded.join("gpu-2", Credentials(new.ca, old.certificate, old.key)))
    assert code == 1
    assert "no parameter server answered" in log
    second = guarded.join("gpu-3")
    guarded.until(lambda status: len(status.workers) == 2, "a worker with a new certificate")
    assert second.terminate() == 0
    # Who was connected before must bring the new one when its connection breaks.
    server.kill()
    guarded.start(stop_after_gradients=10**6, journal=True)
    before = guarded.status().iteration.number
    guarded.until(lambda status: status.iteration.number > before + 5, "training with the new certificates")
    assert worker.process.poll() is None
    assert worker.terminate() == 0


def test_a_token_is_taken_away_while_its_worker_trains(guarded: Guarded, authority: Authority) -> None:
    operator = line("admin", "operator", TOKEN + "operator")
    access = line("worker", "pool", TOKEN + "pool", workers='["pool-*"]') + operator
    guarded.authority.allow(access)
    given = authority.server(access, client_certificates=False) | {"failure_timeout_seconds": 1, "learning_rate": 0.02}
    guarded.server(**given)
    files = {name: guarded.folder / f"{name}.token" for name in ("pool", "operator")}
    for name, path in files.items():
        path.write_text(f"{TOKEN}{name}\n")
    guarded.operator = Credentials(authority.ca, token_file=files["operator"])
    worker = guarded.join("pool-1", Credentials(authority.ca, token_file=files["pool"]))
    guarded.until(lambda status: status.iteration.number > 5, "training")
    authority.allow(operator)
    code, log = ended(worker)
    assert code == 1
    assert "UNAUTHENTICATED: this server does not know the bearer token" in log
    assert "operator.token" not in log
    assert TOKEN not in log
    guarded.until(lambda status: not status.workers, "its lease to end")
    assert TOKEN not in guarded.programs[0].log.read_text()


def test_failed_handshake_of_a_stranger_is_no_line_of_grpc_s_own(guarded: Guarded) -> None:
    server = guarded.start(log_format="json", through=["env"])  # a process that has not imported gRPC before
    host, _, port = guarded.address.rpartition(":")
    for _ in range(2):
        ssl.get_server_certificate((host, int(port)))
    assert server.terminate() == 0
    assert all(json.loads(line)["message"] for line in server.log.read_text().splitlines())
