"""A model comes from whatever its users have: files of PyTorch and folders of Hugging Face."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ormo_server.store import ModelFile, StoreError
from store.building import Net, flat_of, manifest_of
from store.test_models import assert_equal


def refusal(path: Path) -> str:
    with pytest.raises(StoreError) as refused:
        ModelFile.load(path)
    return str(refused.value)


def sharded(folder: Path, model: nn.Module) -> Path:
    """As `save_pretrained` writes a large model: the index, and files that share the tensors, tied ones once."""
    tensors = {name: each.clone() for name, each in model.state_dict().items() if name != "head.weight"}
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_tensors_that_pytorch_saved_are_taken(tmp_path: Path) -> None:
    model = Net()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    file = ModelFile.load(tmp_path / "model.pt")
    assert file.manifest is None
    assert_equal(file.arrange(manifest_of(model)), flat_of(model))


def test_a_hugging_face_folder_of_one_file_is_taken(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert_equal(ModelFile.load(tmp_path).arrange(manifest_of(model)), flat_of(model))


def test_a_hugging_face_folder_of_several_files_is_taken(tmp_path: Path) -> None:
    model = Net()
    assert_equal(ModelFile.load(sharded(tmp_path, model)).arrange(manifest_of(model)), flat_of(model))


def test_a_missing_part_of_a_folder_is_refused(tmp_path: Path) -> None:
    (sharded(tmp_path, Net()) / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refusal(tmp_path)


def test_a_tensor_that_is_in_none_of_the_files_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path, Net()) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    assert "lists tensors that are in none of its files: more" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "below/model.safetensors"])
def test_an_index_names_no_files_outside_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    assert f"names files outside its folder: {name}" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 7}', "{}"])
def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "index.json is malformed" in refusal(tmp_path)


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("trapped",)


def test_a_file_of_pytorch_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Trap()}, tmp_path / "model.pt")
    assert "model.pt is not a whole file of tensors by torch.save" in refusal(tmp_path / "model.pt")
    assert not (tmp_path / "trapped").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "trapped").exists(), "it would have run"


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"model": {"weight": torch.zeros(2)}, "epoch": 3}, "holds more than tensors: 'model' (dict), 'epoch' (int)"),
        ([torch.zeros(2)], "holds a list, not tensors by name"),
        ({"weight": torch.tensor([float("nan")])}, "has NaN in 'weight'"),
        ({"weight": torch.zeros(2, dtype=torch.float16)}, "tensors that are not served: 'weight' (torch.float16)"),
    ],
)
def test_what_else_pytorch_saves_is_refused(tmp_path: Path, saved: object, said: str) -> None:
    torch.save(saved, tmp_path / "model.pt")
    assert said in refusal(tmp_path / "model.pt")


def test_a_file_of_pytorch_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    assert "model.pt can't be read" in refusal(path)
