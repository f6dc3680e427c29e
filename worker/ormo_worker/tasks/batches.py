"""Streams of batches from data sets, reproducible from one seed.

A data set may offer two methods of its own, both optional: `batch_at`, where it can give a whole batch at
once, and `augment`, where training changes samples at random.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ormo_worker.tasks import Batch, TaskError


@runtime_checkable
class InMemory(Protocol):
    """A data set that gives a whole batch in a few tensor operations, without a loader."""

    def batch_at(self, indices: Tensor) -> Batch:
        """The samples at the indices (int64, shape (N,)), stacked."""


@runtime_checkable
class Augmented(Protocol):
    """A data set whose training batches are changed at random, whole batches at a time."""

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The changed batch; every random number comes from the (CPU) generator."""


class Part(NamedTuple):
    """One of the equal parts that each batch is cut into.

    Attributes:
        number: from 0 up.
        of: how many there are.
    """

    number: int = 0
    of: int = 1


_WHOLE = Part()


def part_size(dataset: Dataset[Any], batch_size: int, parts: int = 1) -> int:
    """How many samples a batch, or a part of one, comes to have: fewer than wanted where the set has fewer.

    Raises:
        TaskError: the data set is empty, has fewer samples than there are parts, or has no length.
    """
    size = _size(dataset)
    if size < parts:
        raise TaskError(
            f"the data set {type(dataset).__name__} has {size} samples for {parts} processes, of which each needs one "
            "in each batch: start fewer"
        )
    return min(batch_size, size // parts)


def batches(
    dataset: Dataset[Any], batch_size: int, seed: int, *, loader_processes: int = 0, part: Part = _WHOLE
) -> Iterator[Batch]:
    """An endless stream of shuffled training batches, in pinned memory where CUDA is available.

    Each pass is a new permutation; its last, incomplete batch is dropped, except where the set is smaller
    than one batch: then the batch is the whole set. The same seed gives the same stream, augmentation
    included, with any number of processes; what `__getitem__` draws from global generators is outside it.

    Args:
        dataset: map-style. A `TensorDataset`, or one with `batch_at`, is read without loader processes.
        batch_size: samples in a batch, or in the part of it.
        seed: any integer from -2**63 to 2**64 - 1; the server gives each worker its own.
        loader_processes: processes that read samples ahead, 0 to read in this one. They are spawned, not
            forked (a fork would inherit gRPC's threads): the data set must be picklable.
        part: what is returned of each batch, where several processes train on one together: of one seed their parts
            are the batch, each augmented by numbers of its own.

    Raises:
        TaskError: as for `part_size`.
    """
    size, share = _size(dataset), part_size(dataset, batch_size, part.of)
    generator = torch.Generator("cpu").manual_seed(seed)
    # Augmentation draws from a generator of its own: how far a loader reads ahead must not matter.
    drawn = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    augmenting = torch.Generator("cpu").manual_seed(drawn + part.number)
    order = (whole[part.number * share :][:share] for whole in _endless_indices(size, share * part.of, generator))
    stream = _read(dataset, order, seed ^ part.number, loader_processes)
    if isinstance(dataset, Augmented):
        augment = dataset.augment
        # Not a generator expression, which would hold on to each batch until the next is wanted.
        stream = map(lambda batch: augment(batch, augmenting), stream)  # noqa: C417
    return map(_pin, stream)


def evaluation_batches(dataset: Dataset[Any], batch_size: int, samples: int = 0) -> Iterator[Batch]:
    """Every sample at most once, in order and not augmented; the last batch may be smaller.

    Args:
        dataset: map-style.
        batch_size: samples in a batch.
        samples: how many to return, spread evenly over the set, which may be sorted by class; 0 for all.

    Raises:
        TaskError: the data set is empty or has no length.
    """
    size = _size(dataset)
    wanted = min(samples, size) if samples else size
    order = torch.split(torch.arange(wanted, device="cpu") * size // wanted, batch_size)
    return map(_pin, _read(dataset, order, seed=0, loader_processes=0))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy every tensor of nested tuples, lists and mappings; copies of pinned tensors do not block.

    What is no tensor, such as a string, stays as it is; a mapping comes back as a dict.
    """
    return _map(batch, lambda tensor: tensor.to(device, non_blocking=True))


def tensors_in(batch: Batch) -> list[Tensor]:
    """Every tensor of nested tuples, lists and mappings."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map(batch, note)
    return found


def _size(dataset: Dataset[Any]) -> int:
    if not isinstance(dataset, Sized):
        raise TaskError(
            f"the data set {type(dataset).__name__} has no length: a task's data sets are map-style, so "
            "give it __len__ and __getitem__"
        )
    if len(dataset) == 0:
        raise TaskError(f"the data set {type(dataset).__name__} is empty and gives no batches: check the data folder")
    return len(dataset)


def _endless_indices(size: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(size, generator=generator, device="cpu")
        # Cut as they are wanted: all slices of a pass, as tensors, take more memory than its order, and a simulation
        # holds a thousand such streams.
        for start in range(0, size - size % batch_size, batch_size):
            yield order[start : start + batch_size]


def _read(dataset: Dataset[Any], order: Iterable[Tensor], seed: int, loader_processes: int) -> Iterator[Batch]:
    batch_at = _batch_reader(dataset)
    if batch_at is not None:
        return map(batch_at, order)
    loader = DataLoader(
        dataset,
        # With an endless order the processes start once, and read ahead across the ends of passes.
        batch_sampler=(indices.tolist() for indices in order),
        num_workers=loader_processes,
        multiprocessing_context="spawn" if loader_processes else None,
        pin_memory=loader_processes > 0 and torch.cuda.is_available(),  # else it is done by `batches`
        generator=torch.Generator("cpu").manual_seed(seed),  # or it would draw from the global one
    )
    with torch.device("cpu"):  # it draws its processes' seed from that generator, on the program's default device
        reading = iter(loader)
    return _until_closed(reading)


def _until_closed(reading: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from reading
    finally:
        # A process that is told to end is now and then aborted by the C++ library instead. PyTorch would raise that
        # wherever the program is by then; here, where its processes end, it means nothing. There is no public way.
        shut_down = getattr(reading, "_shutdown_workers", None)
        if shut_down is not None:
            with contextlib.suppress(RuntimeError):
                shut_down()


def _batch_reader(dataset: Dataset[Any]) -> Callable[[Tensor], Batch] | None:
    if isinstance(dataset, InMemory):
        return dataset.batch_at
    if type(dataset) is TensorDataset:  # a subclass may well have a __getitem__ of its own
        tensors = dataset.tensors
        return lambda indices: tuple(tensor.index_select(0, indices) for tensor in tensors)
    return None


def _pin(batch: Batch) -> Batch:
    if not torch.cuda.is_available():
        return batch
    return _map(batch, lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())


def _map(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _map(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named tuple takes its fields one by one
        return type(batch)(*(_map(value, change) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_map(value, change) for value in batch)
    return batch
