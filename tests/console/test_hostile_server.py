"""A server that lies: whatever it says, the console shows it as text, or says in one sentence why not."""

import json
import math
import random
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from console.building import history, screen, worker
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerServicer, add_ParameterServerServicer_to_server
from ormo_server.cli import main

EVIL = "\x1b]0;owned\x07\x1b[31mEVIL\x1b[2J\r\nFAKE LINE\u202e[red]"
SHOWN = r"\x1b]0;owned\x07\x1b[31mEVIL\x1b[2J\r\nFAKE LINE\u202e[red]"


class Liar(ParameterServerServicer):
    """Says what it is told to say, and ends calls with a sentence if that is nothing."""

    def __init__(self) -> None:
        self.status: pb.GetStatusResponse | None = None
        self.address = ""

    def GetStatus(self, request: Any, context: grpc.ServicerContext) -> pb.GetStatusResponse:  # noqa: N802
        if self.status is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, EVIL)
        return self.status

    def Control(self, request: Any, context: grpc.ServicerContext) -> pb.ControlResponse:  # noqa: N802
        return pb.ControlResponse(checkpoint_path=EVIL)


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> Iterator[Liar]:
    monkeypatch.setattr("signal.signal", lambda *_: None)  # signals are the test runner's
    made = Liar()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_ParameterServerServicer_to_server(made, server)
    made.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield made
    server.stop(0).wait()


def evil_status() -> pb.GetStatusResponse:
    """With the same text in all places that take one."""
    texts = {
        field.name: EVIL
        for field in pb.GetStatusResponse.DESCRIPTOR.fields
        if field.type == field.TYPE_STRING and not field.is_repeated
    }
    settings = pb.RunSettings(method=EVIL)
    return pb.GetStatusResponse(workers=[worker(EVIL)], refusals={EVIL: 3}, settings=settings, phase=3, **texts)


COMMANDS = {
    "status": ["status"],
    "status as JSON": ["status", "--json"],
    "top": ["top", "--every-seconds", "0.1"],
    "control": ["control", "--checkpoint"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_server_says_is_shown_with_escapes(liar: Liar, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    liar.status = evil_status()
    assert main([*COMMANDS[command], "--server", liar.address]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert all(line.isprintable() for line in out.split("\n"))
    assert not any(line.startswith("FAKE") for line in out.split("\n"))
    if command == "status as JSON":
        told = json.loads(out)
        assert told["version"] == SHOWN
        assert told["refusals"] == {SHOWN: 3}
        assert told["workers"][0]["worker"] == SHOWN
    else:
        assert SHOWN in out


@pytest.mark.parametrize("command", ["status", "status as JSON", "top"])
def test_a_sentence_of_a_refusal_is_shown_with_escapes(
    liar: Liar, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMANDS[command], "--server", liar.address]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert f"no answer from {liar.address} ({SHOWN})" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["status", "status as JSON", "top"])
def test_more_than_anybody_reads_is_a_sentence(liar: Liar, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    liar.status = pb.GetStatusResponse(workers=[pb.WorkerStatus()] * 10_001)
    assert main([*COMMANDS[command], "--server", liar.address]) == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "its answer can't be understood: GetStatusResponse.workers appears more than 10,000 times" in err


NUMBERS: dict[int, list[Any]] = {
    FieldDescriptor.CPPTYPE_DOUBLE: [0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e308, 5e-324],
    FieldDescriptor.CPPTYPE_INT64: [0, 1, -1, 2**63 - 1, -(2**63)],
    FieldDescriptor.CPPTYPE_INT32: [0, 1, -1, 2**31 - 1, -(2**31)],
    FieldDescriptor.CPPTYPE_ENUM: [0, 3, -1, 2**31 - 1],
}


def filled(message: Message, by: random.Random) -> None:
    """Have some of a message's numbers be odd ones."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None:
            if not field.is_repeated:
                filled(getattr(message, field.name), by)
        elif field.cpp_type in NUMBERS:
            whole, small = (
                field.cpp_type != field.CPPTYPE_DOUBLE,
                field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_ENUM),
            )
            odd = [number for number in NUMBERS if not whole or isinstance(number, int)]
            number = by.choice([number for number in odd if not small or abs(number) < 2])
            setattr(message, field.name, number)


def test_odd_numbers_are_shown_somehow(liar: Liar, capfd: pytest.CaptureFixture[str]) -> None:
    by = random.Random(15)
    for _ in range(100):
        answers = []
        for _ in range(2):
            answer = pb.GetStatusResponse(workers=[worker("w"), worker("v")])
            for each in (answer, *answer.workers):
                filled(each, by)
            answers.append(answer)
        assert screen(history(*answers), height=24)
        liar.status = answers[0]
        for json_flag in ([], ["--json"]):
            assert main(["status", *json_flag, "--server", liar.address]) == 0
    out, _ = capfd.readouterr()
    assert out
