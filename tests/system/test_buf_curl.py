"""A whole training by `buf curl`: JSON in, JSON out, tensors in base64; a server that is a process of its own."""

import base64
import json
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from system.programs import Stage

BUF = shutil.which("buf")
pytestmark = pytest.mark.skipif(BUF is None, reason="buf is not on the PATH: install buf-bin, or use `make test`")

PROTOS = Path(__file__).parents[2] / "protos"
# Where the client learns the contract: from the server, or from the file.
SCHEMAS: dict[str, list[str]] = {"reflection": [], "file": ["--schema", str(PROTOS)]}
MODEL = Manifest.laid_out([TensorSpec("weight", (3,), FLOAT32, PARAMETER)])
DIGEST = base64.b64encode(MODEL.digest).decode()
PADDED = "<3f4x"
WHO = {"worker": "foreign", "incarnation": "7"}
Curl = Callable[..., list[dict[str, Any]]]


def payload(*numbers: float) -> bytes:
    return struct.pack(PADDED, *numbers)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def numbers(encoded: str) -> list[float]:
    return list(struct.unpack(PADDED, base64.b64decode(encoded)))


class CurlError(Exception):
    """The call ended with a status: its code."""


def values(output: str) -> Iterable[dict[str, Any]]:
    """JSON documents, one after the other."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(output.rstrip()):
        value, at = decoder.raw_decode(output, at)
        yield value
        at += len(output[at:]) - len(output[at:].lstrip())


@pytest.fixture(params=SCHEMAS)
def curl(stage: Stage, request: pytest.FixtureRequest) -> Curl:
    """Sends requests to a method of a server that has just started; returns all answers."""
    known = SCHEMAS[request.param]
    settings = stage.folder / "server.toml"
    settings.write_text(f"reflection = {json.dumps(not known)}\nlearning_rate = 1.0\nmomentum = 0.5\n")
    stage.server(config=settings)

    def call(method: str, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        address = f"http://{stage.address}/ormo.v1.ParameterServer/{method}"
        command = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *known, "-d", "@-", address]
        sent = "\n".join(map(json.dumps, requests))
        ran = subprocess.run(command, input=sent, capture_output=True, text=True, timeout=60, check=False)
        if ran.returncode:
            raise CurlError(json.loads(ran.stderr)["code"])
        return list(values(ran.stdout))

    return call


def exchange(number: int, gradient: dict[str, Any] | None = None, **wanted: Any) -> dict[str, Any]:
    message = {"requester": WHO | {"request": str(number)}, "next": {"dtype": "DTYPE_FLOAT32"} | wanted}
    return {"exchange": message if gradient is None else message | {"gradient": gradient}}


def gradient(ticket: dict[str, Any], **changes: Any) -> dict[str, Any]:
    size = str(struct.calcsize(PADDED))
    return {"ticket": ticket, "manifestDigest": DIGEST, "dtype": "DTYPE_FLOAT32", "payloadBytes": size} | changes


def chunk(offset: int, data: bytes) -> dict[str, Any]:
    return {"chunk": {"offset": str(offset), "data": text(data)}}


def joined(curl: Curl) -> dict[str, Any]:
    (answer,) = curl("Join", WHO | {"protocolVersion": 1, "slots": 1})
    return answer


def test_foreign_client_gives_a_model_and_trains_it(curl: Curl) -> None:
    assert curl("GetStatus", {})[0]["phase"] == "PHASE_WAITING_FOR_MODEL"
    assert "modelWanted" in joined(curl)
    offer = {"offer": WHO | {"manifest": MessageToDict(MODEL.to_message())}}
    start = payload(2.0, 4.0, 8.0)
    curl("OfferModel", offer, chunk(0, start[:10]), chunk(10, start[10:]))
    welcome = joined(curl)["welcome"]
    assert (welcome["manifest"]["digest"], welcome["takesData"]) == (DIGEST, True)

    delivery, piece = curl("PushPull", exchange(1))
    assert numbers(piece["chunk"]["data"]) == [2.0, 4.0, 8.0]
    ticket = delivery["delivery"]["ticket"]

    # In chunks: result, delivery and parameters are messages of their own.
    ones = payload(1.0, 1.0, 1.0)
    result, delivery, piece = curl("PushPull", exchange(2, gradient(ticket)), chunk(0, ones[:4]), chunk(4, ones[4:]))
    assert result["result"]["iteration"]["number"] == "1"
    assert numbers(piece["chunk"]["data"]) == [1.0, 3.0, 7.0]
    ticket = delivery["delivery"]["ticket"]

    # With `data`: one message each way. With momentum 0.5 the second step is one of 1.5.
    request = exchange(3, gradient(ticket), takesData=True) | {"data": text(ones)}
    (together,) = curl("PushPull", request)
    assert together["delivery"]["result"]["iteration"]["number"] == "2"
    assert numbers(together["data"]) == [-0.5, 1.5, 5.5]

    (again,) = curl("PushPull", request)
    assert again["delivery"]["result"]["repeated"]
    header, piece = curl("PullParams", {"delivery": {"dtype": "DTYPE_FLOAT32"}})
    assert header["delivery"]["iteration"]["number"] == "2"
    assert numbers(piece["chunk"]["data"]) == [-0.5, 1.5, 5.5]
    assert curl("GetStatus", {})[0]["iteration"]["number"] == "2"


def test_foreign_client_is_told_what_is_wrong(curl: Curl) -> None:
    with pytest.raises(CurlError, match="unavailable"):
        curl("PullParams", {"delivery": {"dtype": "DTYPE_FLOAT32"}})
    with pytest.raises(CurlError, match="invalid_argument"):
        curl("OfferModel", chunk(0, b"abcd"))
    with pytest.raises(CurlError, match="failed_precondition"):
        curl("Join", WHO | {"protocolVersion": 2, "slots": 1})
