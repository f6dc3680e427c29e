import pytest
import torch

from ormo_worker.tasks import TaskError
from ormo_worker.tasks.models import Block, ResNet


# The paper rounds these to 0.27, 0.46 and 0.66 million.
@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586)])
def test_sizes_are_those_of_the_paper(depth: int, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in ResNet(depth, 10).parameters()) == parameters


def test_depth_counts_the_layers_with_weights() -> None:
    model = ResNet(20, 10)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == 20


@pytest.mark.parametrize("pixels", [28, 32, 64])
def test_small_images_of_any_size_give_one_logit_for_each_class(pixels: int) -> None:
    assert ResNet(8, 5)(torch.randn(2, 3, pixels, pixels)).shape == (2, 5)


def test_a_shortcut_takes_every_second_pixel_and_fills_new_channels_with_zeros() -> None:
    block = Block(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)  # leaves the shortcut alone
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2])
    assert torch.equal(out[:, 2:], torch.zeros(1, 2, 2, 2))


def test_a_depth_that_the_paper_does_not_have_is_refused() -> None:
    with pytest.raises(TaskError) as refused:
        ResNet(18, 10)
    assert str(refused.value) == ("a ResNet of depth 18 can't be built: take 6n + 2, such as 20, 32 or 44")
