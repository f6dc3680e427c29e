"""Class folders with a few plain images, written for each test."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from ormo_worker.tasks import TaskError, load_task
from ormo_worker.tasks import image_folder as module
from ormo_worker.tasks.batches import batches, evaluation_batches
from ormo_worker.tasks.image_folder import ImageFiles, ImageFolder
from ormo_worker.tasks.images import ImageTensors

CLASSES = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
LAYOUT = "it must hold images as train/CLASS/*.jpg and test/CLASS/*.jpg (or val/), or *.png and the like"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    for part in ("train", "test"):
        for name, colour in CLASSES.items():
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (40 + number, 50), colour).save(folder / f"{number}.png")
    return tmp_path


def refusal(data_dir: Path | None) -> str:
    with pytest.raises(TaskError) as refused:
        load_task("image-folder", data_dir).test_set()
    return str(refused.value)


def test_classes_are_numbered_by_name_and_images_scaled(data_dir: Path) -> None:
    dataset = load_task("image-folder", data_dir).train_set()
    (images, labels), *others = evaluation_batches(dataset, 100)
    assert others == []
    assert (images.shape, images.dtype) == ((12, 3, 32, 32), torch.float32)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    brightest = images.mean(dim=(2, 3)).argmax(dim=1)  # the channels are red, green, blue
    assert brightest.tolist() == [2] * 4 + [1] * 4 + [0] * 4


def test_the_model_has_one_output_for_each_class_folder(data_dir: Path) -> None:
    task = load_task("image-folder", data_dir)
    model = task.build_model()
    loss = task.loss(model, next(batches(task.train_set(), 4, seed=0)))
    assert loss.ndim == 0
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_a_subclass_chooses_the_size(data_dir: Path) -> None:
    class Larger(ImageFolder):
        image_size = 48

    image, _ = Larger(data_dir=data_dir).train_set()[0]
    assert image.shape == (3, 48, 48)


def test_a_val_folder_serves_for_testing(data_dir: Path) -> None:
    (data_dir / "test").rename(data_dir / "val")
    assert load_task("image-folder", data_dir).test_set()[0][1] == 0


def test_a_set_too_large_for_memory_gives_the_same_stream_with_or_without_loader_processes(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task("image-folder", data_dir)
    in_memory = task.train_set()
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 12 * 3 * 32 * 32 - 1)
    from_files = task.train_set()
    assert isinstance(in_memory, ImageTensors)
    assert isinstance(from_files, ImageFiles)
    expected = list(islice(batches(in_memory, 5, seed=1), 3))
    for loader_processes in (0, 1):
        stream = batches(from_files, 5, seed=1, loader_processes=loader_processes)
        for (images, labels), (expected_images, expected_labels) in zip(islice(stream, 3), expected, strict=True):
            assert torch.equal(images, expected_images)
            assert torch.equal(labels, expected_labels)


def test_no_data_folder_is_refused_at_once() -> None:
    assert refusal(None) == (f"the task 'image-folder' was given no data folder: add --data-dir FOLDER; {LAYOUT}")


@pytest.mark.parametrize(("missing", "named"), [("train", "train"), ("test", "test or val")])
def test_a_missing_part_is_named_with_the_layout(data_dir: Path, missing: str, named: str) -> None:
    (data_dir / missing).rename(data_dir / "other")
    assert refusal(data_dir) == (
        f"the data folder {data_dir} has no folder {named}: name another with --data-dir; {LAYOUT}"
    )


def test_an_empty_class_folder_is_named(data_dir: Path) -> None:
    (data_dir / "train" / "yellow").mkdir()
    message = refusal(data_dir)
    assert message.startswith(f"{data_dir}/train can't be used as a data set (")
    assert "yellow" in message
    assert message.endswith(f"): {LAYOUT}")


def test_other_classes_for_testing_are_refused(data_dir: Path) -> None:
    (data_dir / "test" / "red").rename(data_dir / "test" / "yellow")
    assert refusal(data_dir) == (
        f"{data_dir}/train and {data_dir}/test must have the same class folders, but only one of them has "
        "red, yellow: add or remove these"
    )


def test_a_damaged_image_is_named(data_dir: Path) -> None:
    damaged = data_dir / "test" / "red" / "1.png"
    damaged.write_bytes(b"no image")
    message = refusal(data_dir)
    assert message.startswith(f"the image {damaged} can't be read (")
    assert message.endswith("): replace or remove it")
