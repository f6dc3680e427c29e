"""What a training loop does that means something else here than with another optimizer, said once for each tensor."""

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor

from ormo_worker.client.errors import ModelUnusable, OptionRefused, ParametersChanged
from ormo_worker.local_changes import LocalChanges
from ormo_worker.transfer import Staging, Transfer

OnLocalChange = Literal["warn", "error"]

_LOG = logging.getLogger(__name__)
_SHOWN_NAMES = 3
# In a mixture of experts each step may have tensors of its own to name, for a while.
_SECONDS_BETWEEN_LINES = 10.0
_NO_GRADIENT = (
    "no gradient any more for %s, which had one in an earlier step: it counts as zero, as in DistributedDataParallel, "
    "so momentum still moves the parameter. To keep a layer as it is, freeze it before the run begins"
)
_CHANGED = (
    "the program changed %s since the last step, and each step loads the server's parameters over that. Put a "
    "constraint into the forward pass (torch.nn.utils.parametrize); for a run that begins with other weights load them "
    "before RemoteOptimizer is made, or start ormo-server with --model"
)
_FROZEN_CHANGED = (
    "the program changed %s, frozen in this run, since the server's values came: the other workers and the checkpoints "
    "have those. Load what is frozen before RemoteOptimizer is made, and into the model of the worker that begins the "
    "run"
)


class Watch:
    """Looks at the model before each of its gradients is pushed.

    Args:
        staging: of the model.
        on_local_change: what is done about parameters that the program has changed.

    Raises:
        OptionRefused: that is neither "warn" nor "error".
    """

    def __init__(self, staging: Staging, on_local_change: OnLocalChange) -> None:
        if on_local_change not in ("warn", "error"):
            raise OptionRefused(f"on_local_change is {on_local_change!r}: expected 'warn' or 'error'")
        self._raises = on_local_change == "error"
        specs = staging.tensors.manifest.tensors
        self._names = [spec.name for spec in specs if spec.section == "parameters" and not spec.alias_of]
        self._parameters = staging.tensors.parameters
        self._had_gradient: set[str] = set()
        self._changes = LocalChanges(self._names, self._parameters, staging.fetch)
        self._loaded: Transfer | None = None
        self._frozen_changes = LocalChanges(*_columns(staging.tensors.named_frozen()), staging.fetch)
        self._missing, self._changed = Notice(_NO_GRADIENT), Notice(_CHANGED)
        self._frozen_changed = Notice(_FROZEN_CHANGED)

    def loaded(self, transfer: Transfer) -> None:
        """These parameters were loaded."""
        self._loaded = transfer
        self._changes.loaded()
        if transfer.payload.layout.frozen:
            self._frozen_changes.loaded()

    def gradients(self, decays: Sequence[float | None]) -> None:
        """Look for those that are missing.

        Args:
            decays: of each parameter; None for one that is not trained.
        """
        missing = []
        for name, parameter, decay in zip(self._names, self._parameters, decays, strict=True):
            if decay is not None and parameter.grad is not None:
                self._had_gradient.add(name)
            elif decay is not None and name in self._had_gradient:
                missing.append(name)
        self._missing.of(missing)

    def parameters(self) -> None:
        """Look for those that the program has changed.

        Raises:
            ModelUnusable: one has another shape.
            ParametersChanged: there are some, and that is wanted.
        """
        if self._loaded is None:
            return
        for name, parameter, value in zip(self._names, self._parameters, self._loaded.values, strict=True):
            if parameter.shape != value.shape:
                raise ModelUnusable(
                    f"the parameter {name!r} has got the shape {tuple(parameter.shape)}, and the run has it as "
                    f"{tuple(value.shape)}: begin a new run, in another --directory, with a model of other shapes"
                )
        self._say(self._changed, self._changes.found(self._loaded.values, self._changed.named))
        self._say(self._frozen_changed, self._frozen_changes.found(None, self._frozen_changed.named))

    def _say(self, notice: "Notice", changed: list[str]) -> None:
        if changed and self._raises:
            raise ParametersChanged(notice.sentence % listed(changed))
        notice.of(changed)

    def given(self) -> None:
        """A gradient is on its way: what comes next may take the place of the values that were loaded."""
        self._loaded = None

    def end(self) -> None:
        """Say what was put off."""
        self._missing.end()
        self._changed.end()
        self._frozen_changed.end()


class Notice:
    """A warning that names each tensor once.

    Args:
        sentence: with one %s, for the names.

    Attributes:
        sentence: as given.
        named: the tensors of which it was, or is about to be, said.
    """

    def __init__(self, sentence: str) -> None:
        self.named: set[str] = set()
        self.sentence = sentence
        self._unsaid: list[str] = []
        self._said_at = float("-inf")

    def of(self, names: Iterable[str]) -> None:
        """Say it of those that it was not said of, at once or together with the next few."""
        new = [name for name in names if name not in self.named]
        self.named.update(new)
        self._unsaid += new
        if time.monotonic() - self._said_at >= _SECONDS_BETWEEN_LINES:
            self.end()

    def end(self) -> None:
        """Say what was put off."""
        if self._unsaid:
            _LOG.warning(self.sentence, listed(self._unsaid))
            self._unsaid.clear()
            self._said_at = time.monotonic()


def _columns(named: Iterable[tuple[str, Tensor]]) -> tuple[list[str], list[Tensor]]:
    rows = list(named)
    return [name for name, _ in rows], [tensor for _, tensor in rows]


def listed(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(names) - _SHOWN_NAMES
    return ", ".join(map(repr, names[:_SHOWN_NAMES])) + (f" and {more} more" if more > 0 else "")
