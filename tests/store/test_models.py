"""The model to start from: a checkpoint, its model file, or anybody's state_dict."""

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from ormo_protos.limits import MAX_NAME_BYTES, MAX_TENSORS
from ormo_protos.manifest import FLOAT32, PARAMETER, Manifest, TensorSpec
from ormo_server.core import snapshot
from ormo_server.core.machine import StateMachine
from ormo_server.store import Checkpoint, CheckpointStore, FlatModel, ModelFile, StoreError
from store.building import Net, checkpoint_of, flat_of, manifest_of, run


def saved(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


def plain(path: Path, model: nn.Module) -> Path:
    """The state_dict with every name, as people save it."""
    return saved(path, {name: tensor.clone() for name, tensor in model.state_dict().items()})


def refusal(path: Path, model: nn.Module | None = None) -> str:
    with pytest.raises(StoreError) as caught:
        ModelFile.load(path).arrange(manifest_of(model or Net()))
    return str(caught.value)


def assert_equal(one: FlatModel, other: FlatModel) -> None:
    for name in ("params", "float_buffers", "int_buffers"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_a_plain_state_dict_waits_for_the_manifest_of_a_worker(tmp_path: Path) -> None:
    model = Net()
    file = ModelFile.load(plain(tmp_path / "model.safetensors", model))
    assert file.manifest is None
    assert_equal(file.arrange(manifest_of(model)), flat_of(model))


def test_the_model_file_of_a_checkpoint_says_its_manifest(tmp_path: Path) -> None:
    model = Net()
    path = CheckpointStore(tmp_path, keep=1).write(checkpoint_of(model))
    file = ModelFile.load(path / "model.safetensors")
    assert file.manifest == manifest_of(model)
    expected = flat_of(model)
    for name, tensor in load_file(path / "model.safetensors").items():
        spec = next(spec for spec in file.manifest.tensors if spec.name == name)
        expected.view(spec).copy_(tensor)
    assert_equal(file.arrange(file.manifest), expected)


def test_a_model_of_as_many_tensors_and_as_long_names_as_there_may_be_is_written(tmp_path: Path) -> None:
    specs = [TensorSpec(f"{number:0{MAX_NAME_BYTES}}", (1,), FLOAT32, PARAMETER) for number in range(MAX_TENSORS)]
    manifest, params = Manifest.laid_out(specs), torch.arange(MAX_TENSORS).float()
    taken = snapshot.take(StateMachine.fresh(run(), params))
    path = CheckpointStore(tmp_path, keep=1).write(Checkpoint(taken, manifest, True, 1.0, {}))
    file = ModelFile.load(path)
    assert file.manifest is None, "safetensors has no room for it: a worker says the order, as for a plain state_dict"
    assert len(file.weights) == MAX_TENSORS


def test_the_directory_of_a_checkpoint_is_its_model(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path, keep=1).write(checkpoint_of(Net()))
    by_directory, by_link = ModelFile.load(path), ModelFile.load(tmp_path / "latest")
    assert by_directory.path == path / "model.safetensors"
    assert by_directory.manifest == by_link.manifest == manifest_of(Net())


def test_what_was_loaded_does_not_hang_on_the_file(tmp_path: Path) -> None:
    model = nn.Linear(300, 300)
    path = plain(tmp_path / "model.safetensors", model)
    file = ModelFile.load(path)
    path.write_bytes(b"")
    assert_equal(file.arrange(manifest_of(model)), flat_of(model))


@pytest.mark.parametrize("left_out", ["head.weight", "embedding.weight"])
def test_of_tied_weights_one_name_is_enough(tmp_path: Path, left_out: str) -> None:
    model = Net()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != left_out}
    path = saved(tmp_path / "model.safetensors", tensors)
    assert_equal(ModelFile.load(path).arrange(manifest_of(model)), flat_of(model))


def test_what_save_model_wrote_is_taken(tmp_path: Path) -> None:
    model = Net()
    save_model(model, str(tmp_path / "model.safetensors"))
    file = ModelFile.load(tmp_path / "model.safetensors")
    assert_equal(file.arrange(manifest_of(model)), flat_of(model))


def test_float32_and_bfloat16_pass_for_each_other(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    path = plain(tmp_path / "model.safetensors", nn.Linear(3, 2).to(torch.bfloat16))
    flat = ModelFile.load(path).arrange(manifest_of(model))
    assert flat.params.dtype == torch.float32
    assert torch.equal(flat.params[:6], load_file(path)["weight"].float().reshape(-1))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "nowhere.safetensors is missing; expected a file that" in refusal(tmp_path / "nowhere.safetensors")


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps({"weight": [1.0]}))
    assert "model.pt is not a whole safetensors file" in refusal(path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = plain(tmp_path / "model.safetensors", Net())
    path.write_bytes(path.read_bytes()[:-4])
    assert "is not a whole safetensors file" in refusal(path)


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "is a directory, but not a checkpoint" in refusal(tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path, keep=1).write(checkpoint_of(Net()))
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert "model.safetensors has the SHA-256" in refusal(path)


@pytest.mark.parametrize("text", ["{", "[]", '[{"name": "weight"}]', "7"])
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    path = saved(tmp_path / "model.safetensors", {"weight": torch.zeros(2)}, {"ormo_manifest": text})
    assert "is malformed" in refusal(path)


def test_a_manifest_that_is_not_the_tensors_is_refused(tmp_path: Path) -> None:
    rows = json.dumps(manifest_of(nn.Linear(3, 2)).to_json())
    path = saved(tmp_path / "model.safetensors", {"weight": torch.zeros(2, 3)}, {"ormo_manifest": rows})
    assert "'bias' is missing in the file" in refusal(path, nn.Linear(3, 2))


def test_another_model_is_refused_with_the_first_differences_and_their_number(tmp_path: Path) -> None:
    tensors = {"weight": torch.zeros(2, 2), "step": torch.tensor(0)} | {f"extra{i}": torch.zeros(1) for i in range(4)}
    told = refusal(saved(tmp_path / "model.safetensors", tensors), nn.Linear(3, 2))
    assert "'weight' is float32 of shape (2, 2) in the file and a float32 parameter of shape (2, 3)" in told
    assert "'bias' is missing in the file" in told
    assert "'extra0' is in the file, but not in the model and 4 more" in told


def test_integers_in_place_of_numbers_are_refused(tmp_path: Path) -> None:
    tensors = {"weight": torch.zeros(2, 3, dtype=torch.int64), "bias": torch.zeros(2)}
    told = refusal(saved(tmp_path / "model.safetensors", tensors), nn.Linear(3, 2))
    assert "'weight' is int64 of shape (2, 3) in the file and a float32 parameter" in told


@pytest.mark.parametrize("other", [torch.ones(5, 3), torch.ones(5, 3, dtype=torch.bfloat16)])
def test_tied_weights_that_differ_in_the_file_are_refused(tmp_path: Path, other: torch.Tensor) -> None:
    tensors = {name: tensor.clone() for name, tensor in Net().state_dict().items()} | {"head.weight": other}
    told = refusal(saved(tmp_path / "model.safetensors", tensors))
    assert "'embedding.weight' and 'head.weight' differ in the file and are one tensor in the model" in told


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.bool])
def test_other_dtypes_are_refused_with_the_way_out(tmp_path: Path, dtype: torch.dtype) -> None:
    path = saved(tmp_path / "model.safetensors", {"weight": torch.zeros(2, 3).to(dtype), "bias": torch.zeros(2)})
    told = refusal(path, nn.Linear(3, 2))
    assert f"'weight' ({dtype})" in told
    assert "convert floating ones to float32 or bfloat16, integer ones to int64" in told


@pytest.mark.parametrize(("bad", "named"), [(math.nan, "NaN"), (math.inf, "infinite values")])
def test_parameters_that_are_not_finite_are_refused(tmp_path: Path, bad: float, named: str) -> None:
    path = saved(tmp_path / "model.safetensors", {"weight": torch.zeros(2, 3), "bias": torch.tensor([0.0, bad])})
    assert f"has {named} in 'bias'" in refusal(path, nn.Linear(3, 2))


def with_buffer(buffer: torch.Tensor) -> nn.Module:
    model = nn.Linear(1, 1)
    model.register_buffer("held", buffer)
    return model


@pytest.mark.parametrize("held", [torch.tensor([1.0, math.inf]), torch.tensor([-math.inf, 1 + 1e-12]).double()])
def test_a_buffer_comes_as_the_file_has_it_with_infinities_and_float64(tmp_path: Path, held: torch.Tensor) -> None:
    model = with_buffer(held)
    path = saved(tmp_path / "model.safetensors", dict(model.state_dict()))
    arranged = ModelFile.load(path).arrange(manifest_of(model)).state_dict(manifest_of(model))["held"]
    assert arranged.dtype == held.dtype
    assert torch.equal(arranged, held)


def test_nan_in_a_buffer_is_refused(tmp_path: Path) -> None:
    model = with_buffer(torch.tensor([math.nan]))
    assert "has NaN in 'held'" in refusal(saved(tmp_path / "model.safetensors", dict(model.state_dict())), model)


def test_float64_is_not_rounded_without_a_word_and_takes_float32(tmp_path: Path) -> None:
    precise, plain = with_buffer(torch.ones(1, dtype=torch.float64)), with_buffer(torch.ones(1))
    path = saved(tmp_path / "precise.safetensors", dict(precise.state_dict()))
    told = refusal(path, plain)
    assert "'held' is float64 of shape (1,) in the file and a float32 buffer of shape (1,) in the model" in told
    flat = ModelFile.load(saved(tmp_path / "plain.safetensors", dict(plain.state_dict()))).arrange(manifest_of(precise))
    assert flat.int_buffers.view(torch.float64).tolist() == [1.0]
