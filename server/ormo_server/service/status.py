"""The answer to GetStatus."""

import time

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.core.state import Member, State
from ormo_server.service.engine import Engine
from ormo_server.service.host import RunHost
from ormo_server.service.observations import WorkerObservation


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


def status_of(host: RunHost, *, draining: bool) -> pb.GetStatusResponse:
    """How things are."""
    method = host.settings.run().method
    status = pb.GetStatusResponse(
        phase=pb.GetStatusResponse.PHASE_WAITING_FOR_MODEL,
        settings=run_settings(host),
        method=method.name,
        update_rule=method.rule,
        step_scale=method.scale,
        scheduler=method.scheduler,
        uptime_seconds=time.monotonic() - host.started,
        refusals=_refusals(host),
    )
    last = host.last_checkpoint
    if last is not None:
        status.checkpoint_path, status.checkpoint_iteration = str(last.path), last.iteration
    if host.has_model:
        _describe_run(status, host.engine)
    if draining:
        status.phase = pb.GetStatusResponse.PHASE_DRAINING
    return status


def _refusals(host: RunHost) -> dict[str, int]:
    samples = next(iter(host.metrics.refusals.collect())).samples
    counts = {s.labels["reason"]: int(s.value) for s in samples if s.name.endswith("_total")}
    return {reason: count for reason, count in counts.items() if count}


def _describe_run(status: pb.GetStatusResponse, engine: Engine) -> None:
    seen = engine.observations
    with engine.inspect() as machine:
        state = machine.state
        status.phase = _phase(state)
        status.iteration.CopyFrom(pb.Iteration(epoch=state.epoch, number=state.iteration))
        status.samples = state.samples
        status.newest_bucket = state.newest_bucket
        status.bucket_size = machine.bucket_size
        status.learning_rate = state.learning_rate
        status.model_parameters = state.params.numel()
        for worker in sorted(state.members):
            status.workers.append(_worker(state.members[worker], seen.workers.get(worker), engine))
    status.applied, status.delay_mean, status.delay_max = seen.applied, seen.delay_mean, seen.delay_max
    status.discarded, status.step_scale_mean = seen.discarded, seen.step_scale_mean
    if seen.loss is not None:
        status.loss = seen.loss


def _phase(state: State) -> "pb.GetStatusResponse.Phase.ValueType":
    if state.finished:
        return pb.GetStatusResponse.PHASE_FINISHED
    return pb.GetStatusResponse.PHASE_TRAINING if state.started else pb.GetStatusResponse.PHASE_WAITING_FOR_WORKERS


def _worker(member: Member, seen: WorkerObservation | None, engine: Engine) -> pb.WorkerStatus:
    seen = seen or WorkerObservation()
    return pb.WorkerStatus(
        worker=member.worker,
        rank=member.rank,
        slots=len(member.slots),
        applied=seen.applied,
        last_delay=seen.last_delay,
        max_delay=seen.max_delay,
        last_loss=seen.last_loss,
        silent_seconds=engine.silent_seconds(member.worker),
        compute_seconds=seen.compute_seconds,
    )
