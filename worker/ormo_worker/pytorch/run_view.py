"""What a program may ask of its `RemoteOptimizer`."""

import weakref
from collections import Counter
from typing import Any

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.workload import share_of_run
from ormo_worker.metrics import Tally
from ormo_worker.pytorch.groups import Grouped
from ormo_worker.pytorch.parts import Client
from ormo_worker.pytorch.pipeline import Pipeline


class RunView(Grouped):
    """How far the run is, and what became of this worker's gradients; whose work it is, fills it in."""

    iteration: int
    finished: bool
    _came_too_late: bool = False
    _samples: int
    _client: Client
    _tally: Tally
    _pipeline: Pipeline
    _close: "weakref.finalize[..., Any]"

    @property
    def rank(self) -> int:
        """The smallest number from 0 up that no other worker had when this one joined; 0 if it came too late."""
        return self._welcome.rank

    @property
    def data_seed(self) -> int:
        """A number from 0 to 2**64 - 1 for the order of this worker's data: no other join has the same.

        0 if the run was over before: there is nothing to put in order.
        """
        return self._welcome.data_seed

    @property
    def settings(self) -> pb.RunSettings:
        """How the server trains; nothing is set if the run was over before this worker could join."""
        return self._welcome.settings

    @property
    def _welcome(self) -> pb.Welcome:
        return pb.Welcome() if self._came_too_late else self._client.welcome

    @property
    def progress(self) -> float:
        """How much of the run was over when it sent the parameters that the model has, 0 to 1.

        By gradients or by samples, whichever ends it first; 0 throughout where neither does.
        """
        return 1.0 if self.finished else share_of_run(self.settings, self.iteration, self._samples)

    @property
    def last_result(self) -> pb.PushResult | None:
        """What the server said to the last gradient whose outcome is known; None before, and for a refused one.

        With several in flight that is not the one that was pushed last.
        """
        return self._tally.last_result

    @property
    def counted(self) -> int:
        """How many gradients the server is known to have counted: applied, or discarded as too late."""
        return self._tally.counted

    @property
    def refusals(self) -> Counter[str]:
        """How many gradients were refused, by reason."""
        return self._tally.refusals

    @property
    def under_way(self) -> int:
        """Gradients that were pushed and whose outcome is not known yet; always fewer than `in_flight`."""
        return self._pipeline.under_way

    @property
    def left(self) -> bool:
        """Whether it has left the run, as it has once it is closed."""
        return not self._close.alive
