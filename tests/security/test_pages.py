"""What docs/security.md and SECURITY.md say of security is so: the commands run, the tables are those of the code."""

import re
import shlex
import shutil
import socket
import subprocess

from grpc_health.v1 import health_pb2

from docs.pages import EXAMPLES, ROOT, example, text_of
from ormo_protos.limits import LONGEST_LISTS, MAX_ELEMENTS, MAX_NAME_BYTES, MAX_REPEATS, SMALL_MESSAGE_BYTES
from ormo_protos.refusals import Reason
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_runtime.channels import Dialer
from ormo_runtime.tls import Credentials
from ormo_server.security import ALLOWED, Role
from ormo_server.service.server import SERVICE
from ormo_server.settings import ServerSettings
from system.programs import Stage

TEXT = text_of("security.md")
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def rows(name: str) -> list[list[str]]:
    _, _, rest = TEXT.partition(f"<!-- {name} -->\n")
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_certificates_are_made_and_a_guarded_run_is_started_as_it_is_written(stage: Stage) -> None:
    subprocess.run([EXAMPLES / "tls" / "certificates.sh"], cwd=stage.folder, check=True, capture_output=True)
    shutil.copy(EXAMPLES / "tls" / "access.toml", stage.folder)
    stage.address = f"localhost:{free_port()}"
    commands = [shlex.split(line) for line in example("security.md", "guarded").splitlines()]
    assert [words[:2] for words in commands] == [
        ["ormo-server", "serve"],
        ["ormo-worker", "run"],
        ["ormo-server", "control"],
    ]
    started = []
    for program, *typed in commands:
        words = [stage.address if word == "localhost:50051" else word for word in typed]
        if words[0] == "serve":
            words += ["--metrics-listen", ""]
        made = stage.program(words[0], *words, module=program.replace("-", "_"))
        if words[0] == "serve":
            assert made.process.stdout is not None
            assert made.process.stdout.readline().startswith("serving"), made.log.read_text()
        if words[0] == "run":
            operator = [stage.folder / name for name in ("ca.pem", "operator.pem", "operator.key")]
            with Dialer(stage.address, Credentials(*operator)).dial() as channel:
                stub = ParameterServerStub(channel)
                while stub.GetStatus(pb.GetStatusRequest(), timeout=5, wait_for_ready=True).iteration.number < 5:
                    assert made.process.poll() is None, made.log.read_text()
        started.append(made)
    server, worker, control = started
    assert control.wait() == 0, control.log.read_text()
    assert worker.terminate() == 0
    assert server.terminate() == 0


def test_roles_may_what_the_table_says() -> None:
    table = dict(rows("roles"))
    said = {name.strip("`"): set(re.findall(r"`([A-Z]\w+)`", may)) for name, may in table.items()}
    assert set(said) == set(Role)
    for name, may in table.items():
        if "what readers may" in may:
            said[name.strip("`")] |= said["reader"]
    allowed = {
        role: {method.name for method in SERVICE.methods if role in ALLOWED[f"/{SERVICE.full_name}/{method.name}"]}
        for role in Role
    }
    assert said == allowed
    assert all(ALLOWED[f"/{health_pb2.DESCRIPTOR.package}.Health/{name}"] == set(Role) for name in ("Check", "Watch"))


def test_limits_name_settings_and_reasons_that_there_are() -> None:
    found = rows("limits")
    assert len(found) > 10
    for _, value, refusal in found:
        for flag in re.findall(r"`--([\w-]+)`", value):
            assert flag.replace("-", "_") in ServerSettings.model_fields
        reasons = re.findall(r"`([A-Z_]+)`", refusal)
        assert reasons == [] or reasons[0] in set(Reason) or "by gRPC" in refusal


def test_limits_on_lists_are_those_of_the_code() -> None:
    values = {limit: value for limit, value, _ in rows("limits")}
    said = [
        values["tensors of a model, bytes of a name, dimensions, elements"].replace("2^48", f"{2**48:,}"),
        values["tickets that a heartbeat returns"],
        values["workers, and reasons of refusals, in a server's status"],
        values["times that any other field comes in one message"],
    ]
    most = {name.removeprefix("ormo.v1."): number for name, number in LONGEST_LISTS.items()}
    expected = [
        (most["Manifest.tensors"], MAX_NAME_BYTES, most["TensorSpec.shape"], MAX_ELEMENTS),
        (most["HeartbeatRequest.returned"],),
        (most["GetStatusResponse.workers"], most["GetStatusResponse.refusals"]),
        (MAX_REPEATS,),
    ]
    assert said == [", ".join(f"{number:,}" for number in numbers) for numbers in expected]
    assert values["a request that is one message"] == f"{SMALL_MESSAGE_BYTES >> 10} KiB"


def test_what_security_md_names_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in re.findall(r"`make (\w+)`", SECURITY):
        assert re.search(rf"^{word}:", makefile, re.MULTILINE), word
    for path in re.findall(r"`((?:tests|deploy)/[\w/]+|constraints\.txt)`", SECURITY):
        assert (ROOT / path).exists()
    for flag in re.findall(r"`--([\w-]+)`", SECURITY):
        assert flag.replace("-", "_") in ServerSettings.model_fields
