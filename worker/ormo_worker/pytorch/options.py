"""What a `RemoteOptimizer` may be given, with a sentence for what only another optimizer can do.

Its parameter groups can scale the weight decay, and nothing else.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from ormo_protos.manifest import BFLOAT16, FLOAT32, INT8
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker.client.arguments import address, real_number
from ormo_worker.errors import OptionRefused

SCALE = "weight_decay_scale"
_ALLOWED = ("params", "param_names", SCALE)
_NO_SCHEDULER = (
    "start ormo-server with --learning-rate and --schedule, and use no learning-rate scheduler of torch but for "
    "optimizers given as inner=; where a trainer wants one, give it ormo_worker.ServerSchedule(optimizer)"
)
# For those who bring a group, a scheduler, or a whole line, from another optimizer.
_INSTEAD = {
    "lr": _NO_SCHEDULER,
    "initial_lr": _NO_SCHEDULER,
    "momentum": "start ormo-server with --momentum",
    "weight_decay": f"start ormo-server with --weight-decay, which a group may scale by {SCALE!r}, 0 for none",
} | dict.fromkeys(
    ("alpha", "amsgrad", "betas", "centered", "dampening", "decoupled_weight_decay", "eps", "nesterov", "rho"),
    "choose how parameters are updated with ormo-server's --method, or give an optimizer of torch as inner=",
)
_LEFT_OUT = {"maximize": "give the loss the other sign"} | dict.fromkeys(
    ("capturable", "differentiable", "foreach", "fused"), "the server updates the parameters, so leave it out"
)
OPTIONS_OF_TORCH = frozenset(_INSTEAD | _LEFT_OUT)
_WIRE_DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}


class ParameterGroup(dict[str, Any]):
    """One of an optimizer's `param_groups`, which has a sentence for options that the server decides.

    Of those it shows `lr`, the learning rate in force when the model's parameters were sent; 0 before the first came.

    Raises:
        OptionRefused: on setting or bringing along that or any other option, and on reading any other.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.show_rate(0.0)
        self.update(options)

    def show_rate(self, learning_rate: float) -> None:
        """Have `lr` be this one."""
        super().__setitem__("lr", learning_rate)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return dict, (dict(self),)  # nobody trains by a copy

    def __missing__(self, option: str) -> Any:
        raise refused_option(option)

    def __setitem__(self, option: str, value: Any) -> None:
        if option not in _ALLOWED:
            raise refused_option(option)
        super().__setitem__(option, _check_scale(value) if option == SCALE else value)

    def setdefault(self, option: str, default: Any = None) -> Any:
        """As for any dict, for an allowed option."""
        if option not in self:
            self[option] = default
        return self[option]

    def update(self, *options: Any, **more: Any) -> None:
        """As for any dict, for allowed options."""
        for option, value in dict(*options, **more).items():
            self[option] = value


def decay_groups(model: nn.Module, scale: Callable[[str, nn.Parameter], float]) -> list[dict[str, Any]]:
    """The model's parameters in groups, one for each factor on the weight decay.

    Args:
        model: the module whose parameters they are.
        scale: gives the factor for a parameter and its name, as `Task.weight_decay_scale` does.
    """

    def factor(item: tuple[str, nn.Parameter]) -> float:
        return scale(*item)

    ordered = sorted(model.named_parameters(), key=factor)
    return [{"params": list(alike), SCALE: shared} for shared, alike in groupby(ordered, key=factor)]


def decays(
    groups: Iterable[Mapping[str, Any]], parameters: Sequence[Tensor], weight_decay: float
) -> list[float | None]:
    """The weight decay of each parameter; None for those that are in no group, and so are not trained.

    Args:
        groups: each with the parameters themselves in `params`.
        parameters: the model's; the decays come in their order.
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


def check_model_and_server(model: object, server: object, others: Iterable[str]) -> None:
    """Have a sentence for who puts a `RemoteOptimizer` in the place of another optimizer, arguments and all.

    Args:
        model: the first argument, where other optimizers have parameters.
        server: the second, where some have a learning rate.
        others: names of arguments that `RemoteOptimizer` has not.

    Raises:
        OptionRefused: the model is no module, the server no HOST:PORT, or an option is the server's.
        TypeError: no optimizer has such an argument.
    """
    if not isinstance(model, nn.Module):
        raise OptionRefused(
            f"the model is a {type(model).__name__}: expected the torch.nn.Module itself, as in RemoteOptimizer(model, "
            "'HOST:PORT'); say with params= which of its parameters are trained"
        )
    for option in others:
        if option in OPTIONS_OF_TORCH:
            raise refused_option(option)
        raise TypeError(f"RemoteOptimizer() got an unexpected keyword argument {option!r}")
    address("server", server, lowest_port=1)


def wire_dtype_of(dtype: torch.dtype, *, local_steps: bool) -> pb.Dtype.ValueType:
    """The contract's number for a dtype in which gradients can travel.

    Raises:
        OptionRefused: they can't travel in this one, or only the sums of local steps can.
    """
    if dtype not in _WIRE_DTYPES:
        raise OptionRefused(
            f"wire_dtype is {dtype}: expected torch.float32 or torch.bfloat16, or torch.int8 with inner="
        )
    if dtype == torch.int8 and not local_steps:
        raise OptionRefused(
            "wire_dtype is torch.int8, which is for the sums of local steps: give an inner optimizer with inner= "
            "(--inner), or use torch.bfloat16"
        )
    return _WIRE_DTYPES[dtype]


def _check_scale(value: Any) -> float:
    scale = real_number(repr(SCALE), value)
    if not (math.isfinite(scale) and scale >= 0):
        raise OptionRefused(f"{SCALE!r} is {value!r}: expected a finite number, at least 0")
    return scale
