"""What operators see of a run, and what they may do to it: GetStatus and Control."""

import logging
import threading
import time

from ormo_protos.limits import PHASES
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.logs import Fields, printable
from ormo_server.core.errors import BadRequest, NotReady
from ormo_server.metrics.process import package_version, resident_bytes
from ormo_server.metrics.view import Evaluation, Observations, RunView, WorkerView
from ormo_server.service.run import RunHost


def run_settings(host: RunHost) -> pb.RunSettings:
    """What workers must know of the run."""
    settings = host.settings
    message = pb.RunSettings(
        method=settings.run().method.name,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        learning_rate=settings.learning_rate,
        stop_after_gradients=settings.stop_after_gradients,
        stop_after_samples=settings.stop_after_samples,
        local_steps=settings.local_steps,
    )
    if host.has_model:
        with host.engine.inspect() as machine:
            message.learning_rate = machine.state.learning_rate
    return message


def phase_of(host: RunHost, *, draining: bool) -> str:
    """What the server is doing: a word of `PHASES`."""
    if draining:
        return "draining"
    return host.engine.view().phase if host.has_model else "waiting_for_model"


def status_of(host: RunHost, *, draining: bool) -> pb.GetStatusResponse:
    """How things are."""
    method = host.settings.run().method
    status = pb.GetStatusResponse(
        phase=_PHASES[phase_of(host, draining=draining)],
        settings=run_settings(host),
        method=method.name,
        update_rule=method.rule,
        step_scale=method.scale,
        scheduler=method.scheduler,
        uptime_seconds=time.monotonic() - host.started,
        refusals=host.metrics.traffic.refused(),
        resident_bytes=resident_bytes(),
        version=package_version(),
    )
    _describe_checkpoint(status, host)
    if host.has_model:
        _describe_run(status, host.engine.view())
        with host.engine.settled() as observations:
            _describe_gradients(status, observations)
    return status


_PHASES = {word: pb.GetStatusResponse.Phase.ValueType(number) for number, word in PHASES.items()}


def _describe_checkpoint(status: pb.GetStatusResponse, host: RunHost) -> None:
    last = host.files.last_checkpoint
    if last is not None:
        status.checkpoint_path, status.checkpoint_iteration = printable(last.path), last.iteration
        status.checkpoint_age_seconds = time.monotonic() - last.written_at


def _describe_run(status: pb.GetStatusResponse, run: RunView) -> None:
    status.iteration.CopyFrom(pb.Iteration(epoch=run.epoch, number=run.iteration))
    status.samples = run.samples
    status.newest_bucket = run.newest_bucket
    status.bucket_size = run.bucket_size
    status.learning_rate = run.learning_rate
    status.model_parameters = run.model_parameters
    status.tickets_in_flight = run.tickets_in_flight
    status.slots_waiting = run.slots_waiting
    status.workers.extend(_worker(worker) for worker in run.workers)
    if run.training_loss is not None:
        status.loss = run.training_loss
    if run.evaluation is not None:
        status.evaluation.CopyFrom(_evaluation(run.evaluation))


def _describe_gradients(status: pb.GetStatusResponse, seen: Observations) -> None:
    status.applied, status.delay_mean, status.delay_max = seen.applied, seen.delay_mean, seen.delay_max
    status.discarded, status.step_scale_mean = seen.discarded, seen.step_scale_mean
    if seen.lag_mean is not None:
        status.lag_mean = seen.lag_mean


def _evaluation(evaluation: Evaluation) -> pb.Evaluation:
    return pb.Evaluation(
        iteration=pb.Iteration(epoch=evaluation.epoch, number=evaluation.iteration),
        loss=evaluation.loss,
        accuracy=evaluation.accuracy,
    )


def _worker(worker: WorkerView) -> pb.WorkerStatus:
    seen = worker.seen
    return pb.WorkerStatus(
        worker=worker.worker,
        rank=worker.rank,
        slots=worker.slots,
        applied=seen.applied,
        last_delay=seen.last_delay,
        max_delay=seen.max_delay,
        last_loss=seen.last_loss,
        silent_seconds=worker.silent_seconds,
        compute_seconds=seen.compute_seconds,
        samples=seen.samples,
        smoothed_delay=seen.smoothed_delay,
        ticket_seconds=seen.ticket_seconds,
        push_age_seconds=worker.push_age_seconds,
        gradient_norm=seen.gradient_norm,
        local_steps=seen.local_steps,
    )


_LOG = logging.getLogger(__name__)

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
        if not self._host.checkpoint(anew=True) or self._host.files.last_checkpoint is None:
            iteration = engine.iteration()[1]
            raise NotReady(
                f"no checkpoint of iteration {iteration} could be written, the earlier ones stay: the server's log "
                "says why",
                retry_seconds=_RETRY_SECONDS,
            )
        return printable(self._host.files.last_checkpoint.path)

    def _keep(self, peak: float) -> None:
        """The answer says that no crash can undo it."""
        try:
            if self._host.files.journal is None:
                self._checkpoint()
        except NotReady as error:
            raise NotReady(
                f"the learning rate is set to {peak:g}, and a crash would undo it: {error}",
                retry_seconds=_RETRY_SECONDS,
            ) from error


def _tell(caller: str, what: str) -> None:
    _LOG.warning("%r had the server %s", caller, what, extra=Fields(caller=caller, action=what))
