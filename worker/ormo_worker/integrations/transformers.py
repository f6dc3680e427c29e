"""`transformers.Trainer` as a worker."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from ormo_worker.integrations.steps import StepFigures, remote_in, samples_in
from ormo_worker.pytorch.optimizer import RemoteOptimizer


class OrmoCallback(TrainerCallback):
    """For the `callbacks` of a `transformers.Trainer` whose optimizer is a `RemoteOptimizer`.

    `train()` returns when the run is over. Each step counts the samples that the model was given, and shows the loss
    that it gave. When the trainer goes on from a checkpoint of its own, it does so at the server's parameters.
    """

    def __init__(self) -> None:
        self._optimizer: RemoteOptimizer | None = None
        self._figures = StepFigures()
        self._summed = False
        self._hook: RemovableHandle | None = None

    @override
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **_: Any,
    ) -> None:
        """Put the server's parameters in the place of a checkpoint's.

        Raises:
            OptionRefused: the trainer has another optimizer.
            OrmoError: as `RemoteOptimizer.reload`.
        """
        self._remove_hook()  # of a train() that failed
        self._optimizer = remote_in(optimizer)
        self._optimizer.quiet_end = True
        self._optimizer.reload()
        self._figures = StepFigures()
        # Nothing else sees both the mini-batch and the loss. A compiled model goes on compiled up to its end.
        note = torch.compiler.disable(self._note_forward)  # type: ignore[no-untyped-call]
        self._hook = model.register_forward_hook(note, with_kwargs=True)

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Say what the step is made of."""
        if self._optimizer is not None:
            self._figures.hand_to(self._optimizer, summed=self._summed)

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the training with the run, as the trainer does at its last step."""
        if self._optimizer is not None and self._optimizer.finished:
            control.should_training_stop = True
            control.should_save = args.save_strategy == IntervalStrategy.STEPS

    @override
    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave model and optimizer as they were."""
        self._remove_hook()
        if self._optimizer is not None:
            self._optimizer.quiet_end = False

    def _note_forward(self, model: nn.Module, given: tuple[Any, ...], named: dict[str, Any], returned: Any) -> None:
        if not model.training:
            return
        loss = returned.get("loss") if isinstance(returned, Mapping) else None
        # The trainer gives the items of all mini-batches of a step to models that divide by them.
        self._summed = named.get("num_items_in_batch") is not None
        self._figures.add(samples=samples_in((given, named)), loss=loss)

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
