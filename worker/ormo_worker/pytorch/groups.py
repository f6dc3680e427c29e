"""What the conventions of torch call an optimizer's groups and state: its own, or those of the optimizers within it."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from ormo_worker.errors import ModelUnusable, OptionRefused, OrmoError
from ormo_worker.pytorch.inner import Inner
from ormo_worker.pytorch.options import SCALE, ParameterGroup
from ormo_worker.pytorch.watch import FIXED


class Grouped(torch.optim.Optimizer):
    """Groups of its own scale the weight decay and have no state; those of inner optimizers are shown as they are now.

    Args:
        model: whose parameters they are.
        params: parameters, named ones or groups; None for all of the model's.

    Attributes:
        inner: None for groups of its own.

    Raises:
        ModelUnusable: the model has no parameters.
        OptionRefused: a group has an option that the server decides, or a parameter that is not the model's.
    """

    inner: Inner | None = None
    _learning_rate = 0.0  # the server's, as its own groups show it

    def __init__(self, model: nn.Module, params: Iterable[Any] | None) -> None:
        self._own = set(model.parameters())
        if not self._own:
            raise ModelUnusable("the model has no parameters: there is nothing to train")
        self._began = False
        super().__init__(model.parameters() if params is None else params, {SCALE: 1.0})
        self._began = True

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, each with its options; of all inner optimizers, one after the other."""
        return cast(list[dict[str, Any]], self._groups) if self.inner is None else self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = cast(list[ParameterGroup], groups)

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """What inner optimizers keep for each parameter."""
        return self._state if self.inner is None else self.inner.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self._state = state

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """For the groups that it is made with; later there is none to add, for the others are frozen.

        Raises:
            OptionRefused: the group has an option that the server decides, or a parameter that is not the
                model's, or the run has begun.
        """
        if self.inner is not None:
            raise OptionRefused("a group of parameters was added to RemoteOptimizer: add it to the inner optimizer")
        super().add_param_group(ParameterGroup(param_group))
        strangers = [p for p in self.param_groups[-1]["params"] if p not in self._own]
        if strangers:
            self.param_groups.pop()
            raise OptionRefused(
                f"a parameter of shape {tuple(strangers[0].shape)} is not one of the model's: give the optimizer "
                "the model that it belongs to"
            )
        if self._began:
            self.param_groups.pop()
            raise OptionRefused(f"a group of parameters was added after the optimizer was made: {FIXED}")

    @override
    def state_dict(self) -> dict[str, Any]:
        """The groups' options; that of the one inner optimizer, or those of several, in order, under `inner`."""
        if self.inner is not None:
            return self.inner.state_dict()
        state = super().state_dict()
        for group in state["param_groups"]:
            del group["lr"]  # shown, and not to be set
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Momentum and iterations are the server's, and not in it.

        Raises:
            OptionRefused: the state is that of another optimizer.
        """
        if self.inner is not None:
            self.inner.load_state_dict(state_dict)
            return
        for group in state_dict["param_groups"]:
            ParameterGroup(group)  # complains before anything changes
        super().load_state_dict(state_dict)
        self.param_groups = [ParameterGroup(group) for group in self.param_groups]
        self._show_rate(self._learning_rate)

    def _show_rate(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        for group in self._groups:
            group.show_rate(learning_rate)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        # How torch's `load_state_dict` sets both: in the instance's dictionary, where a property is not looked for.
        rest = dict(state)
        self.param_groups, self.state = rest.pop("param_groups"), rest.pop("state")
        super().__setstate__(rest)

    @override
    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Refuse to be copied or pickled.

        Raises:
            OrmoError: always.
        """
        raise OrmoError(
            "a RemoteOptimizer can't be copied or pickled: it is tied to this process. Create one where needed; "
            "state_dict() has the groups' options and the state of inner optimizers, and the server's checkpoints hold "
            "everything else"
        )
