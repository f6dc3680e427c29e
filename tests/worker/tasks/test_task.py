import math

import pytest
import torch
from torch import Tensor, nn

from ormo_worker.tasks import ClassificationTask, Score
from ormo_worker.tasks.digits import Digits

LABELS = torch.tensor([0, 1, 1, 1])
LOGITS = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])  # the third is wrong
RIGHT, WRONG = math.log1p(math.exp(-2)), math.log1p(math.exp(2))  # cross entropies of such outputs


def task() -> ClassificationTask:
    return Digits()


def test_loss_is_the_mean_cross_entropy_and_can_be_differentiated() -> None:
    logits = LOGITS.clone().requires_grad_()
    loss: Tensor = task().loss(nn.Identity(), (logits, LABELS))
    loss.backward()
    assert loss.item() == pytest.approx((3 * RIGHT + WRONG) / 4)
    assert logits.grad is not None


def test_score_sums_the_losses_and_counts_what_is_right_without_gradients() -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
        model.bias.zero_()
    score = task().score(model, (LOGITS, LABELS))
    assert score.loss_sum == pytest.approx(3 * RIGHT + WRONG)
    assert (score.correct, score.samples) == (3, 4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_scores_of_batches_of_unequal_size_add_up_to_the_score_of_all() -> None:
    parts = [task().score(nn.Identity(), (LOGITS[part], LABELS[part])) for part in (slice(0, 3), slice(3, 4))]
    whole = task().score(nn.Identity(), (LOGITS, LABELS))
    total = sum(parts, Score())
    assert total.mean_loss == pytest.approx(whole.mean_loss)
    assert total.accuracy == whole.accuracy == 0.75


def test_the_score_of_no_samples_has_no_mean() -> None:
    assert math.isnan(Score().mean_loss)
    assert math.isnan(Score().accuracy)


def test_every_parameter_is_decayed_unless_the_task_says_otherwise() -> None:
    model = task().build_model()
    assert {task().weight_decay_scale(*named) for named in model.named_parameters()} == {1.0}
