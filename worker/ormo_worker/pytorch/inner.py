"""The optimizers of torch that a worker makes its local steps with: what they may be, and when they may step."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ormo_worker.errors import OptionRefused, OrmoError

Optimizer = torch.optim.Optimizer
_EXPECTED = "expected a torch.optim optimizer, or a list of them that together have each parameter once"


class Inner:
    """One optimizer or several, which step together and on nobody else's call.

    Args:
        given: an optimizer, or some.
        model: whose parameters they have.
        trained: those of its parameters that are trained in this run, in some order.

    Attributes:
        optimizers: as given.

    Raises:
        OptionRefused: they are none; they have a parameter twice, or one that is not the model's or not trained; or one
            of them needs a closure that it may call several times.
    """

    def __init__(self, given: object, model: nn.Module, trained: Iterable[Tensor]) -> None:
        self.optimizers = _optimizers(given)
        _check_parameters(self.optimizers, model, set(trained))
        # Nearly always nothing: few have a state before their first step.
        self._fresh = [{key: copy.deepcopy(state) for key, state in each.state.items()} for each in self.optimizers]
        self._steps = False
        self._hooks: list[RemovableHandle] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all, one after the other: the very ones, as they are now."""
        # Not kept: `load_state_dict` of one of them puts others in their place.
        return [group for each in self.optimizers for group in each.param_groups]

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """What all of them keep for each parameter."""
        merged: defaultdict[Tensor, Any] = defaultdict(dict)
        for each in self.optimizers:
            merged.update(each.state)
        return merged

    @property
    def parameters(self) -> set[Tensor]:
        """All parameters that any of them moves, as of now."""
        return {parameter for group in self.param_groups for parameter in group["params"]}

    def take_over(self) -> None:
        """From now on nobody else may call their `step`."""
        # A hook of torch's, and not another method in the place of `step`: schedulers put theirs there.
        self._hooks = [each.register_step_pre_hook(self._refuse_others) for each in self.optimizers]

    def step(self) -> None:
        """Have each of them make one step.

        Raises:
            Exception: whatever one of them raises.
        """
        self._steps = True
        try:
            for each in self.optimizers:
                each.step()
        finally:
            self._steps = False

    def reset(self) -> None:
        """Forget what they have gathered, such as moments: as they were when this was made."""
        for each, fresh in zip(self.optimizers, self._fresh, strict=True):
            each.state.clear()
            each.state.update({key: copy.deepcopy(state) for key, state in fresh.items()})

    def state_dict(self) -> dict[str, Any]:
        """That of the one optimizer; of several, all in order under `inner`."""
        states = [each.state_dict() for each in self.optimizers]
        return states[0] if len(states) == 1 else {"inner": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            OptionRefused: it is that of another number of optimizers.
        """
        states = state.get("inner", [state])
        if len(states) != len(self.optimizers):
            raise OptionRefused(
                f"the state is that of {len(states)} inner optimizers, and there are {len(self.optimizers)}: create "
                "them as when it was saved"
            )
        for each, own in zip(self.optimizers, states, strict=True):
            each.load_state_dict(own)

    def release(self) -> None:
        """Let others call their `step` again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _refuse_others(self, *_: object) -> None:
        if not self._steps:
            raise OrmoError(
                "step() of the inner optimizer was called: call step() of the RemoteOptimizer, which has it step and "
                "counts that; to train on without a server, close() the RemoteOptimizer first"
            )


def _optimizers(given: object) -> tuple[Optimizer, ...]:
    several = given if isinstance(given, list | tuple) else [given]
    for each in several:
        if not isinstance(each, Optimizer):
            raise OptionRefused(f"inner is, or has in it, a {type(each).__name__}: {_EXPECTED}")
        closure = inspect.signature(type(each).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise OptionRefused(
                f"inner is a {type(each).__name__}, which calls its closure several times in a step: choose an "
                "optimizer that makes a step of one gradient"
            )
    if not several:
        raise OptionRefused(f"inner is an empty list: {_EXPECTED}")
    return tuple(cast(list[Optimizer], several))


def _check_parameters(optimizers: tuple[Optimizer, ...], model: nn.Module, trained: set[Tensor]) -> None:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    seen: set[Tensor] = set()
    for optimizer in optimizers:
        for parameter in (one for group in optimizer.param_groups for one in group["params"]):
            if parameter not in names:
                raise OptionRefused(
                    f"a parameter of shape {tuple(parameter.shape)} in inner is not one of the model's: make the inner "
                    "optimizer from the parameters of the model that RemoteOptimizer is given"
                )
            if parameter in seen:
                raise OptionRefused(f"inner has the parameter {names[parameter]!r} twice: {_EXPECTED}")
            if parameter.requires_grad and parameter not in trained:
                raise OptionRefused(
                    f"inner has the parameter {names[parameter]!r}, which params= leaves out, so that it is frozen: "
                    "leave it out of both or of none"
                )
            seen.add(parameter)
