import weakref
from collections import namedtuple
from itertools import chain, islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ormo_worker.tasks import TaskError
from ormo_worker.tasks.batches import Part, batches, evaluation_batches, part_size, tensors_in, to_device
from worker.tasks.aborted import Aborted

SIZE = 10


class OneByOne(Dataset[tuple[Tensor, int]]):
    """A set as a user writes it; `augment` adds noise, so that a stream shows its random numbers."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((2,), float(index)), index

    def augment(self, batch: Any, generator: torch.Generator) -> Any:
        inputs, labels = batch
        return inputs + torch.rand(inputs.shape, generator=generator) / 2, labels


class AtOnce(OneByOne):
    def batch_at(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return indices.float().unsqueeze(1).expand(-1, 2), indices


class Doubling(TensorDataset):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(2 * tensor for tensor in super().__getitem__(index))


def tensors() -> TensorDataset:
    return TensorDataset(torch.arange(float(SIZE)), torch.arange(SIZE))


def labels(dataset: Dataset[Any], batch_size: int, seed: int, count: int) -> list[list[int]]:
    return [batch[1].tolist() for batch in islice(batches(dataset, batch_size, seed), count)]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


EVERY_KIND = pytest.mark.parametrize("dataset", [tensors(), AtOnce(), OneByOne()], ids=lambda d: type(d).__name__)


@EVERY_KIND
def test_each_pass_is_a_new_permutation_without_the_incomplete_batch(dataset: Dataset[Any]) -> None:
    passes = labels(dataset, 3, seed=0, count=9)
    for start in (0, 3, 6):
        seen = list(chain(*passes[start : start + 3]))
        assert len(seen) == len(set(seen)) == 9
    assert passes[:3] != passes[3:6]


@EVERY_KIND
def test_a_set_smaller_than_the_batch_is_one_batch(dataset: Dataset[Any]) -> None:
    assert [sorted(batch) for batch in labels(dataset, 64, seed=0, count=2)] == [list(range(SIZE))] * 2


@EVERY_KIND
def test_the_same_seed_gives_the_same_stream_and_another_seed_another(dataset: Dataset[Any]) -> None:
    before = torch.get_rng_state()
    first, again, other = (list(islice(batches(dataset, 4, seed), 6)) for seed in (7, 7, 8))
    assert same(first, again)
    assert not same(first, other)
    assert torch.equal(torch.get_rng_state(), before)  # nor does it touch the global generator


@EVERY_KIND
def test_the_parts_of_processes_are_together_the_batches_of_one(dataset: Dataset[Any]) -> None:
    whole = labels(dataset, 4, seed=5, count=4)
    parts = [islice(batches(dataset, 2, 5, part=Part(number, 2)), 4) for number in range(2)]
    together = [first[1].tolist() + second[1].tolist() for first, second in zip(*parts, strict=True)]
    assert together == whole


def test_each_part_is_augmented_by_numbers_of_its_own() -> None:
    streams = [batches(AtOnce(), SIZE, 5, part=Part(number, 2)) for number in range(2)]
    assert not torch.equal(*(next(stream)[0] for stream in streams))


def test_a_set_with_fewer_samples_than_processes_is_refused_at_once() -> None:
    assert part_size(tensors(), 64, parts=3) == SIZE // 3
    with pytest.raises(TaskError, match=f"has {SIZE} samples for {SIZE + 1} processes, of which each needs one"):
        batches(tensors(), 1, seed=0, part=Part(0, SIZE + 1))


@pytest.mark.parametrize("seed", [-(2**63), 0, 2**64 - 1])
def test_any_64_bit_seed_will_do(seed: int) -> None:
    assert len(labels(tensors(), 4, seed, count=1)[0]) == 4


def test_reading_at_once_or_one_by_one_gives_the_same_stream() -> None:
    assert same(list(islice(batches(AtOnce(), 4, seed=3), 4)), list(islice(batches(OneByOne(), 4, seed=3), 4)))


def test_a_tensor_data_set_with_its_own_items_is_read_by_them() -> None:
    dataset = Doubling(torch.arange(SIZE), torch.arange(SIZE))
    assert all(label % 2 == 0 for label in labels(dataset, SIZE, seed=0, count=1)[0])


@EVERY_KIND
def test_evaluation_reads_every_sample_once_in_order_and_unchanged(dataset: Dataset[Any]) -> None:
    read = list(evaluation_batches(dataset, 4))
    assert [batch[1].tolist() for batch in read] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert read[0][0].reshape(4, -1)[:, 0].tolist() == [0, 1, 2, 3]


@EVERY_KIND
@pytest.mark.parametrize(
    ("samples", "expected"), [(6, [[0, 1, 3, 5], [6, 8]]), (99, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])]
)
def test_evaluation_can_stop_after_some_samples(dataset: Dataset[Any], samples: int, expected: list[list[int]]) -> None:
    assert [batch[1].tolist() for batch in evaluation_batches(dataset, 4, samples)] == expected


def test_an_empty_set_is_refused_at_once() -> None:
    with pytest.raises(TaskError) as refused:
        batches(TensorDataset(torch.empty(0)), 4, seed=0)
    assert str(refused.value) == ("the data set TensorDataset is empty and gives no batches: check the data folder")


def test_a_set_without_a_length_is_refused_at_once() -> None:
    class Stream(Dataset[int]):
        pass

    with pytest.raises(TaskError) as refused:
        evaluation_batches(Stream(), 4)
    assert str(refused.value) == (
        "the data set Stream has no length: a task's data sets are map-style, so give it __len__ and __getitem__"
    )


def test_a_stream_holds_no_batch_that_it_has_given() -> None:
    for dataset in (tensors(), AtOnce(), OneByOne()):
        stream = batches(dataset, 4, seed=0)
        held = weakref.ref(next(stream)[0])
        assert held() is None


def test_tensors_are_found_wherever_they_are_nested() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert [len(tensor) for tensor in tensors_in({"a": [one, (two, "text")], "b": None})] == [1, 2]


def test_nested_batches_move_to_a_device_with_their_structure() -> None:
    pair = namedtuple("pair", "left right")
    one = torch.ones(1)
    moved = to_device({"a": [one, (one, "text")], "b": pair(one, None)}, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1][0].is_meta
    assert moved["a"][1][1] == "text"
    assert moved["b"].left.is_meta
    assert type(moved["b"]) is pair


def test_a_reading_process_that_is_aborted_at_its_end_is_no_failure(capfd: pytest.CaptureFixture[str]) -> None:
    stream = batches(Aborted(), 2, seed=1, loader_processes=2)
    assert len({int(number) for _ in range(2) for number in next(stream)}) == 4
    del stream  # what went wrong in a finalizer would be a warning, and so an error
    assert "Exception ignored" not in capfd.readouterr().err
