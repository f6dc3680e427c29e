"""Buffers through real sockets: how they are merged, which are not taken, and that no gradient is lost for them."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import generate_latest
from safetensors.torch import load_file

from ormo_protos.manifest import (
    AVERAGE,
    BUFFER,
    FLOAT32,
    FLOAT64,
    INT64,
    LAST,
    MAXIMUM,
    PARAMETER,
    Manifest,
    TensorSpec,
)
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_protos.v1 import PROTOCOL_VERSION
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_server.service.server import Server
from service.crashing import crashing, everything
from service.wire import SMALL, Refused, WireWorker, connected, payload, refusals, served, state_of, tensor_chunks

NAN, INF = math.nan, math.inf
MODEL = Manifest.laid_out(
    [
        TensorSpec("weight", (2,), FLOAT32, PARAMETER),
        TensorSpec("mask", (2,), FLOAT32, BUFFER, merge=LAST),
        TensorSpec("running_mean", (2,), FLOAT32, BUFFER, merge=AVERAGE),
        TensorSpec("pointer", (), INT64, BUFFER, merge=LAST),
        TensorSpec("precise", (), FLOAT64, BUFFER, merge=LAST),
        TensorSpec("seen", (), INT64, BUFFER, merge=MAXIMUM),
    ]
)
START: dict[str, Any] = {"mask": (-INF, 0.0), "mean": (1.0, 2.0), "pointer": 3, "precise": 1 + 1e-12, "seen": 5}


def filled(weight: float = 1.0, **changes: Any) -> Payload:
    """A payload with these buffers, else those of the start."""
    values = START | changes
    made = Payload(PayloadLayout.of(MODEL, FLOAT32, with_buffers=True))
    made.parameters.fill_(weight)
    made.float_buffers.copy_(torch.tensor([*values["mask"], *values["mean"]]))
    precise = torch.tensor([values["precise"]], dtype=torch.float64).view(torch.int64)
    made.int_buffers.copy_(torch.cat([torch.tensor([values["pointer"]]), precise, torch.tensor([values["seen"]])]))
    return made


class Worker(WireWorker):
    """One that knows of policies and float64."""

    def __init__(self, stub: ParameterServerStub, name: str = "a", incarnation: int = 1) -> None:
        super().__init__(stub, name, MODEL, incarnation)
        self.first = filled(0.0)

    def ask_to_join(self, slots: int = 1, version: int = PROTOCOL_VERSION) -> pb.JoinResponse:
        request = pb.JoinRequest(
            worker=self.name,
            incarnation=self.incarnation,
            protocol_version=version,
            slots=slots,
            model_digest=self.manifest.model_digest,
        )
        with refusals():
            return self.stub.Join(request)

    def offer(self, chunks: Any = None) -> pb.OfferModelResponse:
        return super().offer(tensor_chunks(self.first) if chunks is None else chunks)

    def pushed(self, **buffers: Any) -> pb.PushResult:
        """What the server says to a gradient of 1 with these buffers."""
        self.pull()
        return self.push(filled(**buffers))

    def held(self) -> dict[str, Any]:
        """The server's buffers, as anybody gets them."""
        self.pull(ticket=False, buffers=True)
        pointer, precise, seen = self.int_buffers.split(1)
        return {
            "mask": tuple(self.float_buffers[:2].tolist()),
            "mean": tuple(self.float_buffers[2:].tolist()),
            "pointer": pointer.item(),
            "precise": precise.view(torch.float64).item(),
            "seen": seen.item(),
        }


def metric(server: Server, name: str) -> float:
    rows = generate_latest(server.metrics.registry).decode().splitlines()
    return float(next(row.split()[-1] for row in rows if row.startswith(f"{name} ")))


def test_a_model_with_infinite_buffers_is_taken_and_comes_back_to_the_bit(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = Worker(stub)
        worker.join()
        assert worker.held() == START


@pytest.mark.parametrize(
    ("first", "named"),
    [
        (filled(0.0, mask=(NAN, 0.0)), "'mask'"),
        (filled(0.0, mean=(NAN, 0.0)), "'running_mean'"),
        (filled(0.0, precise=NAN), "'precise'"),
        (filled(INF), "'weight'"),
    ],
)
def test_an_offer_with_nan_or_an_infinite_parameter_is_refused_by_name(
    tmp_path: Path, first: Payload, named: str
) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = Worker(stub)
        worker.first = first
        with pytest.raises(Refused) as refused:
            worker.join()
        assert refused.value.reason == "NON_FINITE"
        assert f"{named}. Start from a model without them" in refused.value.message
        assert "persistent=False" in refused.value.message
        assert not server.host.has_model


def test_each_buffer_is_merged_by_its_policy(tmp_path: Path) -> None:
    with served(tmp_path, bucket_size=2) as server, connected(server) as stub:
        worker = Worker(stub)
        worker.join()
        result = worker.pushed(mask=(INF, 7.0), mean=(3.0, -2.0), pointer=-1, precise=-1e-300, seen=4)
        assert not result.buffers_kept
        assert worker.held() == {"mask": (INF, 7.0), "mean": (2.0, 0.0), "pointer": -1, "precise": -1e-300, "seen": 5}


@pytest.mark.parametrize(
    "bad", [{"mean": (NAN, 4.0)}, {"mean": (4.0, -INF)}, {"mask": (NAN, 0.0)}, {"precise": NAN}], ids=str
)
def test_a_gradient_counts_whose_buffers_are_not_taken_and_the_others_are(tmp_path: Path, bad: dict[str, Any]) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = Worker(stub)
        worker.join()
        result = worker.pushed(pointer=9, **bad)
        assert (result.refusal, result.iteration.number, result.buffers_kept) == ("", 1, True)
        assert worker.held() == START | {"pointer": 9}
        worker.pull(ticket=False)
        assert worker.params.tolist() == [-1.0, -1.0]
        assert not worker.pushed(mean=(4.0, 4.0)).buffers_kept
        assert worker.held()["mean"] == (4.0, 4.0)


def test_the_repeated_result_says_again_that_buffers_were_kept_and_is_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with served(tmp_path) as server, connected(server) as stub, caplog.at_level(logging.WARNING):
        worker = Worker(stub)
        worker.join()
        worker.pull()
        gradient = filled(mean=(NAN, 0.0))
        push = pb.Push(requester=worker.requester(), gradient=worker.header(gradient))
        first, again = (worker.push_messages(push, tensor_chunks(gradient)) for _ in range(2))
        assert (first.repeated, again.repeated) == (False, True)
        assert first.buffers_kept
        assert again.buffers_kept
        assert metric(server, "ormo_kept_buffers_total") == 1
        told = [record for record in caplog.records if "sent buffers with NaN or infinity" in record.message]
        assert [(record.worker, record.iteration) for record in told] == [("a", 1)]  # type: ignore[attr-defined]


def test_a_gradient_that_is_discarded_leaves_the_buffers_and_says_nothing_of_them(tmp_path: Path) -> None:
    with served(tmp_path, discard_delay=1) as server, connected(server) as stub:
        late, soon = Worker(stub, "late"), Worker(stub, "soon")
        late.join()
        soon.join()
        late.pull()
        soon.pushed()
        result = late.push(filled(mean=(NAN, NAN), pointer=8))
        assert (result.discarded, result.buffers_kept) == (True, False)
        assert late.held() == START


def test_an_older_worker_with_poisoned_statistics_trains_on(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "old", start=1.0)
        worker.join()
        bad = payload(SMALL, 2.0, buffers=True)
        bad.float_buffers[1] = NAN
        for number in (1, 2):
            worker.pull()
            assert worker.push(bad).iteration.number == number
        worker.pull(ticket=False, buffers=True)
        assert (worker.float_buffers.tolist(), worker.int_buffers.tolist()) == ([1.0] * 3, [2])


def test_what_was_kept_comes_back_to_the_bit_after_a_kill_with_its_result(tmp_path: Path) -> None:
    with crashing(tmp_path) as server, connected(server) as stub:
        worker = Worker(stub)
        worker.join()
        worker.pushed(mean=(3.0, 0.1), mask=(INF, 0.0))
        worker.pushed(mean=(NAN, 9.0), pointer=8, precise=NAN)
        worker.pull()
        gradient = filled(mean=(INF, 0.0))
        push = pb.Push(requester=worker.requester(), gradient=worker.header(gradient))
        assert worker.push_messages(push, tensor_chunks(gradient)).buffers_kept
        before, held = everything(server), worker.held()
    with crashing(tmp_path) as again, connected(again) as stub:
        assert everything(again) == before
        worker.stub = stub
        assert worker.held() == held
        assert held["mean"] == (3.0, pytest.approx(0.1))
        repeated = worker.push_messages(push, tensor_chunks(gradient))
        assert (repeated.repeated, repeated.buffers_kept) == (True, True)
        assert again.host.engine.iteration()[1] == 3


@pytest.mark.parametrize("journal", [True, False])
def test_a_server_that_comes_back_merges_by_the_same_policies(tmp_path: Path, journal: bool) -> None:
    with served(tmp_path, journal=journal) as server, connected(server) as stub:
        worker = Worker(stub)
        worker.join()
        worker.pushed(pointer=7)
        server.drain()
    with served(tmp_path, journal=journal) as again, connected(again) as stub:
        other = Worker(stub, incarnation=2)
        other.join()
        other.pushed(pointer=1, mask=(INF, INF), precise=2.5)
        assert other.held() == START | {"pointer": 1, "mask": (INF, INF), "precise": 2.5}
        model = load_file(again.host.files.last_checkpoint.path / "model.safetensors")  # type: ignore[union-attr]
        assert (model["precise"].dtype, model["pointer"].item()) == (torch.float64, 7)


def test_a_run_can_start_from_the_model_of_another_with_its_infinities(tmp_path: Path) -> None:
    with served(tmp_path / "first") as server, connected(server) as stub:
        worker = Worker(stub)
        worker.join()
        server.drain()
        path = server.host.files.last_checkpoint.path  # type: ignore[union-attr]
    with served(tmp_path / "second", model=path) as other, connected(other) as stub:
        reader = Worker(stub, "b")
        assert reader.held() == START
        assert state_of(other).iteration == 0
