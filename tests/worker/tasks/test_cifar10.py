"""CIFAR-10 in small: files of the same form with 20 and 10 images, and no network."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch

from ormo_worker.tasks import Task, TaskError, load_task
from ormo_worker.tasks.batches import batches
from ormo_worker.tasks.cifar10 import FOLDER
from ormo_worker.tasks.images import import_torchvision


def write_cifar10(data_dir: Path) -> None:
    folder = data_dir / FOLDER
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(256, size=(20, 3072), dtype=np.uint8)
    labels = [index % 10 for index in range(20)]
    for file, content in {
        "data_batch_1": {"data": pixels, "labels": labels},
        "test_batch": {"data": pixels[:10], "labels": labels[:10]},
        "batches.meta": {"label_names": list("abcdefghij")},
    }.items():
        (folder / file).write_bytes(pickle.dumps(content))


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision expect the small files, without checksums, and never reach for the network."""
    cifar10: Any = import_torchvision().datasets.CIFAR10
    monkeypatch.setattr(cifar10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(cifar10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    download_by(monkeypatch, unreachable)


def download_by(monkeypatch: pytest.MonkeyPatch, fetch: Callable[[Path], None]) -> None:
    monkeypatch.setattr(
        import_torchvision().datasets.cifar,
        "download_and_extract_archive",
        lambda url, root, filename, md5: fetch(Path(root)),
    )


def unreachable(data_dir: Path) -> None:
    raise URLError("no such host")


def refusal(task: Task) -> str:
    with pytest.raises(TaskError) as refused:
        task.train_set()
    return str(refused.value)


def test_files_are_read_as_normalised_images_in_channel_order(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    task = load_task("cifar10", tmp_path)
    image, label = task.test_set()[3]
    assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.float32, 3)
    red = np.random.default_rng(0).integers(256, size=(20, 3072), dtype=np.uint8)[3, 0] / 255
    assert image[0, 0, 0].item() == pytest.approx((red - 0.4914) / 0.2470, rel=1e-5)


def test_a_gradient_of_a_training_batch_can_be_computed(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    task = load_task("cifar10", tmp_path)
    model = task.build_model()
    task.loss(model, next(batches(task.train_set(), 4, seed=0))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_missing_data_set_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download_by(monkeypatch, write_cifar10)
    task = load_task("cifar10", tmp_path / "new")
    task.train_set()
    download_by(monkeypatch, unreachable)
    task.test_set()
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FOLDER]


def test_a_worker_that_downloads_at_the_same_time_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch_more_slowly_than_another(data_dir: Path) -> None:
        write_cifar10(data_dir)
        write_cifar10(tmp_path)

    download_by(monkeypatch, fetch_more_slowly_than_another)
    load_task("cifar10", tmp_path).train_set()
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


def test_a_failed_download_says_what_to_put_where(tmp_path: Path) -> None:
    assert refusal(load_task("cifar10", tmp_path)) == (
        f"{tmp_path} has no CIFAR-10, and downloading it failed (<urlopen error no such host>): unpack "
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz there, so that it holds "
        "'cifar-10-batches-py', or name the folder that does with --data-dir"
    )
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_to_be_removed(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / FOLDER / "data_batch_1").unlink()
    message = refusal(load_task("cifar10", tmp_path))
    assert message.startswith(f"the CIFAR-10 files in {tmp_path}/cifar-10-batches-py are damaged (")
    assert message.endswith("): remove that folder and start again to download it")


def test_no_data_folder_is_refused_at_once() -> None:
    with pytest.raises(TaskError) as refused:
        load_task("cifar10")
    assert str(refused.value) == (
        "the task 'cifar10' was given no data folder: add --data-dir FOLDER, where FOLDER holds "
        "'cifar-10-batches-py', or is where to download it to"
    )
