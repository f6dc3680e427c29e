"""Data sets of coloured images: uint8 at rest, normalised when read, cropped and flipped for training."""

import importlib
import sys
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ormo_worker.tasks import TaskError

CROP_PADDING_PIXELS = 4  # of the ResNet paper, for 32 x 32 images


@dataclass(frozen=True, slots=True)
class Colours:
    """Mean and standard deviation of red, green and blue, where 1 is full brightness."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalise(self, images: Tensor) -> Tensor:
        """Map uint8 images of shape (..., 3, H, W) to float32 of the same shape, about 0 with spread 1."""
        return images.float().sub_(_of_bytes(self.mean)).div_(_of_bytes(self.std))


@cache  # to make two such tensors takes a third as long as to normalise 32 images of 32 x 32 pixels with them
def _of_bytes(channels: tuple[float, float, float]) -> Tensor:
    """Numbers for each channel where 1 is full brightness, as float32 of shape (3, 1, 1) where 255 is."""
    return torch.tensor(channels, dtype=torch.float32, device="cpu").mul_(255).view(3, 1, 1)


class Images(Dataset[tuple[Tensor, int]]):
    """Normalised images, float32 of shape (3, H, W), with their labels.

    Attributes:
        augmented: whether training crops and flips them.
    """

    augmented = True

    def augment(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Crop and flip each image of a batch at random, if wanted; `batches` calls this for training."""
        if not self.augmented:
            return batch
        images, labels = batch
        return crop_and_flip(images, generator), labels


class ImageTensors(Images):
    """Images in memory, a quarter the size of float32: CIFAR-10's training set takes 154 MB.

    Args:
        images: uint8, shape (N, 3, H, W).
        labels: int64, shape (N,).
        colours: mean and spread that they are normalised with.
    """

    def __init__(self, images: Tensor, labels: Tensor, colours: Colours) -> None:
        self.images = images
        self.labels = labels
        self.colours = colours

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.colours.normalise(self.images[index]), int(self.labels[index])

    def batch_at(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images, float32 of shape (N, 3, H, W), and labels at the indices, int64 of shape (N,)."""
        # Not by `[indices]`, which copies pixel by pixel: 0.13 ms for 32 images of 32 x 32, and this 0.02.
        return self.colours.normalise(self.images.index_select(0, indices)), self.labels.index_select(0, indices)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels along each axis, and mirror half of them.

    Args:
        images: normalised, shape (N, C, H, W); what moves in from outside is 0, the mean colour.
        generator: gives every random number; on the CPU.

    Returns:
        Images of the same shape, copied.
    """
    count, channels, height, width = images.shape
    pad = CROP_PADDING_PIXELS
    top, left = torch.randint(2 * pad + 1, (2, count, 1), generator=generator, device="cpu")
    mirrored = torch.rand(count, 1, generator=generator, dtype=torch.float32, device="cpu") < 0.5
    rows = top + torch.arange(height, device="cpu")
    columns = left + torch.arange(width, device="cpu")
    columns = torch.where(mirrored, columns.flip(1), columns)
    return F.pad(images, (pad, pad, pad, pad))[
        torch.arange(count, device="cpu").view(-1, 1, 1, 1),
        torch.arange(channels, device="cpu").view(1, -1, 1, 1),
        rows.view(count, 1, height, 1),
        columns.view(count, 1, 1, width),
    ]


_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_OPERATOR_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> ModuleType:
    """Torchvision, also beside a CPU build of PyTorch, where a plain import of 0.28 fails.

    The wheel on PyPI is a CUDA build: its compiled operators do not load there, and registering their
    shapes raises. Data sets need none of them, so declaring the two operators without code is enough.

    Raises:
        TaskError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise TaskError(
            f"this task needs torchvision, which can't be imported ({error}): run "
            "pip install 'ormo-parameter-server[vision]'"
        ) from error
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
    _declare_operators()
    return importlib.import_module("torchvision")


def _declare_operators() -> None:
    for operator in ("torchvision::nms", "torchvision::qnms"):
        torch.library.define(operator, _OPERATOR_SCHEMA)  # PyTorch keeps it for as long as the process lives
    for module in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
        del sys.modules[module]  # left half-loaded by the failed import
