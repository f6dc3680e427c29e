"""A task that is trained by several processes together, each on its part of every batch."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from ormo_runtime.process import leave_if_asked
from ormo_worker.errors import GroupBroken, OptionRefused
from ormo_worker.processes import Place
from ormo_worker.pytorch.ranks import broken
from ormo_worker.tasks import Task


def own_device(name: str, place: Place | None) -> str:
    """Which of the machine's devices is this process's, where all of them were told the same.

    Raises:
        OptionRefused: one GPU is named for all of a worker's processes.
    """
    if place is None or name == "cpu":
        return name
    if ":" in name:
        raise OptionRefused(
            f"--device is {name} for {place.ranks} processes: give --device cuda, and each takes the GPU of its number"
        )
    return f"cuda:{place.local_rank}" if name == "cuda" or torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def joined(place: Place | None, device: torch.device) -> Iterator[Any]:
    """The process group of a worker's processes, of NCCL or, on the CPU, of gloo; None where there is only one.

    Raises:
        GroupBroken: another of them has ended.
    """
    if place is None:
        yield None
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, init_method=place.rendezvous, rank=place.rank, world_size=place.ranks)
        yield dist.group.WORLD
    except (GroupBroken, RuntimeError) as error:
        leave_if_asked()  # the others may have been told to leave a moment sooner
        if isinstance(error, GroupBroken) or not _is_of_the_group(error):
            raise
        raise broken(place.rank, place.ranks, error) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Reduced(nn.Module):
    """A task's loss as a module, so that DistributedDataParallel sees all that is done with the model.

    Args:
        task: whose loss it is; it is given the model itself, and may call any of its methods.
        model: that is trained.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._task = task

    @override
    def forward(self, batch: Any) -> Tensor:
        """The loss of this process's part of a batch."""
        return self._task.loss(self.model, batch)

    @classmethod
    def over(cls, group: Any, task: Task, model: nn.Module) -> nn.Module:
        """The same, with gradients that are the mean over all processes of the group."""
        # Some parameters may get no gradient, as in a worker that is one process.
        return DistributedDataParallel(cls(task, model), process_group=group, find_unused_parameters=True)


def _is_of_the_group(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)  # gloo's have no class of their own
