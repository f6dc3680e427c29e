"""The task `cifar10`: ResNet-20 on CIFAR-10, as in the experiments of the OrMo paper."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ormo_worker.tasks import ClassificationTask, TaskError
from ormo_worker.tasks.images import Colours, ImageTensors, import_torchvision
from ormo_worker.tasks.models import ResNet

FOLDER = "cifar-10-batches-py"  # as the archive of the data set's authors has it
COLOURS = Colours(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))  # of the training set


class Cifar10(ClassificationTask):
    """50,000 images to train and 10,000 to test, float32 of shape (3, 32, 32), in ten classes.

    Args:
        data_dir: holds the folder cifar-10-batches-py; where it does not, the data set is downloaded
            into it (170 MB) when first read.

    Raises:
        TaskError: no data folder was named, or torchvision is missing.
    """

    def __init__(self, *, data_dir: Path | None = None) -> None:
        if data_dir is None:
            raise TaskError(
                "the task 'cifar10' was given no data folder: add --data-dir FOLDER, where FOLDER holds "
                f"{FOLDER!r}, or is where to download it to"
            )
        super().__init__(data_dir=data_dir)
        self._folder = data_dir
        self._datasets = import_torchvision().datasets

    def build_model(self) -> nn.Module:
        """Make a ResNet-20."""
        return ResNet(depth=20, num_classes=10)

    def train_set(self) -> Dataset[Any]:
        """The training images; `batches` crops and flips them at random."""
        return self._read(train=True)

    def test_set(self) -> Dataset[Any]:
        """The test images."""
        return self._read(train=False)

    def _read(self, *, train: bool) -> ImageTensors:
        if not (self._folder / FOLDER).is_dir():
            self._download()
        try:
            files = self._datasets.CIFAR10(self._folder, train=train)
        except RuntimeError as error:  # a file is missing, or its checksum differs
            raise TaskError(
                f"the CIFAR-10 files in {self._folder / FOLDER} are damaged ({error}): remove that folder "
                "and start again to download it"
            ) from error
        images = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()
        return ImageTensors(images, torch.tensor(files.targets, device="cpu"), COLOURS)

    def _download(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._download_aside()
        except (OSError, RuntimeError) as error:  # no network, no space, no permission, a wrong checksum
            raise TaskError(
                f"{self._folder} has no CIFAR-10, and downloading it failed ({error}): unpack "
                f"{self._datasets.CIFAR10.url} there, so that it holds {FOLDER!r}, or name the folder that "
                "does with --data-dir"
            ) from error

    def _download_aside(self) -> None:
        """Fetch the data set beside its place and rename it: workers on one host may do so at once."""
        place = self._folder / FOLDER
        with tempfile.TemporaryDirectory(dir=self._folder, prefix="download-") as aside:
            self._datasets.CIFAR10(aside, download=True)
            try:
                (Path(aside) / FOLDER).rename(place)
            except OSError:
                if not place.is_dir():  # else another worker was faster, with the same files
                    raise
