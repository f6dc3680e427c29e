"""A worker's model is judged before the worker counts; a server's model can be asked for, and offered in parts."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from ormo_protos.manifest import (
    AVERAGE,
    BFLOAT16,
    BUFFER,
    FLOAT32,
    FLOAT64,
    FROZEN,
    PARAMETER,
    Manifest,
    TensorSpec,
)
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.service.server import Server
from service.wire import SMALL, Refused, WireWorker, connected, payload, refusals, served, tensor_chunks

# As many tensors with long names as take three messages.
WIDE = Manifest.laid_out(TensorSpec(f"{'e' * 500}{number}", (), FLOAT32, PARAMETER) for number in range(10_000))
OTHER = Manifest.laid_out([TensorSpec("weight", (2, 4), FLOAT32, PARAMETER)])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with served(tmp_path / "run") as made:
        yield made


@pytest.fixture
def stub(server: Server) -> Iterator[ParameterServerStub]:
    with connected(server) as made:
        yield made


def described(stub: ParameterServerStub) -> Manifest:
    with refusals():
        return Manifest.from_messages([part.manifest for part in stub.DescribeModel(pb.DescribeModelRequest())])


def begin(stub: ParameterServerStub, manifest: Manifest) -> WireWorker:
    """A run with this model."""
    worker = WireWorker(stub, "first", manifest)
    assert worker.ask_to_join().model_wanted.manifest_version == 1
    parts = manifest.to_messages()
    offer = pb.ModelOffer(worker=worker.name, incarnation=worker.incarnation, manifest=next(parts))
    with refusals():
        stub.OfferModel(
            itertools.chain(
                [pb.OfferModelRequest(offer=offer)],
                (pb.OfferModelRequest(more=part) for part in parts),
                (
                    pb.OfferModelRequest(chunk=chunk)
                    for chunk in tensor_chunks(payload(manifest, 0.0, buffers=True, frozen=True))
                ),
            )
        )
    return worker


def members(stub: ParameterServerStub) -> set[str]:
    return {each.worker for each in stub.GetStatus(pb.GetStatusRequest()).workers}


def test_a_worker_with_the_servers_model_is_welcomed_without_its_tensors(stub: ParameterServerStub) -> None:
    begin(stub, SMALL)
    halves = Manifest.laid_out(
        dataclasses.replace(spec, dtype=BFLOAT16 if spec.dtype == FLOAT32 else spec.dtype) for spec in SMALL.tensors
    )
    worker = WireWorker(stub, "half", halves)
    welcome = worker.ask_to_join(model_digest=halves.model_digest).welcome
    assert not welcome.HasField("manifest")
    assert welcome.lease_seconds > 0
    delivery = worker.pull()
    assert (delivery.manifest_digest, delivery.model_digest) == (SMALL.digest, halves.model_digest)
    assert worker.push(payload(halves, 1.0), manifest_digest=halves.model_digest).iteration.number == 1


@pytest.mark.parametrize("digest", [OTHER.model_digest, b"x", b"\0" * 33])
def test_a_worker_with_another_model_is_refused_before_it_counts_and_told_the_folder(
    server: Server, stub: ParameterServerStub, tmp_path: Path, digest: bytes
) -> None:
    begin(stub, SMALL)
    with server.host.engine.inspect() as machine:
        before = machine.bucket_size, machine.state.joins
    with pytest.raises(Refused, match=f"model is not that of the run in {tmp_path / 'run'}: ") as refused:
        WireWorker(stub, "other").ask_to_join(model_digest=digest)
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MANIFEST_DIGEST")
    with server.host.engine.inspect() as machine:
        assert (machine.bucket_size, machine.state.joins) == before
    assert members(stub) == set()


def test_where_there_is_no_model_a_digest_is_not_judged(stub: ParameterServerStub) -> None:
    assert WireWorker(stub, "a").ask_to_join(model_digest=b"x" * 32).HasField("model_wanted")


def test_an_older_worker_gets_the_manifest_that_it_would_write_itself(stub: ParameterServerStub) -> None:
    *rest, mean, count = SMALL.tensors
    begin(stub, Manifest.laid_out([*rest, dataclasses.replace(mean, merge=AVERAGE), count]))
    worker = WireWorker(stub, "older")
    assert Manifest.from_message(worker.ask_to_join().welcome.manifest) == SMALL
    assert worker.pull().manifest_digest == SMALL.digest, "what it compares with its own, and so does an older reader"
    assert worker.push(payload(SMALL, 1.0), manifest_digest=SMALL.digest).iteration.number == 1


def with_tensor(dtype: pb.Dtype.ValueType, role: pb.Role.ValueType) -> Manifest:
    return Manifest.laid_out([SMALL.tensors[0], TensorSpec("other", (2,), dtype, role)])


@pytest.mark.parametrize(
    ("manifest", "sentence"),
    [
        (WIDE, "the model has a manifest larger than a message"),
        (with_tensor(FLOAT32, FROZEN), "the model has a float32 frozen parameter of shape"),
        (with_tensor(FLOAT64, BUFFER), "the model has a float64 buffer of shape"),
    ],
    ids=["wide", "frozen", "float64"],
)
def test_an_older_worker_is_told_what_it_does_not_know_and_does_not_count(
    tmp_path: Path, manifest: Manifest, sentence: str
) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        begin(stub, manifest)
        with pytest.raises(Refused, match=sentence) as refused:
            WireWorker(stub, "older").ask_to_join()
        assert refused.value.reason == "PROTOCOL_VERSION"
        assert members(stub) == set()


def test_the_manifest_is_told_to_whoever_asks_in_as_many_messages_as_it_needs(stub: ParameterServerStub) -> None:
    with pytest.raises(Refused) as refused:
        described(stub)
    assert refused.value.reason == "NOT_READY"
    worker = begin(stub, WIDE)
    assert described(stub) == WIDE
    worker.ask_to_join(model_digest=WIDE.model_digest)
    worker.pull()
    assert worker.push(payload(WIDE, 1.0)).iteration.number == 1


def test_a_manifest_that_is_cut_short_is_refused_and_another_one_is_taken(stub: ParameterServerStub) -> None:
    worker = WireWorker(stub, "first", WIDE)
    worker.ask_to_join()
    offer = pb.ModelOffer(worker="first", incarnation=1, manifest=next(iter(WIDE.to_messages())))
    for more, sentence in (
        ([], "the manifest's digest is missing"),
        (
            [pb.OfferModelRequest(chunk=pb.TensorChunk(data=b"0000"))],
            "received a message with 'chunk' where 'more' was expected",
        ),
        ([pb.OfferModelRequest(more=pb.Manifest())], "neither tensors nor the digest"),
    ):
        with pytest.raises(Refused, match=sentence), refusals():
            stub.OfferModel(iter([pb.OfferModelRequest(offer=offer), *more]))
        worker.ask_to_join()
    begin(stub, SMALL)
