"""What the callbacks of all trainers do: find the `RemoteOptimizer`, and say what a step was made of."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ormo_worker.errors import OptionRefused
from ormo_worker.pytorch.optimizer import RemoteOptimizer


def remote_in(optimizer: Any) -> RemoteOptimizer:
    """The `RemoteOptimizer` in the wrappers that a library has put round it.

    Raises:
        OptionRefused: there is none.
    """
    within = optimizer
    while not isinstance(within, RemoteOptimizer):
        if not hasattr(within, "optimizer"):
            raise OptionRefused(
                f"the trainer's optimizer is a {type(within).__name__}: expected a RemoteOptimizer; give it to the "
                "trainer in place of the other, or leave this callback out"
            )
        within = within.optimizer
    return within


def samples_in(batch: Any) -> int | None:
    """The length of the first tensor in a mini-batch, however deep; None if there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if not isinstance(batch, list | tuple):
        return None
    return next((found for found in map(samples_in, batch) if found is not None), None)


class StepFigures:
    """Samples and losses of the mini-batches of which the next step is made, of which there may be several."""

    def __init__(self) -> None:
        self._samples: Any = None
        self._losses: list[Any] = []

    def add(self, *, samples: Any = None, loss: Any = None) -> None:
        """Count a mini-batch, or what is known of it."""
        if samples is not None:
            self._samples = samples if self._samples is None else self._samples + samples
        if loss is not None:
            self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def forget_losses(self) -> None:
        """They were those of another step."""
        self._losses.clear()

    def hand_to(self, optimizer: RemoteOptimizer, *, summed: bool = False) -> None:
        """Say it of the optimizer's next step, and begin anew.

        Args:
            optimizer: the one that is about to step.
            summed: whether the mean is the losses' sum, and not theirs.

        Raises:
            OptionRefused: what was added are no such numbers.
        """
        total = sum(self._losses[1:], self._losses[0]) if self._losses else None
        loss = total if total is None or summed else total / len(self._losses)
        samples = self._samples
        self._samples, self._losses = None, []
        optimizer.note_batch(samples=samples, loss=loss)
