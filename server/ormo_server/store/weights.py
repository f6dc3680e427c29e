"""The tensors of a model by name, from files as others write them: safetensors, PyTorch's, Hugging Face's folders."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

from ormo_server.store.files import StoreError, listed, load_tensors, reading

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPECTED = (
    "a file that safetensors' save_file or save_model or torch.save wrote, with the tensors of a state_dict, a folder "
    f"with {ONE_FILE} or {INDEX}, as save_pretrained writes it, or the directory of a checkpoint"
)
# A zip file, as torch.save writes it since 1.6.
_OF_TORCH = b"PK"


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors by name, in memory of their own, and what a safetensors file says besides.

    Args:
        path: of a file of either format, which its first bytes tell, or of a folder as Hugging Face's are.

    Raises:
        StoreError: it is missing, or neither.
    """
    if path.is_dir():
        return _read_folder(path)
    with reading(path), path.open("rb") as file:
        begins = file.read(2)
    return (_read_torch(path), {}) if begins.startswith(_OF_TORCH) else load_tensors(path)


def _read_folder(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    index = folder / INDEX
    if not index.exists():
        if not (folder / ONE_FILE).exists():
            raise StoreError(f"{folder} is a directory, but not a checkpoint, and has neither {ONE_FILE} nor {INDEX}")
        return load_tensors(folder / ONE_FILE)
    with reading(index):
        file_of: dict[str, str] = dict(json.loads(index.read_bytes())["weight_map"])
        files = sorted(set(file_of.values()))
        # Whoever wrote it must not choose which of our files are read.
        outside = [name for name in files if name != Path(name).name]
    if outside:
        raise StoreError(f"{index} names files outside its folder: {listed(outside)}")
    weights: dict[str, torch.Tensor] = {}
    for name in files:
        weights |= load_tensors(folder / name)[0]
    missing = sorted(file_of.keys() - weights.keys())
    if missing:
        raise StoreError(f"{index} lists tensors that are in none of its files: {listed(missing)}")
    return weights, {}


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    # Nothing but tensors and plain containers is made of it: a pickle could run whatever it likes.
    try:
        with reading(path):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = str(error).partition("\n")[0]
        raise StoreError(f"{path} is not a whole file of tensors by torch.save ({why})") from error
    if not isinstance(found, Mapping):
        raise StoreError(f"{path} holds a {type(found).__name__}, not tensors by name: save model.state_dict()")
    other = [f"{name!r} ({type(value).__name__})" for name, value in found.items() if not torch.is_tensor(value)]
    if other:
        raise StoreError(f"{path} holds more than tensors: {listed(other)}; save model.state_dict() alone")
    return {str(name): tensor.detach().contiguous() for name, tensor in found.items()}
