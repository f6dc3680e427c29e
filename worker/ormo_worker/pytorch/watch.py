"""What a training loop does that means something else here than with another optimizer, said once for each tensor."""

import logging
import time
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import accumulate
from operator import attrgetter
from typing import Literal

import torch
from torch import Tensor

from ormo_worker.errors import ModelUnusable, OptionRefused, ParametersChanged
from ormo_worker.pytorch.devices import Arriving, length_of
from ormo_worker.pytorch.ranks import refuse_silent_group
from ormo_worker.pytorch.transfer import Staging, Transfer

OnLocalChange = Literal["warn", "error"]

_LOG = logging.getLogger(__name__)
_SHOWN_NAMES = 3
# In a mixture of experts each step may have tensors of its own to name, for a while.
_SECONDS_BETWEEN_LINES = 10.0
_NO_GRADIENT = (
    "there is no longer a gradient for %s, which had one in an earlier step: it is treated as zero, as in "
    "DistributedDataParallel, so momentum still moves the parameter. To keep a layer as it is, freeze it before the "
    "run begins"
)
_CHANGED = (
    "the program changed %s since the last step, and each step loads the server's parameters over that. Put a "
    "constraint into the forward pass (torch.nn.utils.parametrize); for a run that begins with other weights load them "
    "before RemoteOptimizer is made, or start ormo-server with --model"
)
_FROZEN_CHANGED = (
    "the program changed %s, which is frozen in this run; other workers and checkpoints keep the server's values. "
    "Load what is frozen before RemoteOptimizer is made, and into the model of the worker that begins the "
    "run"
)
# What to do about a parameter that is to be trained and was not when the run began, or the other way round.
FIXED = (
    "which parameters are trained is fixed when the optimizer is created. Before that, have all of them require "
    "gradients and put them in params=; or load the last checkpoint's model.safetensors into the model and begin a new "
    "run with it, in another --directory"
)


class Watch:
    """Looks at the model before each of its gradients is pushed; for the training thread.

    Args:
        staging: the model's tensors, and the way to look at those on a device without waiting for it.
        given: the parameters that the optimizer has in its groups.
        on_local_change: what is done about parameters that the program has changed.
        alone: whether this process is a worker by itself, and not one of a worker's ranks.

    Attributes:
        loaded: what the model has got last, as long as its payload is as it was; None once a gradient is on its way.
        resting: the frozen parameters that required no gradient, each with its name and whether it is in a group.

    Raises:
        OptionRefused: `on_local_change` is neither "warn" nor "error".
    """

    def __init__(
        self, staging: Staging, given: Collection[Tensor], on_local_change: OnLocalChange, *, alone: bool = True
    ) -> None:
        if on_local_change not in ("warn", "error"):
            raise OptionRefused(f"on_local_change is {on_local_change!r}: expected 'warn' or 'error'")
        self._raises = on_local_change == "error"
        specs = staging.tensors.manifest.tensors
        self._names = [spec.name for spec in specs if spec.section == "parameters" and not spec.alias_of]
        self._parameters = staging.tensors.parameters
        self.resting = [
            (name, parameter, parameter in given)
            for name, parameter in staging.tensors.named_frozen()
            if not parameter.requires_grad
        ]
        # Once more with the first gradient: a trainer wraps the model after the optimizer was made for it.
        self._may_have_silent_ranks = alone
        self._had_gradient: set[str] = set()
        self._changes = LocalChanges(self._names, self._parameters, staging.fetch)
        self.loaded: Transfer | None = None
        self._has_frozen = bool(staging.tensors.frozen)
        self._frozen_changes = LocalChanges(*_columns(staging.tensors.named_frozen()), staging.fetch)
        self._missing, self._changed = Notice(_NO_GRADIENT), Notice(_CHANGED)
        self._frozen_changed = Notice(_FROZEN_CHANGED)

    def note_loaded(self, transfer: Transfer) -> None:
        """The model has these parameters now: what is other at the next gradient was changed by the program."""
        self.loaded = transfer
        self._changes.note_loaded()
        if transfer.payload.layout.frozen:
            self._frozen_changes.note_loaded()

    def refuse_unfrozen(self) -> None:
        """Parameters that no gradient goes out of must not look as if they were trained.

        Raises:
            ModelUnusable: one of them is not frozen any more.
        """
        for name, parameter, given in self.resting:
            # The gradient of one that is in no group is nobody's, and may have been there before.
            if parameter.requires_grad or (given and _moves(parameter.grad)):
                what = "requires a gradient" if parameter.requires_grad else "has a gradient"
                raise ModelUnusable(f"the parameter {name!r} {what}, and was frozen when the run began: {FIXED}")

    def check(self, decays: Sequence[float | None]) -> None:
        """Look for parameters that the program has changed, and for gradients that are missing.

        Args:
            decays: the weight decay of each parameter, in the model's order; None for one that is not trained.

        Raises:
            ModelUnusable: a parameter has another shape.
            ParametersChanged: some have changed, and an error is wanted for that.
            OptionRefused: the model is in a DistributedDataParallel, whose ranks are not known to be one worker.
        """
        self._refuse_silent_ranks()
        if self.loaded is not None:
            self._check_shapes(self.loaded)
            self._find_changes(self.loaded)
            self._find_frozen_changes()
        missing = []
        for name, parameter, decay in zip(self._names, self._parameters, decays, strict=True):
            if decay is not None and parameter.grad is not None:
                self._had_gradient.add(name)
            elif decay is not None and name in self._had_gradient:
                missing.append(name)
        if missing or self._missing.unsaid:
            self._missing.note(missing)
        self.loaded = None  # once the gradient is on its way, what comes may overwrite the values that were loaded

    def check_local(self) -> None:
        """As `check`, before moves are pushed: whatever the program does to trained parameters is one of them.

        Raises:
            ModelUnusable: a parameter has another shape.
            ParametersChanged: frozen ones have changed, and an error is wanted for that.
            OptionRefused: as for `check`.
        """
        self._refuse_silent_ranks()
        if self.loaded is not None:
            self._check_shapes(self.loaded)
        self._find_frozen_changes()

    def _refuse_silent_ranks(self) -> None:
        if self._may_have_silent_ranks:
            refuse_silent_group(self._parameters)
            self._may_have_silent_ranks = False

    def _check_shapes(self, loaded: Transfer) -> None:
        for name, parameter, value in zip(self._names, self._parameters, loaded.values, strict=True):
            if parameter.shape != value.shape:
                raise ModelUnusable(
                    f"the parameter {name!r} now has the shape {tuple(parameter.shape)}, and the run has it as "
                    f"{tuple(value.shape)}: begin a new run, in another --directory, with a model of other shapes"
                )

    def _find_changes(self, loaded: Transfer) -> None:
        changed = self._changes.find(loaded.values, self._changed.named)
        if changed or self._changed.unsaid:
            self._tell(self._changed, changed)

    def _find_frozen_changes(self) -> None:
        if self._has_frozen:
            self._tell(self._frozen_changed, self._frozen_changes.find(None, self._frozen_changed.named))

    def _tell(self, notice: "Notice", changed: list[str]) -> None:
        if changed and self._raises:
            raise ParametersChanged(notice.sentence % listed(changed))
        notice.note(changed)

    def flush(self) -> None:
        """Say what was put off."""
        self._missing.flush()
        self._changed.flush()
        self._frozen_changed.flush()


def _moves(gradient: Tensor | None) -> bool:
    """Whether another optimizer would use it: zeros are what `zero_grad(set_to_none=False)` leaves of an old one."""
    return gradient is not None and (gradient.is_sparse or bool(gradient.any()))


class Notice:
    """A warning that names each tensor once.

    Args:
        sentence: the warning, with one %s for the names.

    Attributes:
        sentence: as given.
        named: the tensors of which it was, or is about to be, said.
        unsaid: those of which it is about to be.
    """

    def __init__(self, sentence: str) -> None:
        self.named: set[str] = set()
        self.sentence = sentence
        self.unsaid: list[str] = []
        self._said_at = float("-inf")

    def note(self, names: Iterable[str]) -> None:
        """Say it of those that it was not said of, at once or together with the next few."""
        new = [name for name in names if name not in self.named]
        self.named.update(new)
        self.unsaid += new
        if time.monotonic() - self._said_at >= _SECONDS_BETWEEN_LINES:
            self.flush()

    def flush(self) -> None:
        """Say what was put off."""
        if self.unsaid:
            _LOG.warning(self.sentence, listed(self.unsaid))
            self.unsaid.clear()
            self._said_at = time.monotonic()


def listed(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(names) - _SHOWN_NAMES
    return ", ".join(map(repr, names[:_SHOWN_NAMES])) + (f" and {more} more" if more > 0 else "")


def _columns(named: Iterable[tuple[str, Tensor]]) -> tuple[list[str], list[Tensor]]:
    rows = list(named)
    return [name for name, _ in rows], [tensor for _, tensor in rows]


# What changes, with the address, if a tensor does, by all ways but `.data`; it has no public name.
_VERSION = attrgetter("_version")
_SAMPLE = 64  # elements of each tensor: they find all but small changes, and cost little beside loading the tensor


class LocalChanges:
    """Finds parameters that are no longer as they were loaded.

    A tensor's version tells of what is done to it in place, and its address of other memory in its place; whether its
    values are other ones, too, is then seen by comparing all of them, for a program may well put back what it took.
    Neither tells of what is written through `.data`: for that some elements of each tensor, always the same ones, are
    compared in each step. That is one operation for all tensors of a device. Nobody waits for a GPU's answer: it is
    taken when it is there, one step later or a few.

    Args:
        names: the parameters' names, for what is found.
        parameters: the module's own objects, in the order of the names.
        fetch: gets a tensor from its device.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[Tensor], fetch: Callable[[Tensor], Arriving]) -> None:
        self._names = names
        self._parameters = parameters
        self._fetch = fetch
        self._versions: list[int] = []
        self._addresses: list[int] = []
        self._samples: list[_Samples] = []
        self._asked: deque[tuple[_Samples, Arriving]] = deque()

    @torch.no_grad()
    def note_loaded(self) -> None:
        """The parameters are now as they are meant to be."""
        addresses = list(map(Tensor.data_ptr, self._parameters))
        self._versions = list(map(_VERSION, self._parameters))
        if addresses != self._addresses:
            self._addresses = addresses
            self._samples = list(self._draw())
        for samples in self._samples:
            samples.note()

    @torch.no_grad()
    def find(self, loaded: Sequence[Tensor] | None, known: Collection[str]) -> list[str]:
        """The names of those that have changed since.

        Args:
            loaded: the values that they should have, in any floating dtype; None where these are not kept: then some
                elements must do, and the address.
            known: names that need not be found again.
        """
        for samples in self._samples:
            differing = samples.compare()
            if differing is not None:
                self._asked.append((samples, self._fetch(differing)))
        found = set(self._collect_answers()) if self._asked else set()
        # There are no marks before the first loading.
        rows = zip(self._names, self._parameters, self._versions, self._addresses, strict=False)
        if loaded is None:
            found.update(name for name, parameter, _, address in rows if parameter.data_ptr() != address)
        else:
            for (name, parameter, version, address), value in zip(rows, loaded, strict=False):
                unmarked = parameter._version == version and parameter.data_ptr() == address  # noqa: SLF001
                if unmarked or name in known or name in found:
                    continue
                if not torch.equal(parameter, value.to(parameter)):
                    found.add(name)
        return [name for name in self._names if name in found and name not in known] if found else []

    def _collect_answers(self) -> Iterator[str]:
        while self._asked and self._asked[0][1].is_here():
            samples, answer = self._asked.popleft()
            yield from samples.names(answer.wait())

    def _draw(self) -> "Iterator[_Samples]":
        views: defaultdict[torch.device, dict[str, Tensor]] = defaultdict(dict)
        for name, parameter in zip(self._names, self._parameters, strict=True):
            if parameter.numel():
                views[parameter.device][name] = _sample(parameter.detach())
        return map(_Samples, views.values())


class _Samples:
    """Some elements of all tensors on one device.

    Args:
        views: the elements of each tensor, in its memory, by the tensor's name.
    """

    def __init__(self, views: dict[str, Tensor]) -> None:
        self._names = list(views)
        self._views = list(views.values())
        self._ends = list(accumulate(view.numel() for view in self._views))
        self._noted = torch.cat(self._views)

    def note(self) -> None:
        """They are now as they are meant to be."""
        torch.cat(self._views, out=self._noted)

    def compare(self) -> Tensor | None:
        """Which elements are not as noted; shape (all of them,), bool. None for none, where that is soon known."""
        now = torch.cat(self._views)
        if now.device.type == "cpu" and torch.equal(now, self._noted):
            return None
        return now != self._noted

    def names(self, differing: Tensor) -> Iterator[str]:
        """Of the tensors that have such elements, once for each."""
        return (self._names[bisect_right(self._ends, at)] for at in differing.nonzero().flatten().tolist())


def _sample(tensor: Tensor) -> Tensor:
    """A view of some elements, in one dimension: spread evenly over its memory, or its diagonal if that has gaps."""
    if length_of(tensor) == tensor.nbytes:
        step = -(-tensor.numel() // _SAMPLE)
        return tensor.as_strided((-(-tensor.numel() // step),), (step,))
    return tensor.as_strided((min(_SAMPLE, *tensor.shape),), (sum(tensor.stride()),))
