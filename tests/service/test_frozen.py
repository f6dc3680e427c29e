"""Frozen tensors: kept once, sent to whoever asks, and in nothing that training does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ormo_protos.manifest import BFLOAT16, BUFFER, FLOAT32, FROZEN, PARAMETER, Manifest, TensorSpec
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.core.errors import MemoryLimit
from ormo_server.service import transfers
from ormo_server.service.server import Server
from ormo_server.store import StoreError
from service.crashing import crashing
from service.test_journal import metric
from service.wire import Refused, WireWorker, connected, payload, served, settings, state_of, tensor_chunks

ADAPTER = TensorSpec("adapter", (3,), FLOAT32, PARAMETER)
# 7 numbers: with padding.
TUNED = Manifest.laid_out(
    [
        TensorSpec("base", (2, 2), FLOAT32, FROZEN),
        ADAPTER,
        TensorSpec("half", (3,), BFLOAT16, FROZEN),
        TensorSpec("tied", (3,), BFLOAT16, FROZEN, alias_of="half"),
        TensorSpec("mean", (1,), FLOAT32, BUFFER),
    ]
)
BASE = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
# Several chunks, and far more than is copied under the lock.
LARGE = Manifest.laid_out([ADAPTER, TensorSpec("base", (2_000_001,), FLOAT32, FROZEN)])


@pytest.mark.parametrize("method", ["ormo", "ssgdm", "dc-asgd"])
def test_they_come_with_what_asks_for_them_and_with_nothing_else(tmp_path: Path, method: str) -> None:
    with served(tmp_path, method=method) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", TUNED, start=1.0)
        worker.join()
        stream = worker.open()
        stream.begin(None, buffers=True, frozen=True)
        first = stream.delivery()
        assert (first.with_frozen, first.payload_bytes) == (True, 16 + 8 + 32)
        assert (worker.params.tolist(), worker.float_buffers.tolist()) == ([1.0] * 3, [1.0])
        assert worker.frozen.tolist() == BASE
        stream.begin(payload(TUNED, 1.0))
        assert stream.result().iteration.number == 1
        second = stream.delivery()
        assert (second.with_frozen, second.payload_bytes) == (False, 16)
        stream.finish()


def test_readers_get_them_when_they_ask(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        WireWorker(stub, "a", TUNED).join()
        reader = WireWorker(stub, "reader", TUNED)
        assert reader.pull(ticket=False).payload_bytes == 16
        whole = reader.pull(ticket=False, frozen=True)
        assert (whole.payload_bytes, reader.frozen.tolist()) == (16 + 32, BASE)
        assert reader.pull(ticket=False, frozen=True, newer_than=whole.iteration).payload_bytes == 0


def test_a_large_base_is_sent_whole_and_copied_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(
        transfers, "_page_aligned", lambda size: sizes.append(size) or torch.empty(size, dtype=torch.uint8)
    )
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE)
        worker.join()
        worker.pull(frozen=True)
        assert torch.equal(worker.frozen, torch.arange(2_000_001).float())
        assert sizes == [16]
        kept = server.host.engine.snapshot()[0]
        assert sum(tensor.nbytes for tensor in kept.tensors.values()) == 2 * 12  # w and u


def test_a_gradient_has_none(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", TUNED)
        worker.join()
        worker.pull()
        before = state_of(server)
        with pytest.raises(Refused, match=r"a gradient of 48 bytes was announced; .* makes 16 bytes"):
            worker.push(payload(TUNED, 1.0, frozen=True))
        assert state_of(server) == before


def test_a_checkpoint_has_them_and_the_model_is_whole(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", TUNED, start=1.0)
        worker.join()
        worker.pull()
        worker.push(payload(TUNED, 1.0))
        server.host.checkpoint()
        kept = server.host.files.last_checkpoint
    assert kept is not None
    model = load_file(kept.path / "model.safetensors")
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in model.items()} == {
        "adapter": (torch.float32, [0.0] * 3),
        "base": (torch.float32, [[0.0, 1.0], [2.0, 3.0]]),
        "half": (torch.bfloat16, [4.0, 5.0, 6.0]),
        "tied": (torch.bfloat16, [4.0, 5.0, 6.0]),
        "mean": (torch.float32, [1.0]),
    }
    assert load_file(kept.path / "state.safetensors")["frozen"].tolist() == BASE


@pytest.mark.parametrize("journal", [True, False])
def test_a_killed_server_comes_back_with_them_and_kept_none_in_its_journal(tmp_path: Path, journal: bool) -> None:
    with crashing(tmp_path, journal=journal) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", LARGE, start=1.0)
        worker.join()
        for _ in range(3):
            worker.pull()
            worker.push(payload(LARGE, 1.0))
        written = sum(len(path.read_bytes().rstrip(b"\0")) for path in tmp_path.glob("journal/*"))
        assert written < 100_000
    with crashing(tmp_path, journal=journal) as again, connected(again) as stub:
        late = WireWorker(stub, "b", LARGE)
        late.join()
        late.pull(frozen=True)
        assert torch.equal(late.frozen, torch.arange(2_000_001).float())
        assert again.host.engine.iteration()[1] == (3 if journal else 0)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(("at", "name"), [(3, "'base'"), (5, "'half'")])
def test_an_offer_with_a_frozen_tensor_that_is_not_finite_is_refused_by_name(
    tmp_path: Path, value: float, at: int, name: str
) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        worker = WireWorker(stub, "a", TUNED)
        worker.ask_to_join()
        bad = payload(TUNED, 1.0, buffers=True, frozen=True)
        bad.frozen[at] = value
        with pytest.raises(Refused, match=f"has NaN, or infinity in a parameter: {name}") as refused:
            worker.offer(tensor_chunks(bad))
        assert refused.value.reason == "NON_FINITE"
        assert not server.host.has_model
        worker.join()  # with a sound one


def test_a_worker_that_trains_other_tensors_is_refused_before_it_counts(tmp_path: Path) -> None:
    with served(tmp_path) as server, connected(server) as stub:
        WireWorker(stub, "a", TUNED).join()
        unfrozen = [TensorSpec("base", (2, 2), FLOAT32, PARAMETER), *TUNED.tensors[:1], *TUNED.tensors[2:]]
        with pytest.raises(Refused, match="the worker's model is not that of the run") as refused:
            WireWorker(stub, "b", Manifest.laid_out(unfrozen)).join()
        assert refused.value.reason == "MANIFEST_DIGEST"
        assert [status.worker for status in stub.GetStatus(pb.GetStatusRequest()).workers] == ["a"]


def test_they_count_once_in_what_the_run_needs(tmp_path: Path) -> None:
    with served(tmp_path, max_workers=2) as server, connected(server) as stub:
        WireWorker(stub, "a", TUNED).join()
        needs = [metric(server, f'ormo_memory_need_bytes{{part="{part}"}}') for part in _PARTS]
        assert needs == [2 * 12 + 4 + 28, 4 * (12 + 4), 2 * 12 + 4]
        assert stub.GetStatus(pb.GetStatusRequest()).model_parameters == 3


_PARTS = ("state", "exchanges", "checkpoint")
LIMITS = [
    (
        {"memory_limit_bytes": 147, "max_workers": 2},
        "a model of 3 parameters and 7 that are frozen needs up to 148 bytes",
    ),
    ({"max_bytes_in_flight": 55}, "an offer of this model may have 56 bytes under way"),
]


@pytest.mark.parametrize(("limit", "sentence"), LIMITS)
def test_a_base_that_is_too_large_is_refused(tmp_path: Path, limit: dict[str, int], sentence: str) -> None:
    with served(tmp_path, **limit) as server, connected(server) as stub:
        with pytest.raises(Refused, match=sentence) as refused:
            WireWorker(stub, "a", TUNED).join()
        assert refused.value.reason == MemoryLimit.reason
        assert not server.host.has_model


def test_a_run_starts_from_a_file_and_the_first_worker_gets_the_base_of_that(tmp_path: Path) -> None:
    named = {"adapter": torch.ones(3), "base": torch.full((2, 2), 8.0), "half": torch.full((3,), 9.0)}
    save_file(named | {"mean": torch.ones(1)}, tmp_path / "plain.safetensors")
    with served(tmp_path / "run", model=tmp_path / "plain.safetensors") as server, connected(server) as stub:
        worker = WireWorker(stub, "a", TUNED)
        worker.join()
        worker.pull(frozen=True)
        assert worker.frozen.tolist() == [8.0] * 4 + [9.0] * 3
        kept = server.host.files.last_checkpoint
    assert kept is not None
    # A checkpoint's model says which tensors are frozen: there is nobody to be asked.
    with served(tmp_path / "next", model=kept.path) as server, connected(server) as stub:
        worker = WireWorker(stub, "b", TUNED)
        worker.join()
        worker.pull(frozen=True)
        assert worker.frozen.tolist() == [8.0] * 4 + [9.0] * 3


def test_a_file_with_a_base_that_is_not_finite_starts_nothing(tmp_path: Path) -> None:
    save_file({"base": torch.tensor([torch.nan])}, tmp_path / "bad.safetensors")
    with pytest.raises(StoreError, match="has NaN in 'base'"):
        Server(settings(tmp_path / "run", model=tmp_path / "bad.safetensors"))
