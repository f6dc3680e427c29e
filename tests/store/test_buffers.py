"""Buffers on their way to disk: how the manifest says that they are merged, and values that only a buffer may have."""

import math
from pathlib import Path

import pytest
import torch
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
from ormo_server.core import snapshot
from ormo_server.core.buffers import Buffer, Buffers, Merge
from ormo_server.core.machine import StateMachine
from ormo_server.store import Checkpoint, CheckpointStore, StoreError, buffers_of
from store.building import run

MODEL = Manifest.laid_out(
    [
        TensorSpec("weight", (2,), FLOAT32, PARAMETER),
        TensorSpec("running_mean", (2,), FLOAT32, BUFFER, merge=AVERAGE),
        TensorSpec("seen", (), INT64, BUFFER, merge=MAXIMUM),
        TensorSpec("mask", (1, 2), FLOAT32, BUFFER, merge=LAST),
        TensorSpec("again", (1, 2), FLOAT32, BUFFER, merge=LAST, alias_of="mask"),
        TensorSpec("precise", (2,), FLOAT64, BUFFER, merge=AVERAGE),
        TensorSpec("pointer", (1,), INT64, BUFFER, merge=LAST),
    ]
)


def test_the_core_is_told_where_each_buffer_lies_and_what_becomes_of_it() -> None:
    assert buffers_of(MODEL) == Buffers(
        (Buffer(0, 2, Merge.AVERAGE), Buffer(2, 4, Merge.LAST)),
        (Buffer(0, 1, Merge.MAXIMUM), Buffer(1, 3, Merge.AVERAGE, is_double=True), Buffer(3, 4, Merge.LAST)),
    )


def test_a_manifest_of_an_older_worker_means_averages_and_maxima() -> None:
    old = buffers_of(MODEL.without_merges)
    assert [buffer.merge for buffer in old.floats] == [Merge.AVERAGE] * 2
    assert [buffer.merge for buffer in old.ints] == [Merge.MAXIMUM, Merge.AVERAGE, Merge.MAXIMUM]


def checkpoint(mask: float, precise: float) -> Checkpoint:
    floats = torch.tensor([0.5, -0.5, mask, 0.0])
    numbers = torch.tensor([precise, -2.0], dtype=torch.float64).view(torch.int64)
    ints = torch.cat([torch.tensor([7]), numbers, torch.tensor([-1])])  # whose last has the bits of a NaN
    machine = StateMachine.fresh(run(), torch.ones(2), floats, ints, buffers=buffers_of(MODEL))
    return Checkpoint(snapshot.take(machine), MODEL, drained=True, clock_seconds=0.0, settings={})


def test_infinities_and_float64_are_in_the_model_and_the_state_as_they_are(tmp_path: Path) -> None:
    written = checkpoint(mask=-math.inf, precise=1 + 1e-12)
    path = CheckpointStore(tmp_path, keep=1).write(written)
    model = load_file(path / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in model.items() if name in ("mask", "precise", "pointer")} == {
        "mask": torch.float32,
        "precise": torch.float64,
        "pointer": torch.int64,
    }
    assert model["mask"].tolist() == model["again"].tolist() == [[-math.inf, 0.0]]
    assert (model["precise"].tolist(), model["pointer"].tolist()) == ([1 + 1e-12, -2.0], [-1])
    read = CheckpointStore(tmp_path, keep=1).newest()
    assert read is not None
    for name, tensor in written.snapshot.tensors.items():
        assert torch.equal(tensor, read.checkpoint.snapshot.tensors[name])


@pytest.mark.parametrize(("values", "named"), [((math.nan, 1.0), "'mask'"), ((0.0, math.nan), "'precise'")])
def test_nan_in_a_buffer_is_never_written(tmp_path: Path, values: tuple[float, float], named: str) -> None:
    with pytest.raises(StoreError, match=named):
        CheckpointStore(tmp_path, keep=1).write(checkpoint(*values))
