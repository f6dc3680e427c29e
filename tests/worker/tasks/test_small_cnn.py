"""The small network, on class folders with a few noisy images of one colour each."""

import importlib.util
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ormo_worker.simulated import TaskWorkload
from ormo_worker.tasks import Score, load_task
from ormo_worker.tasks.batches import batches, evaluation_batches
from ormo_worker.tasks.models import SmallCnn

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="class folders are read with torchvision"
)
CLASSES = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0)
    for part in ("train", "test"):
        for name, colour in CLASSES.items():
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(8):
                pixels = np.array(colour, dtype=np.uint8) + noise.integers(56, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


def test_for_ten_classes_of_cifar_images_it_has_33834_parameters() -> None:
    assert sum(parameter.numel() for parameter in SmallCnn(32, 10).parameters()) == 33_834


@pytest.mark.parametrize("pixels", [1, 28, 33, 64])
def test_images_of_any_size_give_one_logit_for_each_class(pixels: int) -> None:
    assert SmallCnn(pixels, 5)(torch.randn(2, 3, pixels, pixels)).shape == (2, 5)


@needs_torchvision
def test_training_images_are_those_of_the_files(data_dir: Path) -> None:
    dataset = load_task("image-folder-cnn", data_dir).train_set()
    ((as_they_are, _),) = evaluation_batches(dataset, 100)
    images, _ = next(batches(dataset, 24, seed=0))
    assert {image.numpy().tobytes() for image in images} == {image.numpy().tobytes() for image in as_they_are}


@needs_torchvision
def test_it_learns_to_tell_colours_apart(data_dir: Path) -> None:
    task = load_task("image-folder-cnn", data_dir)
    model = task.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for batch in islice(batches(task.train_set(), 8, seed=0), 30):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    assert sum((task.score(model, batch) for batch in evaluation_batches(task.test_set(), 5)), Score()).accuracy == 1.0


@needs_torchvision
def test_it_can_be_simulated(data_dir: Path) -> None:
    workload = TaskWorkload(
        task="image-folder-cnn",
        data_dir=data_dir,
        batch_size=8,
        weight_decay=1e-4,
        device="cpu",
        train_samples=0,
        test_samples=0,
    )
    start = workload.initial(0)
    worker, gradient = workload.start_worker(1, start), torch.empty_like(start.params)
    before = workload.evaluate(start)
    for ticket in range(5):
        worker.gradient(ticket, start.params, gradient)
        start.params.sub_(gradient, alpha=0.02)
    after = workload.evaluate(start)
    assert after.train_loss < before.train_loss
    assert after.test_loss < before.test_loss
