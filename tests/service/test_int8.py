"""Sums of local steps in int8, through the real socket: what they count as, what is refused, what a crash leaves."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from core.driving import run_of
from ormo_protos.manifest import BFLOAT16, FLOAT32, INT8, PARAMETER, Manifest, TensorSpec
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.core.method import memory_need
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.core.vectors import BLOCK_ELEMENTS
from ormo_server.service.server import Server
from ormo_server.service.transfers import BufferPool, BytesInFlight
from service.crashing import crashing, everything
from service.test_metrics import value
from service.wire import (
    SMALL,
    Refused,
    WireWorker,
    connected,
    int8_payload,
    payload,
    received_bytes,
    refusals,
    served,
    state_of,
)

H = 16
Serving = tuple[Server, ParameterServerStub]
# More than a block of a walk; and tensors that begin within blocks of both kinds.
LONG = Manifest.laid_out(
    [
        TensorSpec(f"w{number}", (size,), FLOAT32, PARAMETER)
        for number, size in enumerate((700, BLOCK_ELEMENTS, 5, 20_000))
    ]
)


def local(stub: ParameterServerStub, name: str = "a", manifest: Manifest = SMALL, **options: Any) -> WireWorker:
    return WireWorker(stub, name, manifest, local_steps=H, **options)


def with_ticket(stub: ParameterServerStub, name: str = "a", manifest: Manifest = SMALL) -> WireWorker:
    worker = local(stub, name, manifest)
    worker.join()
    worker.pull(dtype=BFLOAT16)
    return worker


def values(manifest: Manifest, seed: int = 1) -> torch.Tensor:
    return torch.randn(manifest.sizes["parameters"], generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    with served(tmp_path, local_steps=H) as server, connected(server) as stub:
        yield server, stub


@pytest.mark.parametrize("most", [0, H])
def test_a_server_says_that_it_takes_int8_where_there_are_local_steps(tmp_path: Path, most: int) -> None:
    with served(tmp_path, local_steps=most) as server, connected(server) as stub:
        assert WireWorker(stub, "a", local_steps=most).join().takes_int8 == (most > 0)


def as_float32(coded: Payload) -> Payload:
    """What it stands for, with the same buffers."""
    made = payload(SMALL, 2.0, buffers=coded.layout.with_buffers)
    made.parameters.copy_(coded.gradient[:])
    return made


def pushed(server: Server, *, int8: bool) -> None:
    """Two workers push by both ways, in int8 or what that stands for."""
    with connected(server) as stub:
        anna, bert = with_ticket(stub, "anna"), with_ticket(stub, "bert")
        stream = anna.open()
        for number in range(3):
            coded = int8_payload(SMALL, values(SMALL, number), buffers=True)
            stream.begin(coded if int8 else as_float32(coded))
            stream.result()
            stream.delivery()
            coded = int8_payload(SMALL, values(SMALL, -number))
            bert.push(coded if int8 else as_float32(coded))
            bert.pull(dtype=BFLOAT16)


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_every_rule_takes_it_for_what_it_stands_for_and_a_crash_gives_the_same_bits(tmp_path: Path, rule: str) -> None:
    options: dict[str, Any] = {"method": "ormo", "update_rule": rule, "local_steps": H}
    with crashing(tmp_path / "float32", **options) as server:
        pushed(server, int8=False)
        _, expected = everything(server)
    with crashing(tmp_path / "int8", **options) as server:
        pushed(server, int8=True)
        before = everything(server)
    assert before[1] == expected
    with crashing(tmp_path / "int8", **options) as again:
        assert everything(again) == before
        assert again.host.engine.iteration()[1] == 6


def test_a_model_of_several_blocks_counts_and_comes_back_after_a_crash_to_the_bit(tmp_path: Path) -> None:
    coded = int8_payload(LONG, values(LONG))
    options: dict[str, Any] = {"method": "asgd", "local_steps": H, "learning_rate": 1.0}
    with crashing(tmp_path, **options) as server, connected(server) as stub:
        with_ticket(stub, manifest=LONG).push(coded)
        with server.host.engine.inspect() as machine:
            assert torch.equal(machine.state.params, -coded.gradient[:])
        assert (tmp_path / "journal" / "gradients-00000001.bin").stat().st_size >= coded.layout.total_bytes
        before = state_of(server).params
    with crashing(tmp_path, **options) as again:
        assert state_of(again).params == before


def test_the_norm_that_people_see_is_that_of_what_it_stands_for(serving: Serving) -> None:
    server, stub = serving
    coded = int8_payload(SMALL, values(SMALL))
    with_ticket(stub).push(coded)
    norm = float(coded.gradient[:].norm())
    assert value(server, 'ormo_worker_gradient_norm{worker="a"}') == pytest.approx(norm)


@pytest.mark.parametrize("stream", [False, True])
def test_a_retry_counts_once_and_gets_the_kept_result(serving: Serving, *, stream: bool) -> None:
    server, stub = serving
    worker, coded = with_ticket(stub), int8_payload(SMALL, values(SMALL))
    if stream:
        first = worker.open()
        message = first.begin(coded, wants=False)
        assert not first.result().repeated
        first.drop()
        second = worker.open()
        second.replay(message, coded)
        result = second.result()
    else:
        worker.push(coded)
        before = state_of(server)
        worker.request -= 1
        result = worker.push(coded)
        assert state_of(server) == before
    assert (result.repeated, result.iteration.number, state_of(server).iteration) == (True, 1, 1)


# What is refused

FAULTS = {
    "an int8 code is -128: expected -127 to 127": (-128, 1.0),
    "the scales of int8 blocks go from nan to nan: expected finite numbers of at least 0": (1, math.nan),
    "the scales of int8 blocks go from 1 to inf": (1, math.inf),
    "the scales of int8 blocks go from -0.5 to 1": (0, -0.5),
}


def streamed(worker: WireWorker, gradient: Payload) -> pb.PushResult:
    stream = worker.open()
    stream.begin(gradient, wants=False)
    return stream.result()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sentence", FAULTS)
def test_bytes_that_are_no_code_are_refused_and_leave_the_ticket(
    tmp_path: Path, sentence: str, *, stream: bool
) -> None:
    with crashing(tmp_path, local_steps=H) as server, connected(server) as stub:
        worker, bad = with_ticket(stub), int8_payload(SMALL, values(SMALL))
        bad.scales.fill_(1.0)
        bad.parameters[-1], bad.scales[-1] = FAULTS[sentence]
        before = state_of(server)
        with pytest.raises(Refused, match=f"the gradient was not applied: {sentence}") as refused:
            (streamed if stream else WireWorker.push)(worker, bad)
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_PAYLOAD")
        assert state_of(server) == before
        assert value(server, 'ormo_pushes_total{outcome="refused",reason="BAD_PAYLOAD"}') == 1
        assert worker.push(int8_payload(SMALL, values(SMALL))).iteration.number == 1
        before = state_of(server)
    with crashing(tmp_path, local_steps=H) as again:
        assert state_of(again).model == before.model


def test_a_scale_whose_numbers_are_beyond_float32_makes_a_gradient_that_is_not_finite(serving: Serving) -> None:
    server, stub = serving
    worker, bad = with_ticket(stub), int8_payload(SMALL, values(SMALL))
    bad.scales.fill_(1e37)
    before = state_of(server)
    with pytest.raises(Refused, match="has NaN or infinite values") as refused:
        worker.push(bad)
    assert refused.value.reason == "NON_FINITE"
    assert state_of(server) == before


def test_it_is_refused_before_its_bytes_come_where_there_are_no_local_steps(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        before = state_of(server)
        with pytest.raises(Refused, match=r"DTYPE_INT8 \(5\) is for the sums of local steps, which this run does not"):
            worker.push(int8_payload(SMALL, values(SMALL)))
        assert state_of(server) == before
        assert received_bytes(server) == payload(SMALL, 0.0, buffers=True).layout.total_bytes  # the offer's
        assert worker.push(payload(SMALL, 1.0)).iteration.number == 1


def test_parameters_do_not_come_in_it(serving: Serving) -> None:
    server, stub = serving
    worker = with_ticket(stub)
    sentence = r"payload dtype 5 is not served: use DTYPE_FLOAT32 \(1\) or DTYPE_BFLOAT16 \(2\)"
    for ticket in (True, False):
        before = state_of(server)
        with pytest.raises(Refused, match=sentence) as refused:
            worker.pull(ticket=ticket, dtype=INT8)
        assert refused.value.reason == "BAD_PAYLOAD"
        assert state_of(server) == before
    asked = worker.exchange(None)
    asked.exchange.next.dtype = INT8
    stream = worker.open()
    stream.send(asked)
    with pytest.raises(Refused, match=sentence):
        stream.receive()


def test_no_manifest_has_it(tmp_path: Path) -> None:
    with served(tmp_path, local_steps=H) as server, connected(server) as stub:
        worker = local(stub)
        assert worker.ask_to_join().WhichOneof("answer") == "model_wanted"
        manifest = SMALL.to_message()
        manifest.tensors[0].dtype = INT8
        offer = pb.ModelOffer(worker="a", incarnation=1, manifest=manifest)
        with pytest.raises(Refused, match="a parameter is float32 or bfloat16") as refused, refusals():
            stub.OfferModel(iter([pb.OfferModelRequest(offer=offer)]))
        assert refused.value.reason == "BAD_MANIFEST"
        assert not server.host.has_model


@pytest.mark.parametrize("size", [0, 23, 32, 40])
def test_its_length_is_that_of_its_codes_and_scales(serving: Serving, size: int) -> None:
    server, stub = serving
    worker, coded = with_ticket(stub), int8_payload(SMALL, values(SMALL))
    assert coded.layout.total_bytes == 16 + 8  # 9 codes and 2 scales
    before = state_of(server)
    with pytest.raises(Refused, match=f"a gradient of {size} bytes was announced; dtype 5 .* makes 24 bytes"):
        worker.push(coded, payload_bytes=size)
    assert state_of(server) == before


def test_one_that_is_too_long_is_scaled_down_by_its_scales(tmp_path: Path) -> None:
    options: dict[str, Any] = {"local_steps": H, "max_gradient_norm": 0.5, "method": "asgd", "learning_rate": 1.0}
    coded = int8_payload(SMALL, values(SMALL))
    with crashing(tmp_path, **options) as server, connected(server) as stub:
        with_ticket(stub).push(coded)
        with server.host.engine.inspect() as machine:
            moved = -machine.state.params
        assert moved.norm().item() == pytest.approx(0.5, rel=1e-6)
        torch.testing.assert_close(moved, coded.gradient[:] * (0.5 / coded.gradient[:].norm()))
        assert value(server, "ormo_clipped_gradients_total") == 1
        before = state_of(server)
    with crashing(tmp_path, **options) as again:
        assert state_of(again).model == before.model


def test_an_exchange_lends_a_buffer_for_what_comes_and_one_for_what_goes() -> None:
    pool, d = BufferPool(BytesInFlight(None)), LONG.sizes["parameters"]
    coming = PayloadLayout.of_gradient(LONG, INT8, with_buffers=False)
    going = PayloadLayout.of(LONG, BFLOAT16, with_buffers=False)
    for _ in range(3):
        with pool.loans("a") as borrowed:
            received = borrowed.take(coming)
            received.parameters.fill_(5)
            borrowed.place(going, received).parameters.fill_(1.0)
            assert received.parameters.unique().tolist() == [5]
    assert pool.idle_bytes == pytest.approx(3 * d + 4 * coming.scales, rel=1e-3)
    exchange = memory_need(run_of(local_steps=H), d, slots=1, scales=coming.scales).exchange_bytes
    assert pool.idle_bytes <= exchange
