import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ormo_worker.tasks.images import Colours, ImageTensors, crop_and_flip

COLOURS = Colours(mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.5))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def possible_results(image: Tensor) -> set[bytes]:
    """Every crop of the padded image, and its mirror image, by plain slicing."""
    _, height, width = image.shape
    padded = F.pad(image, (4, 4, 4, 4))
    crops = [padded[:, y : y + height, x : x + width] for y in range(9) for x in range(9)]
    return {view.contiguous().numpy().tobytes() for crop in crops for view in (crop, crop.flip(2))}


def test_each_image_is_shifted_and_mirrored_by_itself() -> None:
    image = torch.randn(3, 6, 8)
    results = [result.numpy().tobytes() for result in crop_and_flip(image.repeat(2000, 1, 1, 1), generator(0))]
    assert set(results) == possible_results(image)  # all 162 of them occur, and nothing else


def test_half_of_the_images_are_mirrored() -> None:
    rising = torch.arange(16.0).repeat(1000, 1, 16, 1)
    middle = crop_and_flip(rising, generator(0))[:, 0, 8, 7:9]  # too far in for the padding to reach
    mirrored = (middle[:, 0] > middle[:, 1]).float().mean().item()
    assert mirrored == pytest.approx(0.5, abs=0.05)


def test_the_same_generator_gives_the_same_crops_and_leaves_global_randomness_alone() -> None:
    images = torch.randn(16, 3, 8, 8)
    before = torch.get_rng_state()
    assert torch.equal(crop_and_flip(images, generator(1)), crop_and_flip(images, generator(1)))
    assert not torch.equal(crop_and_flip(images, generator(1)), crop_and_flip(images, generator(2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_that_are_not_to_be_augmented_stay_as_they_are() -> None:
    dataset = ImageTensors(torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8), torch.arange(5), COLOURS)
    batch = dataset.batch_at(torch.arange(5))
    assert not torch.equal(dataset.augment(batch, generator(0))[0], batch[0])
    dataset.augmented = False
    assert torch.equal(dataset.augment(batch, generator(0))[0], batch[0])


def test_an_image_in_memory_reads_the_same_alone_and_in_a_batch() -> None:
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    dataset = ImageTensors(images, torch.arange(5), COLOURS)
    batch, labels = dataset.batch_at(torch.tensor([3, 1]))
    image, label = dataset[3]
    assert torch.equal(batch[0], image)
    assert (label, labels.tolist()) == (3, [3, 1])


def test_normalising_takes_the_mean_colour_to_0_and_one_deviation_to_1() -> None:
    bytes_of = torch.tensor([[51, 102, 153], [77, 153, 255]], dtype=torch.uint8).view(2, 3, 1, 1)
    mean, brighter = COLOURS.normalise(bytes_of)
    assert torch.allclose(mean, torch.zeros(3, 1, 1), atol=1e-6)
    assert torch.allclose(brighter.flatten(), torch.tensor([26 / 25.5, 51 / 51, 102 / 127.5]))
