"""Gradients that are finite and yet too large, and workers that send too many bad ones, through the real socket."""

import math
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from ormo_protos.manifest import BFLOAT16, FLOAT32
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.service.server import Server
from ormo_worker.client.api import ParameterClient
from ormo_worker.client.messages import Gradient
from ormo_worker.errors import OrmoError
from service.test_metrics import value
from service.wire import SMALL, Refused, WireWorker, connected, payload, served, state_of

NORM_OF_ONES = math.sqrt(PayloadLayout.of(SMALL, FLOAT32, with_buffers=False).parameters)
PLAIN = {"method": "asgd", "learning_rate": 1.0}


def moved(server: Server, before: torch.Tensor) -> torch.Tensor:
    with server.host.engine.inspect() as machine:
        return before - machine.state.params


def params(server: Server) -> torch.Tensor:
    with server.host.engine.inspect() as machine:
        return machine.state.params.clone()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(("bound", "expected"), [(0.5, 0.5), (1e3, NORM_OF_ONES)])
def test_larger_gradient_is_scaled_down_to_the_bound_and_counted(
    tmp_path: Path, bound: float, expected: float, dtype: int
) -> None:
    with served(tmp_path, max_gradient_norm=bound, **PLAIN) as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        before = params(server)
        worker.push(payload(SMALL, 1.0, dtype=dtype))
        step = moved(server, before)
        assert step.norm().item() == pytest.approx(expected, rel=2**-8 if dtype == BFLOAT16 else 1e-6)
        assert torch.equal(step, step[:1].expand_as(step))  # the direction is as it was
        assert value(server, "ormo_clipped_gradients_total") == (expected < NORM_OF_ONES)
        assert value(server, 'ormo_worker_gradient_norm{worker="a"}') == pytest.approx(expected)
        assert value(server, 'ormo_worker_refused_gradients_ratio{worker="a"}') == 0


def test_larger_gradient_is_refused_if_so_set_and_leaves_its_ticket(tmp_path: Path) -> None:
    with served(tmp_path, max_gradient_norm=1.0, over_norm="refuse") as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        worker.pull()
        before = state_of(server)
        with pytest.raises(Refused, match=rf"norm {NORM_OF_ONES:.4g}.*up to 1.*max-gradient-norm") as refused:
            worker.push(payload(SMALL, 1.0))
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "NORM_TOO_LARGE")
        assert state_of(server) == before
        assert value(server, 'ormo_pushes_total{outcome="refused",reason="NORM_TOO_LARGE"}') == 1
        assert value(server, 'ormo_worker_refused_gradients_total{worker="a"}') == 1
        assert worker.push(payload(SMALL, 1.0 / NORM_OF_ONES * 0.99)).iteration.number == 1


def test_refusal_of_a_large_gradient_does_not_end_the_stream(tmp_path: Path) -> None:
    with served(tmp_path, max_gradient_norm=1.0, over_norm="refuse") as server, connected(server) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        stream = worker.open()
        stream.begin(None)
        stream.delivery()
        stream.begin(payload(SMALL, 1.0))
        assert stream.result().refusal == "NORM_TOO_LARGE"
        stream.delivery()
        stream.begin(payload(SMALL, 0.01))
        assert stream.result().iteration.number == 1


SHARE = 0.2
# 1 - (31/32)^n is above the share from this n on.
TOLERATED = 7


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Server]:
    with served(tmp_path, max_refused_share=SHARE) as server:
        yield server


def send_away(worker: WireWorker) -> None:
    """Push bad gradients until the worker is sent away with the next call."""
    worker.join()
    worker.pull()
    for _ in range(TOLERATED + 1):
        with pytest.raises(Refused) as refused:
            worker.push(payload(SMALL, math.nan))
        assert refused.value.reason == "NON_FINITE"


def test_worker_above_the_share_is_sent_away_and_nobody_else(strict: Server) -> None:
    with connected(strict) as stub:
        other, worker = WireWorker(stub, "b"), WireWorker(stub, "a")
        other.join()
        other.pull()
        send_away(worker)
        before = state_of(strict)
        sentence = r"too many gradients of worker 'a'.*max-refused-share"
        with pytest.raises(Refused, match=sentence) as refused:
            worker.push(payload(SMALL, 1.0))
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "UNSOUND_WORKER")
        away = state_of(strict)
        assert away.model == before.model
        assert away.rest["members"] == [member for member in before.rest["members"] if member["worker"] == "b"]
        assert away.rest["tickets"] == [ticket for ticket in before.rest["tickets"] if ticket["slot"][0] == "b"]
        changed = {name for name, value in before.rest.items() if away.rest[name] != value}
        assert changed == {"members", "live_slots", "tickets", "departed"}
        with pytest.raises(Refused, match=sentence):
            worker.push(payload(SMALL, 1.0))
        assert state_of(strict) == away
        assert other.push(payload(SMALL, 1.0)).iteration.number == 1


@pytest.mark.parametrize("call", ["Join", "Heartbeat", "PullParams"])
def test_no_call_lets_it_back_in_but_a_new_process_may_try(strict: Server, call: str) -> None:
    with connected(strict) as stub:
        worker = WireWorker(stub, "a")
        send_away(worker)
        calls = {
            "Join": worker.ask_to_join,
            "Heartbeat": lambda: stub.Heartbeat(pb.HeartbeatRequest(worker="a", incarnation=worker.incarnation)),
            "PullParams": worker.pull,
        }
        with pytest.raises((Refused, grpc.RpcError), match=r"UNSOUND_WORKER|too many gradients of worker 'a'"):
            calls[call]()
        successor = WireWorker(stub, "a", incarnation=worker.incarnation + 1)
        successor.join()
        successor.pull()
        assert successor.push(payload(SMALL, 1.0)).iteration.number == 1
        assert value(strict, 'ormo_worker_refused_gradients_total{worker="a"}') == 0


def test_worker_below_the_share_stays(strict: Server) -> None:
    with connected(strict) as stub:
        worker = WireWorker(stub, "a")
        worker.join()
        for number in range(60):
            worker.pull()
            if number % 8 == 7:
                with pytest.raises(Refused, match="NON_FINITE"):
                    worker.push(payload(SMALL, math.inf))
            else:
                worker.push(payload(SMALL, 1e-3))
        assert value(strict, 'ormo_worker_refused_gradients_total{worker="a"}') == 7
        assert 0.05 < (value(strict, 'ormo_worker_refused_gradients_ratio{worker="a"}') or 0) < SHARE


def test_our_worker_stops_with_the_servers_sentence(strict: Server) -> None:
    def filled(number: float, *, buffers: bool) -> Payload:
        return payload(SMALL, number, buffers=buffers)

    client = ParameterClient(strict.address, SMALL, model=lambda: filled(0.0, buffers=True), worker_id="a")
    with client:
        client.join()
        (slot,) = client.slots
        slot.exchange(None)
        bad = Gradient(filled(math.nan, buffers=False), samples=1)
        for _ in range(TOLERATED + 1):
            outcome = slot.exchange(bad)
            assert outcome.refusal is not None
            assert outcome.delivered is not None
        with pytest.raises(OrmoError, match="too many gradients of worker 'a'"):
            slot.exchange(bad)
