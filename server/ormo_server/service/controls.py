"""What an operator may do to a run that goes on."""

import logging
import threading

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.logs import Fields, printable
from ormo_server.core.errors import BadRequest, NotReady
from ormo_server.service.host import RunHost

log = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0


class Controls:
    """Carries out actions, and logs who asked for them.

    Args:
        host: of the run.
        told_to_stop: set to have the server drain.
    """

    def __init__(self, host: RunHost, told_to_stop: threading.Event) -> None:
        self._host = host
        self._told_to_stop = told_to_stop

    def act(self, request: pb.ControlRequest, caller: str) -> pb.ControlResponse:
        """Do what is asked for.

        Raises:
            BadRequest: nothing is, or a learning rate that can't be.
            NotReady: there is no model yet, or no checkpoint could be written.
            Finished: the run is over, and its learning rate can't be set.
        """
        answer = pb.ControlResponse()
        match request.WhichOneof("action"):
            case "checkpoint":
                answer.checkpoint_path = self._checkpoint()
                _tell(caller, "write a checkpoint")
            case "drain":
                _tell(caller, "drain")
                self._told_to_stop.set()
            case "set_learning_rate":
                peak = request.set_learning_rate.learning_rate
                self._host.engine.set_learning_rate(peak)
                _tell(caller, f"set the learning rate to {peak:g}")
                self._keep(peak)
            case _:
                raise BadRequest("a control request without an action: expected checkpoint, drain or set_learning_rate")
        if self._host.has_model:
            answer.iteration.epoch, answer.iteration.number = self._host.engine.iteration()
        return answer

    def _checkpoint(self) -> str:
        engine = self._host.engine  # or else there is nothing to write
        if not self._host.checkpoint(anew=True) or self._host.last_checkpoint is None:
            iteration = engine.iteration()[1]
            raise NotReady(
                f"no checkpoint of iteration {iteration} could be written, the earlier ones stay: the server's log "
                "says why",
                retry_seconds=_RETRY_SECONDS,
            )
        return printable(self._host.last_checkpoint.path)

    def _keep(self, peak: float) -> None:
        """The answer says that no crash can undo it."""
        try:
            if not self._host.journaled:
                self._checkpoint()
        except NotReady as error:
            raise NotReady(
                f"the learning rate is set to {peak:g}, and a crash would undo it: {error}",
                retry_seconds=_RETRY_SECONDS,
            ) from error


def _tell(caller: str, what: str) -> None:
    log.warning("%r had the server %s", caller, what, extra=Fields(caller=caller, action=what))
