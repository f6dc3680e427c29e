"""What is written is what is read, to the bit; and plain PyTorch can load the model."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from ormo_protos.manifest import Manifest
from ormo_server.core import snapshot
from ormo_server.store import Checkpoint, CheckpointStore, FlatModel
from store.building import LARGEST_EPOCH, Net, checkpoint_of, flat_of, machine_of, manifest_of, run


def written_and_read(directory: Path, checkpoint: Checkpoint) -> Checkpoint:
    CheckpointStore(directory, keep=2).write(checkpoint)
    read = CheckpointStore(directory, keep=2).newest()
    assert read is not None
    return read.checkpoint


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("preset", ["ormo", "asgd", "ssgdm", "ssgd"])
def test_a_restored_run_equals_the_one_that_was_written(tmp_path: Path, preset: str) -> None:
    machine = machine_of(flat_of(Net()), preset)
    checkpoint = Checkpoint(snapshot.take(machine), manifest_of(Net()), True, 0.1 + 0.2, {"path": "ö"})
    read = written_and_read(tmp_path, checkpoint)
    restored = snapshot.restore(run(preset), read.snapshot, epoch=LARGEST_EPOCH, keep_tickets=read.drained)
    again, first = snapshot.take(restored), checkpoint.snapshot
    assert again.fields == first.fields
    assert {name: as_bytes(tensor) for name, tensor in again.tensors.items()} == {
        name: as_bytes(tensor) for name, tensor in first.tensors.items()
    }


def test_tickets_kept_results_and_replaced_incarnations_are_in_a_checkpoint(tmp_path: Path) -> None:
    fields = written_and_read(tmp_path, checkpoint_of(Net())).snapshot.fields
    assert [ticket["slot"] for ticket in fields["tickets"]] == [["bert", 0]]
    assert [slot["result"]["iteration"] for slot in fields["members"][0]["slots"]] == [1]
    assert fields["replaced"] == [["bert", 1]]


def test_integers_of_64_bits_stay_exact(tmp_path: Path) -> None:
    fields = written_and_read(tmp_path, checkpoint_of(Net())).snapshot.fields
    assert fields["epoch"] == LARGEST_EPOCH
    assert fields["members"][0]["incarnation"] == 2**63 + 5


def test_a_checkpoint_says_what_wrote_it(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(Net())
    read = written_and_read(tmp_path, checkpoint)
    assert (read.drained, read.clock_seconds, read.settings) == (True, 12.3, {"momentum": 0.9})
    assert (read.torch_version, read.cpu_capability) == (
        str(torch.__version__),
        torch.backends.cpu.get_cpu_capability(),
    )
    assert read.manifest == checkpoint.manifest


def test_the_model_file_loads_strictly_into_the_module(tmp_path: Path) -> None:
    model, other = Net(), Net()
    checkpoint = checkpoint_of(model)
    path = CheckpointStore(tmp_path, keep=1).write(checkpoint) / "model.safetensors"
    loaded = safetensors.torch.load_file(path)
    other.load_state_dict(loaded, strict=True)
    assert {name: (t.shape, t.dtype) for name, t in loaded.items()} == {
        name: (t.shape, t.dtype) for name, t in model.state_dict().items()
    }
    assert other.head.weight is other.embedding.weight
    stored = FlatModel(*(checkpoint.snapshot.tensors[name] for name in ("params", "float_buffers", "int_buffers")))
    for spec in checkpoint.manifest.tensors:
        tensor = other.state_dict()[spec.name]
        assert torch.equal(tensor, stored.view(spec).to(tensor.dtype)), spec.name


def test_bfloat16_tensors_are_rounded_in_the_model_file_and_exact_in_the_state(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(Net())
    path = CheckpointStore(tmp_path, keep=1).write(checkpoint)
    spec = next(spec for spec in checkpoint.manifest.tensors if spec.name == "coarse")
    params = checkpoint.snapshot.tensors["params"]
    exact = params[spec.offset : spec.offset + spec.elements].view(4, 2)
    assert torch.equal(safetensors.torch.load_file(path / "model.safetensors")["coarse"], exact.to(torch.bfloat16))
    assert torch.equal(safetensors.torch.load_file(path / "state.safetensors")["params"], params)


def test_the_model_file_carries_its_manifest(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path, keep=1).write(checkpoint_of(Net())) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert Manifest.from_json(json.loads(file.metadata()["ormo_manifest"])) == manifest_of(Net())


def test_the_checksums_are_those_that_sha256sum_checks(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path, keep=1).write(checkpoint_of(Net()))
    files = [file for file in path.iterdir() if file.name != "SHA256SUMS"]
    lines = {f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files}
    assert set((path / "SHA256SUMS").read_text().splitlines()) == lines


def test_files_can_be_read_by_whoever_can_read_the_directory(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path, keep=1).write(checkpoint_of(Net()))
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {path.stat().st_mode & 0o666}


def test_what_was_read_does_not_hang_on_the_files(tmp_path: Path) -> None:
    read = written_and_read(tmp_path, checkpoint_of(Net()))
    before = read.snapshot.tensors["params"].clone()
    for file in tmp_path.glob("checkpoint-*/*"):
        file.write_bytes(b"")
    assert torch.equal(read.snapshot.tensors["params"], before)


def test_a_model_of_one_linear_layer_without_buffers_is_stored(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    read = written_and_read(tmp_path, checkpoint_of(model))
    assert read.snapshot.tensors["float_buffers"].shape == (0,)
    assert read.snapshot.tensors["int_buffers"].dtype == torch.int64
