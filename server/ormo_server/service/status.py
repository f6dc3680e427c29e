"""The answer to GetStatus."""

import time

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.logs import printable
from ormo_server.metrics.process import package_version, resident_bytes
from ormo_server.service.host import RunHost
from ormo_server.service.observations import Evaluation, Observations
from ormo_server.service.view import RunView, WorkerView


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
    )
    if host.has_model:
        with host.engine.inspect() as machine:
            message.learning_rate = machine.state.learning_rate
    return message


def phase_of(host: RunHost, *, draining: bool) -> str:
    """What the server is doing, in the words of `Phase` without its prefix, in lower case."""
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
        _describe_gradients(status, host.engine.observations)
    return status


_PHASES = {name.removeprefix("PHASE_").lower(): number for name, number in pb.GetStatusResponse.Phase.items() if number}


def _describe_checkpoint(status: pb.GetStatusResponse, host: RunHost) -> None:
    last = host.last_checkpoint
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
    )
