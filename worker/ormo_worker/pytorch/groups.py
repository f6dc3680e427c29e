"""The parameter groups of a `RemoteOptimizer`: they can scale the weight decay, and nothing else."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from ormo_worker.client.arguments import real_number
from ormo_worker.errors import OptionRefused
from ormo_worker.tasks import Task

SCALE = "weight_decay_scale"
_ALLOWED = ("params", "param_names", SCALE)
_NO_SCHEDULER = "start ormo-server with --learning-rate and --schedule, and use no learning-rate scheduler of torch"
# For those who bring a group, a scheduler, or a whole line, from another optimizer.
_INSTEAD = {
    "lr": _NO_SCHEDULER,
    "initial_lr": _NO_SCHEDULER,
    "momentum": "start ormo-server with --momentum",
    "weight_decay": f"start ormo-server with --weight-decay, which a group may scale by {SCALE!r}, 0 for none",
} | dict.fromkeys(
    ("alpha", "amsgrad", "betas", "centered", "dampening", "decoupled_weight_decay", "eps", "nesterov", "rho"),
    "how it updates parameters is said with ormo-server's --method",
)
_LEFT_OUT = {"maximize": "give the loss the other sign"} | dict.fromkeys(
    ("capturable", "differentiable", "foreach", "fused"), "the server updates the parameters, so leave it out"
)
OPTIONS_OF_TORCH = frozenset(_INSTEAD | _LEFT_OUT)


class ParameterGroup(dict[str, Any]):
    """One of an optimizer's `param_groups`, which has a sentence for options that the server decides.

    Raises:
        OptionRefused: on reading, setting or bringing along any other option.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.update(options)

    def __missing__(self, option: str) -> Any:
        raise refused_option(option)

    def __setitem__(self, option: str, value: Any) -> None:
        if option not in _ALLOWED:
            raise refused_option(option)
        super().__setitem__(option, _checked_scale(value) if option == SCALE else value)

    def setdefault(self, option: str, default: Any = None) -> Any:
        """As for any dict, for an allowed option."""
        if option not in self:
            self[option] = default
        return self[option]

    def update(self, *options: Any, **more: Any) -> None:
        """As for any dict, for allowed options."""
        for option, value in dict(*options, **more).items():
            self[option] = value


def decay_groups(task: Task, model: nn.Module) -> list[dict[str, Any]]:
    """The model's parameters in groups with the same factor on the weight decay, as the task wants it."""

    def scale(item: tuple[str, nn.Parameter]) -> float:
        return task.weight_decay_scale(*item)

    ordered = sorted(model.named_parameters(), key=scale)
    return [{"params": list(alike), SCALE: factor} for factor, alike in groupby(ordered, key=scale)]


def decays(
    groups: Iterable[Mapping[str, Any]], parameters: Sequence[Tensor], weight_decay: float
) -> list[float | None]:
    """The weight decay of each parameter; None for those that are in no group, and so are not trained.

    Args:
        groups: each with the parameters themselves in `params`.
        parameters: in the order that the decays are wanted in.
        weight_decay: the server's λ, which the groups scale.
    """
    scaled: dict[Tensor, float] = {}
    for group in groups:
        scaled.update(dict.fromkeys(group["params"], group[SCALE] * weight_decay))
    return list(map(scaled.get, parameters))


def refused_option(option: str) -> OptionRefused:
    """The sentence for an option that a group, or an optimizer, of torch has; it says where that is set instead."""
    if option in _INSTEAD:
        return OptionRefused(f"the option {option!r} is the server's, the same for all workers: {_INSTEAD[option]}")
    if option in _LEFT_OUT:
        return OptionRefused(f"there is no option {option!r}: {_LEFT_OUT[option]}")
    return OptionRefused(
        f"a parameter group has no option {option!r}: the server updates the parameters, and a group may set "
        f"{SCALE!r} alone"
    )


def _checked_scale(value: Any) -> float:
    scale = real_number(repr(SCALE), value)
    if not (math.isfinite(scale) and scale >= 0):
        raise OptionRefused(f"{SCALE!r} is {value!r}: expected a finite number, at least 0")
    return scale
