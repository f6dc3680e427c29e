"""A server that lies: whatever it says, the worker shows it as text, or ends with one sentence."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ormo_protos.manifest import FLOAT32
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker.client.api import ParameterClient
from ormo_worker.client.arguments import Observer, Patience
from ormo_worker.client.messages import Gradient
from ormo_worker.errors import ModelUnusable, ProtocolBroken, Refused
from ormo_worker.pytorch.transfer import Staging
from system.programs import staged
from worker.fake_server import FakeServer, refuse

EVIL = "\x1b]0;owned\x07\x1b[31mEVIL\x1b[2J\r\nFAKE LINE\u202e"
SHOWN = r"\x1b]0;owned\x07\x1b[31mEVIL\x1b[2J\r\nFAKE LINE\u202e"
QUICK = Patience(connect_timeout=5.0, failure_timeout=5.0)


def client_of(
    server: FakeServer, observer: Observer | None = None, **tensors: nn.Parameter
) -> tuple[ParameterClient, Staging]:
    model = nn.ParameterDict(tensors) if tensors else nn.Linear(1, 1, bias=False)
    staging = Staging(model)
    client = ParameterClient(
        server.address,
        staging.tensors.manifest,
        model=staging.snapshot,
        worker_id="w",
        patience=QUICK,
        observer=observer,
    )
    return client, staging


COMMANDS: dict[str, tuple[list[str], tuple[str, Any]]] = {
    "run": (["run"], ("join", refuse("FAILED_PRECONDITION", message=EVIL))),
    "run, with a reason of its own": (["run"], ("join", refuse("FAILED_PRECONDITION", EVIL, message=EVIL))),
    "evaluate": (["evaluate", "--once"], ("pull", refuse("FAILED_PRECONDITION", message=EVIL))),
    "run, tried again": (["run", "--leave-after-gradients", "1"], ("join", refuse("UNAVAILABLE", message=EVIL))),
}


@pytest.mark.parametrize(("command", "form"), [*((name, "text") for name in COMMANDS), ("run, tried again", "json")])
def test_what_a_server_says_is_one_line_with_escapes(
    server: FakeServer, tmp_path: Path, command: str, form: str
) -> None:
    argv, fault = COMMANDS[command]
    server.told(fault)
    flags = ["--server", server.address, "--task", "worker.lines:Lines", "--log-format", form]
    with staged(tmp_path) as stage:
        worker = stage.program("worker", *argv, *flags, module="ormo_worker")
        code, printed = worker.printed()
        said = worker.log.read_text()
    assert code == ("again" not in command)
    lines = (printed + said).split("\n")
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith("FAKE") for line in lines)
    assert (SHOWN if form == "text" else SHOWN.replace("\\", "\\\\")) in said


class Causes(Observer):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def note_retry(self, cause: str) -> None:
        self.seen.append(cause)


def test_errors_and_metrics_have_no_words_that_a_server_made_up(server: FakeServer) -> None:
    """Errors are shown by whatever program uses the package."""
    causes = Causes()
    client, _ = client_of(server, causes)
    server.told(("join", refuse("UNAVAILABLE", EVIL, message=EVIL)), ("join", refuse("NOT_FOUND", EVIL, message=EVIL)))
    with client, pytest.raises(Refused) as refused:
        client.join()
    assert SHOWN in str(refused.value)
    assert str(refused.value).isprintable()
    assert refused.value.reason == SHOWN
    assert causes.seen == ["UNAVAILABLE"]


def test_a_refused_gradient_has_a_sentence_with_escapes(server: FakeServer) -> None:
    client, staging = client_of(server)
    with client:
        client.join()
        client.slots[0].exchange(None)
        server._result = lambda who, *_: pb.PushResult(request=who.request, refusal=EVIL, refusal_message=EVIL)  # type: ignore[method-assign]
        outcome = client.slots[0].exchange(Gradient(staging.payload(FLOAT32, with_buffers=False), samples=1))
    assert outcome.refusal is not None
    assert (outcome.refusal.refusal, outcome.refusal.refusal_message) == (SHOWN, SHOWN)


def test_a_model_of_more_tensors_than_there_may_be_is_a_sentence(server: FakeServer) -> None:
    tensors = [pb.TensorSpec()] * 100_001
    server.answers_to_join.append(pb.JoinResponse(welcome=pb.Welcome(manifest=pb.Manifest(tensors=tensors))))
    client, _ = client_of(server)
    with client, pytest.raises(ProtocolBroken, match=r"Manifest\.tensors appears more than 100,000 times"):
        client.join()


BAD_NAMES = ["two\x1b[31mlines", "bidi\u202e", "zero\u200bwidth", "bell\x07", "__metadata__", "nul\x00", "line\u2028"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_model_that_a_server_would_refuse_for_a_name_is_not_offered(server: FakeServer, name: str) -> None:
    client, _ = client_of(server, **{name: nn.Parameter(nn.Linear(1, 1).weight.detach())})
    with client, pytest.raises(ModelUnusable) as unusable:
        client.join()
    assert str(unusable.value).isprintable()
    assert f"tensor name {name!r}" in str(unusable.value)
    assert server.asked == ["join"]


def test_a_name_that_no_message_can_hold_is_a_sentence(server: FakeServer) -> None:
    with pytest.raises(ModelUnusable, match=r"tensor name '\\ud800': expected 1 to 512 bytes of UTF-8"):
        client_of(server, **{"\ud800": nn.Parameter(nn.Linear(1, 1).weight.detach())})


def test_a_worker_goes_on_with_a_run_that_has_begun_with_such_names(server: FakeServer) -> None:
    """Under an older version, which took them."""
    client, staging = client_of(server, **{"old\x1bname": nn.Parameter(nn.Linear(1, 1).weight.detach())})
    server.manifest, server.model = staging.tensors.manifest, staging.snapshot()
    with client:
        client.join()
        assert client.slots[0].exchange(None).delivered is not None
