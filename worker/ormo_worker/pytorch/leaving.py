"""How an optimizer's part in a run ends: it is closed or forgotten, or another takes its place."""

import weakref
from typing import Protocol

from torch import nn

from ormo_worker.metrics import Exporter
from ormo_worker.pytorch.local_steps import LocalSteps
from ormo_worker.pytorch.parts import Client
from ormo_worker.pytorch.pipeline import Pipeline

# A gradient that was computed is worth delivering, but whoever stops a worker kills it soon: most give it 10 seconds.
SETTLE_SECONDS = 5.0
# By plain model and server, for one that is made again, as by a cell of a notebook. Weak in both, or neither the model
# nor the place in the run would ever be let go.
_made: "weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[Closable]]]" = weakref.WeakKeyDictionary()


class Closable(Protocol):
    """An optimizer that has a part in a run."""

    def close(self) -> None:
        """Leave the run."""


def close_older(model: nn.Module, server: str) -> None:
    """Close what was last made for this model and server, if it is still there."""
    remembered = _made.get(model, {}).get(server)
    older = None if remembered is None else remembered()
    if older is not None:
        older.close()


def remember(optimizer: Closable, model: nn.Module, server: str) -> None:
    """Have `close_older` find it."""
    _made.setdefault(model, {})[server] = weakref.ref(optimizer)


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
