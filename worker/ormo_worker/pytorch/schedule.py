"""A scheduler for trainers that want one, where somebody else sets the learning rate."""

from typing import Any

import torch
from typing_extensions import override

from ormo_worker.errors import OptionRefused


class ServerSchedule(torch.optim.lr_scheduler.LRScheduler):
    """Shows the learning rate that is in force, and changes none.

    That is the server's, as `--learning-rate` and `--schedule` have it; with `inner`, the inner optimizer's own.

    Args:
        optimizer: the `RemoteOptimizer`, or what a library has wrapped it in.

    Raises:
        OptionRefused: it is no optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # Not that of torch's: it would note first learning rates in the groups, and put itself round `step`.
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise OptionRefused(
                f"ServerSchedule was given a {type(optimizer).__name__}: expected the RemoteOptimizer whose learning "
                "rate it is to follow"
            )
        self.optimizer = optimizer
        self.base_lrs = self.get_last_lr()
        self.last_epoch = 0
        self._step_count = 1

    @override
    def step(self, epoch: int | None = None) -> None:
        """Count one step."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._step_count += 1

    @override
    def get_last_lr(self) -> list[Any]:
        """The learning rate of each group, as it is now."""
        return [group["lr"] for group in self.optimizer.param_groups]

    @override
    def get_lr(self) -> list[Any]:
        """The same."""
        return self.get_last_lr()
