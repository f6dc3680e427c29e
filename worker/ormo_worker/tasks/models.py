"""The networks of the built-in tasks on images."""

import torch.nn.functional as F
from torch import Tensor, nn

from ormo_worker.tasks import TaskError


class ResNet(nn.Module):
    """The residual network of He, Zhang, Ren, Sun 2016, section 4.2, of depth 6n + 2, with shortcuts of option A.

    Three stages of n blocks with 16, 32 and 64 channels. Takes float32 images of shape (N, 3, H, W), made
    for 32 x 32; gives logits of shape (N, num_classes). ResNet-20 for 10 classes has 269,722 parameters.

    Args:
        depth: 20, 32, 44, 56, 110 in the paper.
        num_classes: how many classes there are.

    Raises:
        TaskError: the depth is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise TaskError(f"a ResNet of depth {depth} can't be built: take 6n + 2, such as 20, 32 or 44")
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.stages = nn.Sequential(*_blocks(blocks_per_stage=depth // 6))
        self.head = nn.Linear(64, num_classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of the images."""
        features: Tensor = self.stages(F.relu(self.norm(self.stem(images))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; a stride of 2 halves the image."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """Features of shape (N, channels, H / stride, W / stride)."""
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        # Option A: every second pixel, and zeros for the channels that the input does not have.
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(out + shortcut)


def _blocks(blocks_per_stage: int) -> list[Block]:
    blocks: list[Block] = []
    channels_in = 16
    for channels in (16, 32, 64):
        for _ in range(blocks_per_stage):
            blocks.append(Block(channels_in, channels, stride=channels // channels_in))
            channels_in = channels
    return blocks


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class SmallCnn(nn.Module):
    """Three 3 x 3 convolutions that halve the image, and a linear layer; 33,834 parameters for 10 classes of 32 x 32.

    Takes float32 images of shape (N, 3, S, S), gives logits of shape (N, num_classes).

    Args:
        image_size: S, in pixels, at least 1.
        num_classes: how many classes there are.
    """

    def __init__(self, image_size: int, num_classes: int) -> None:
        super().__init__()
        # Strides and no pooling: a convolution costs one thread about 0.8 ms however small it is, and more in
        # proportion to its output. Pooled instead, they take 10 ms and not 3, for one percent more accuracy.
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.head = nn.Linear(64 * (-(-image_size // 8)) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of the images."""
        features = F.relu(self.conv1(images))
        features = F.relu(self.conv2(features))
        features = F.relu(self.conv3(features))
        logits: Tensor = self.head(features.flatten(1))
        return logits
