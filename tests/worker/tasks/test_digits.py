import torch
from torch.utils.data import TensorDataset

from ormo_worker.tasks import Score
from ormo_worker.tasks.batches import batches, evaluation_batches
from ormo_worker.tasks.digits import Digits


def test_the_split_holds_back_a_fifth_of_each_digit_and_never_changes() -> None:
    train, test = Digits().train_set(), Digits().test_set()
    assert isinstance(train, TensorDataset)
    assert isinstance(test, TensorDataset)
    assert (len(train), len(test)) == (1437, 360)
    every_digit = train.tensors[1].bincount() + test.tensors[1].bincount()
    assert torch.all((test.tensors[1].bincount() / every_digit - 0.2).abs() < 0.005)
    assert torch.equal(test.tensors[0], Digits().test_set()[:][0])


def test_samples_are_small_grey_images_between_0_and_1() -> None:
    image, label = Digits().train_set()[0]
    assert (image.shape, image.dtype, label.dtype) == ((1, 8, 8), torch.float32, torch.int64)
    assert (image.min(), image.max()) == (0, 1)


def test_the_model_is_small_and_has_buffers() -> None:
    model = Digits().build_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 9978
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32, torch.int64}


def test_400_gradients_of_plain_momentum_reach_97_percent() -> None:
    torch.manual_seed(0)
    task = Digits()
    model = task.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _, batch in zip(range(400), batches(task.train_set(), 32, seed=0), strict=False):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    model.eval()
    scores = (task.score(model, batch) for batch in evaluation_batches(task.test_set(), 100))
    assert sum(scores, Score()).accuracy >= 0.97
