"""The tasks `image-folder` and `image-folder-cnn`: two networks on any tree of class folders with small images."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import Dataset

from ormo_worker.tasks import ClassificationTask, TaskError
from ormo_worker.tasks.images import Colours, Images, ImageTensors, import_torchvision
from ormo_worker.tasks.models import ResNet, SmallCnn

# ImageNet's, the customary ones. The folder's own would differ between workers with data of their own.
COLOURS = Colours(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# A set that takes more is decoded anew in every pass: 170,000 images of 32 x 32 pixels fit, which is three
# times CIFAR-10, and several workers on one host stay within a few GB.
IN_MEMORY_BYTES = 512 * 2**20
LAYOUT = "it must hold images as train/CLASS/*.jpg and test/CLASS/*.jpg (or val/), or *.png and the like"

Sample = tuple[str, int]  # path, label


class ImageFolder(ClassificationTask):
    """Images of any classes, float32 of shape (3, image_size, image_size).

    Images of another size are scaled, and cropped in the middle to a square. Labels number the class
    folders in the order of their names. Sets of up to `IN_MEMORY_BYTES`, decoded, are kept in memory.

    Args:
        data_dir: holds train/CLASS/* and test/CLASS/*, or val/CLASS/* instead of test.

    Attributes:
        name: what users call the task.
        image_size: height and width in pixels; a subclass may change it, up to the 64 that ResNet-20 suits.
        augmented: whether training images are cropped and flipped; a subclass may change it.

    Raises:
        TaskError: the data folder is missing or does not look so, or torchvision is missing.
    """

    name = "image-folder"
    image_size = 32
    augmented = True

    def __init__(self, *, data_dir: Path | None = None) -> None:
        super().__init__(data_dir=data_dir)
        if data_dir is None:
            raise TaskError(f"the task {self.name!r} was given no data folder: add --data-dir FOLDER; {LAYOUT}")
        self._train_folder = _part(data_dir, "train")
        self._test_folder = _part(data_dir, "test", "val")
        self._torchvision = import_torchvision()

    @property
    def num_classes(self) -> int:
        """How many class folders the training set has."""
        return len(self._train_listing.classes)

    def build_model(self) -> nn.Module:
        """Make a ResNet-20 with one output for each class folder of the training set."""
        return ResNet(depth=20, num_classes=self.num_classes)

    def train_set(self) -> Dataset[Any]:
        """The training images; `batches` crops and flips them at random, where they are `augmented`."""
        images = _images(self._train_listing.samples, self.image_size)
        images.augmented = self.augmented
        return images

    def test_set(self) -> Dataset[Any]:
        """The test images.

        Raises:
            TaskError: they have other classes than the training images.
        """
        listing = self._list(self._test_folder)
        if listing.classes != self._train_listing.classes:
            unmatched = sorted(set(listing.classes) ^ set(self._train_listing.classes))
            raise TaskError(
                f"{self._train_folder} and {self._test_folder} must have the same class folders, but only "
                f"one of them has {', '.join(unmatched)}: add or remove these"
            )
        return _images(listing.samples, self.image_size)

    @cached_property
    def _train_listing(self) -> Any:
        return self._list(self._train_folder)

    def _list(self, folder: Path) -> Any:
        """Torchvision's view of the folder, of which only the classes and paths are used."""
        try:
            return self._torchvision.datasets.ImageFolder(folder)
        except FileNotFoundError as error:  # no class folder, or one without images
            raise TaskError(f"{folder} can't be used as a data set ({error}): {LAYOUT}") from error


class SmallCnnFolder(ImageFolder):
    """The images of `image-folder`, neither cropped nor flipped for training, and a network that is fast on one core.

    On CIFAR-10, 10,000 gradients of 32 images (β = 0.9) reach 55 to 57 % with η = 0.02 and 62 % with 0.01. Each takes
    about 3 ms of one core; with ResNet-20 it is 110 ms.
    """

    name = "image-folder-cnn"
    # It would take half as long as the gradient again: 1.4 ms for 32 images.
    augmented = False

    def build_model(self) -> nn.Module:
        """Make a `SmallCnn` with one output for each class folder of the training set."""
        return SmallCnn(self.image_size, self.num_classes)


class ImageFiles(Images):
    """Images decoded each time they are read: for sets that do not fit in memory.

    Args:
        samples: path and label of each image.
        image_size: height and width to scale them to, in pixels.
        colours: mean and spread that they are normalised with.
    """

    def __init__(self, samples: Sequence[Sample], image_size: int, colours: Colours) -> None:
        self.samples = samples
        self.image_size = image_size
        self.colours = colours

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.colours.normalise(decode(path, self.image_size)), label


def decode(path: str, image_size: int) -> Tensor:
    """Read an image file as uint8 of shape (3, image_size, image_size), cropped in the middle to a square.

    Raises:
        TaskError: the file is no image, or is damaged.
    """
    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.BILINEAR)
    except OSError as error:
        raise TaskError(f"the image {path} can't be read ({error}): replace or remove it") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)


def _part(data_dir: Path, *names: str) -> Path:
    for name in names:
        if (data_dir / name).is_dir():
            return data_dir / name
    raise TaskError(
        f"the data folder {data_dir} has no folder {' or '.join(names)}: name another with --data-dir; {LAYOUT}"
    )


def _images(samples: Sequence[Sample], image_size: int) -> Images:
    if len(samples) * 3 * image_size**2 > IN_MEMORY_BYTES:
        return ImageFiles(samples, image_size, COLOURS)
    images = torch.empty(len(samples), 3, image_size, image_size, dtype=torch.uint8, device="cpu")
    for index, (path, _) in enumerate(samples):
        images[index] = decode(path, image_size)
    return ImageTensors(images, torch.tensor([label for _, label in samples], device="cpu"), COLOURS)
