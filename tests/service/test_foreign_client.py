"""Clients that are not ours: generated code with and without `data`, and `buf curl`, which knows nothing at first."""

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2

from ormo_protos.limits import CHUNK_BYTES
from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Payload
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.service.server import Server
from service.wire import SMALL, Exchanges, WireWorker, connected, payload, served, tensor_chunks

BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")


def curl(server: Server, method: str, request: dict[str, object]) -> subprocess.CompletedProcess[str]:
    assert BUF is not None
    address = f"http://{server.address}/ormo.v1.ParameterServer/{method}"
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", json.dumps(request), address]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.skipif(BUF is None, reason="buf is not installed: pip install buf-bin")
def test_foreign_client_learns_the_service_calls_it_and_reads_its_refusals(tmp_path: Path) -> None:
    with served(tmp_path, reflection=True) as server:
        status = curl(server, "GetStatus", {})
        assert json.loads(status.stdout)["phase"] == "PHASE_WAITING_FOR_MODEL"
        joined = curl(server, "Join", {"worker": "foreign", "incarnation": "7", "protocolVersion": 1, "slots": 1})
        assert "modelWanted" in json.loads(joined.stdout)
        refused = curl(server, "Join", {"worker": "foreign", "incarnation": "7", "protocolVersion": 9})
        assert refused.returncode != 0
        error = json.loads(refused.stderr)
        assert error["code"] == "failed_precondition"
        assert "install the same version" in error["message"]
        info = error_details_pb2.ErrorInfo.FromString(base64.b64decode(error["details"][0]["value"] + "=="))
        assert (info.reason, info.domain) == ("PROTOCOL_VERSION", "ormo.v1")


@pytest.mark.skipif(BUF is None, reason="buf is not installed: pip install buf-bin")
def test_reflection_is_off_unless_asked_for(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        assert curl(server, "GetStatus", {}).returncode != 0


# Small payloads in one message. A client may use that in either direction, in both, or not know of it.

TWO_CHUNKS = Manifest.laid_out([TensorSpec("weight", (CHUNK_BYTES // 4 + 2,), FLOAT32, PARAMETER)])
MODELS = {"small": SMALL, "two chunks": TWO_CHUNKS}
STEPS = 4
Trained = tuple[list[pb.PushResult], torch.Tensor]


class ForeignWorker(WireWorker):
    """Generated messages only, and what comes is checked against what was asked for."""

    def __init__(self, *arguments: Any, sends_data: bool, takes_data: bool) -> None:
        super().__init__(*arguments)
        self.sends_data, self.takes_data = sends_data, takes_data

    def requests(self, gradient: Payload | None, *, wants: bool) -> Iterator[pb.PushPullRequest]:
        message = self.exchange(gradient, wants=wants)
        if wants:
            message.exchange.next.takes_data = self.takes_data
        chunks = list(tensor_chunks(gradient)) if gradient is not None else []
        if self.sends_data and chunks:
            message.data = chunks.pop(0).data
        yield message
        yield from (pb.PushPullRequest(chunk=chunk) for chunk in chunks)

    def step(self, stream: Exchanges, gradient: Payload | None, *, wants: bool = True) -> pb.PushResult | None:
        """One exchange."""
        for message in self.requests(gradient, wants=wants):
            stream.send(message)
        result = None
        if gradient is not None and not (wants and self.takes_data):
            result = stream.result()
        if not wants:
            return result
        answer = stream.receive()
        assert answer.WhichOneof("part") == "delivery"
        assert bool(answer.data) == self.takes_data
        assert answer.delivery.HasField("result") == (self.takes_data and gradient is not None)
        self.receive(answer.delivery, self.pieces(stream, answer.data))
        return answer.delivery.result if gradient is not None and self.takes_data else result

    def pieces(self, stream: Exchanges, data: bytes) -> Iterator[pb.TensorChunk]:
        if data:
            yield pb.TensorChunk(offset=0, data=data)
        while True:
            answer = stream.receive()
            assert (answer.WhichOneof("part"), answer.data) == ("chunk", b"")
            yield answer.chunk


def trained(folder: Path, model: Manifest, *, sends_data: bool, takes_data: bool) -> Trained:
    """The results of some steps, and the parameters after them."""
    with served(folder) as server, connected(server) as stub:
        worker = ForeignWorker(stub, "foreign", model, sends_data=sends_data, takes_data=takes_data)
        assert worker.join().takes_data
        stream = worker.open()
        worker.step(stream, None)
        results = []
        for step in range(STEPS):
            gradient = payload(model, 0.0)
            gradient.parameters.copy_(worker.params - torch.linspace(-1.0, 1.0, gradient.layout.parameters))
            result = worker.step(stream, gradient, wants=step < STEPS - 1)
            assert result is not None
            result.iteration.epoch = 0  # each server's own
            results.append(result)
        stream.finish()
        assert list(stream.call) == []
        worker.pull()
        return results, worker.params


@pytest.fixture(scope="module")
def in_chunks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """What a client that does not know of `data` trains."""
    folder = tmp_path_factory.mktemp("in-chunks")
    return {name: trained(folder / name, model, sends_data=False, takes_data=False) for name, model in MODELS.items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("sends_data", "takes_data"), [(True, True), (True, False), (False, True)])
def test_one_message_each_way_or_chunks_train_to_the_same_parameters(
    tmp_path: Path,
    in_chunks: dict[str, Trained],
    model: str,
    sends_data: bool,
    takes_data: bool,
) -> None:
    results, params = trained(tmp_path, MODELS[model], sends_data=sends_data, takes_data=takes_data)
    assert [result.iteration.number for result in results] == list(range(1, STEPS + 1))
    assert results == in_chunks[model][0]
    assert torch.equal(params, in_chunks[model][1])


def without_data() -> dict[str, type[Message]]:
    """Generated code of a contract without `data`, `takes_data` and `Delivery.result`, as before they were there."""
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    newer = {("PushPullRequest", "data"), ("PushPullResponse", "data"), ("DeliveryRequest", "takes_data")}
    newer |= {("Welcome", "takes_data"), ("Delivery", "result")}
    for message in file.message_type:
        fields = [field for field in message.field if (message.name, field.name) not in newer]
        newer -= {(message.name, field.name) for field in message.field}
        del message.field[:]
        message.field.extend(fields)
    assert not newer
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindFileByName(file.name)
    return {name: GetMessageClass(descriptor) for name, descriptor in found.message_types_by_name.items()}


def test_client_whose_contract_has_no_data_finds_nothing_that_it_does_not_know(tmp_path: Path) -> None:
    old: dict[str, Any] = without_data()
    assert "data" not in old["PushPullResponse"].DESCRIPTOR.fields_by_name
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "old")
        welcome = old["Welcome"].FromString(worker.join().SerializeToString())
        assert welcome.manifest.digest == SMALL.digest
        worker.pull()
        stream = worker.open()
        stream.begin(payload(SMALL, 1.0))
        for part in ("result", "delivery", "chunk"):
            answer = stream.receive()
            known = old["PushPullResponse"].FromString(answer.SerializeToString())
            assert known.WhichOneof("part") == part
            known.DiscardUnknownFields()
            assert pb.PushPullResponse.FromString(known.SerializeToString()) == answer
