"""How an optimizer's part in a run ends: it is closed or forgotten, or another takes its place."""

import logging
import sys
import weakref
from typing import NamedTuple, Protocol

from torch import nn

from ormo_worker.metrics import Exporter
from ormo_worker.pytorch.local_steps import LocalSteps
from ormo_worker.pytorch.parts import Client
from ormo_worker.pytorch.pipeline import Pipeline

_LOG = logging.getLogger(__name__)

# A gradient that was computed is worth delivering, but whoever stops a worker kills it soon: most give it 10 seconds.
SETTLE_SECONDS = 5.0
# By plain model and server, for one that is made again, as by a cell of a notebook. Weak in both, or neither the model
# nor the place in the run would ever be let go.
_made: "weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[Closable]]]" = weakref.WeakKeyDictionary()


class Closable(Protocol):
    """An optimizer that has a part in a run."""

    finished: bool

    @property
    def left(self) -> bool:
        """Whether it has left the run."""

    def close(self) -> None:
        """Leave the run."""


class _Made(NamedTuple):
    """Where an optimizer was made in a notebook.

    Attributes:
        server: that it has joined.
        cell: which one: its id, or its text where the notebook does not tell.
        run: the number that the notebook gave to that run of it.
    """

    server: str
    cell: str
    run: int


_made_by_cells: "weakref.WeakKeyDictionary[Closable, _Made]" = weakref.WeakKeyDictionary()


def close_older(model: nn.Module, server: str) -> None:
    """Close what was last made for this model and server, or by an earlier run of this cell of a notebook.

    Such a cell makes its model anew, too. What it has made before would stay a member: `optimizer` is bound to the new
    one only once that has joined, which under the synchronous scheduler waits for the old one, and IPython's `Out` or
    the traceback of an interrupted cell hold it for longer.
    """
    remembered = _made.get(model, {}).get(server)
    older = None if remembered is None else remembered()
    if older is not None:
        older.close()
    here = _running_cell(server)
    if here is not None:
        _close_of_earlier_runs(here)


def _close_of_earlier_runs(here: _Made) -> None:
    there = [(each, made) for each, made in list(_made_by_cells.items()) if not each.left]
    for optimizer, made in there:
        if made.cell == here.cell and made.run != here.run:
            if not optimizer.finished:
                _LOG.warning(
                    "the optimizer that an earlier run of this cell made is closed, and has left the run at %s: to "
                    "have several workers, make each in a cell of its own",
                    made.server,
                )
            optimizer.close()
    others = [each for each, made in there if made.server == here.server and not (each.left or each.finished)]
    if any(_made_by_cells[each].run != here.run for each in others):
        _LOG.warning(
            "other cells of this notebook have %d optimizer(s) in the run at %s: each is a worker, and counts in K "
            "until its close() is called",
            len(others),
            here.server,
        )


def remember(optimizer: Closable, model: nn.Module, server: str) -> None:
    """Have `close_older` find it."""
    _made.setdefault(model, {})[server] = weakref.ref(optimizer)
    here = _running_cell(server)
    if here is not None:
        _made_by_cells[optimizer] = here


def _running_cell(server: str) -> _Made | None:
    """The cell that runs; None outside of IPython."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return None
    try:
        return _Made(server, str(shell.get_parent()["metadata"]["cellId"]), shell.execution_count)
    except (AttributeError, KeyError, TypeError):  # IPython in a terminal, or a notebook that names no cells
        typed = shell.user_ns.get("In") or [""]
        return _Made(server, typed[-1], shell.execution_count)


def leave(pipeline: Pipeline, client: Client, exporter: Exporter, local: LocalSteps | None) -> None:
    """Push what is left, wait a little for what is under way, and leave the run; from any thread."""
    if client.inherited:  # a fork that ends must not leave in the name of its parent
        return
    # In this order: gradients under way are worth some seconds, the connection ends the calls that slots' threads wait
    # in, and only then is there no thread that would be waited for in vain.
    try:
        if local is not None:
            local.finish()
        pipeline.settle(SETTLE_SECONDS)
    finally:  # an interrupted wait ends the rest all the sooner
        client.close()
        pipeline.stop()
        exporter.close()
