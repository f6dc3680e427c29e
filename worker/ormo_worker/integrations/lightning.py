"""Lightning's `Trainer` as a worker."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from ormo_worker.errors import OptionRefused
from ormo_worker.integrations.steps import StepFigures, samples_in
from ormo_worker.pytorch.optimizer import RemoteOptimizer


class OrmoCallback(Callback):
    """For the `callbacks` of a Lightning `Trainer` whose module's `configure_optimizers` makes a `RemoteOptimizer`.

    `fit()` returns when the run is over, and leaves it when it returns or fails. Each step counts the samples of its
    mini-batches, and shows their loss. What goes on from a checkpoint of the trainer's does so at the server's
    parameters.
    """

    def __init__(self) -> None:
        self._figures: dict[RemoteOptimizer, StepFigures] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the server's parameters in the place of a checkpoint's.

        Raises:
            OptionRefused: the module has other optimizers.
            OrmoError: as `RemoteOptimizer.reload`.
        """
        ours = [each for each in trainer.optimizers if isinstance(each, RemoteOptimizer)]
        if not ours:
            kinds = ", ".join(type(each).__name__ for each in trainer.optimizers) or "none"
            raise OptionRefused(
                f"the module's optimizers are {kinds}: expected a RemoteOptimizer; have configure_optimizers() make "
                "one, or leave this callback out"
            )
        self._figures = {optimizer: StepFigures() for optimizer in ours}
        for optimizer in ours:
            optimizer.quiet_end = True
            optimizer.reload()
        self._stop_with_the_run(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the mini-batch's samples."""
        for figures in self._figures.values():
            figures.add(samples=samples_in(batch))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss, without the factors that the trainer has given it."""
        shown = loss.detach() * trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for figures in self._figures.values():
            figures.add(loss=shown if scaler is None else shown / scaler.get_scale())

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Say what the step is made of."""
        if isinstance(optimizer, RemoteOptimizer) and optimizer in self._figures:
            self._figures[optimizer].hand_to(optimizer)
        for figures in self._figures.values():
            figures.forget_losses()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the training with the run."""
        self._stop_with_the_run(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the run."""
        self._leave()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the run."""
        self._leave()

    def _stop_with_the_run(self, trainer: Trainer) -> None:
        if any(optimizer.finished for optimizer in self._figures):
            trainer.should_stop = True

    def _leave(self) -> None:
        for optimizer in self._figures:
            optimizer.close()
        self._figures = {}
