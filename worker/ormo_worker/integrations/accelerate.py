"""A loop with accelerate as a worker."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from typing_extensions import override

from ormo_worker.integrations.steps import StepFigures
from ormo_worker.pytorch.optimizer import RemoteOptimizer


def prepare(accelerator: Accelerator, optimizer: RemoteOptimizer) -> "PreparedOptimizer":
    """What `accelerator.prepare` does with an optimizer, so that the result is a `RemoteOptimizer` in all but type.

    Args:
        accelerator: saves and loads its state from now on.
        optimizer: of a model that is on the accelerator's device already.
    """
    prepared = PreparedOptimizer(optimizer, accelerator.device_placement, accelerator.scaler)
    accelerator.prepare_optimizer(prepared)
    return prepared


class PreparedOptimizer(AcceleratedOptimizer):
    """Has all that a `RemoteOptimizer` has, such as `finished`, and steps as often as accelerate's wrapper does.

    Args:
        optimizer: the one that steps.
        device_placement: as accelerate's wrapper takes it.
        scaler: likewise.
    """

    _is_accelerate_prepared = True  # so that accelerate takes it as it is

    def __init__(self, optimizer: RemoteOptimizer, device_placement: bool, scaler: Any) -> None:
        super().__init__(optimizer, device_placement=device_placement, scaler=scaler)
        self._figures = StepFigures()

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there before `__init__`
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __enter__(self) -> "PreparedOptimizer":
        return self

    def __exit__(self, *_: object) -> None:
        self.optimizer.close()

    @override
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        samples: float | Tensor | None = None,
        loss: float | Tensor | None = None,
    ) -> None:
        """Step, or do nothing while accelerate accumulates gradients: samples add up, and the losses' mean is shown.

        Args:
            closure: computes loss and gradients.
            samples: how many this mini-batch had; `batch_size` for all of them by default.
            loss: this mini-batch's mean.

        Raises:
            RunFinished, OrmoError: as `RemoteOptimizer.step`.
        """
        self._figures.add(samples=samples, loss=loss)
        if self.gradient_state.sync_gradients:
            self._figures.hand_to(self.optimizer)
        super().step(closure)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `RemoteOptimizer.load_state_dict`, and put the server's parameters over what `load_state` has loaded.

        Raises:
            OptionRefused: it is the state of another optimizer.
            OrmoError: as `RemoteOptimizer.reload`.
        """
        super().load_state_dict(state_dict)
        self.optimizer.reload()
