"""What a status says of the run, a name and a text for each fact."""

from collections.abc import Mapping

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.console.rates import Rates
from ormo_server.console.words import NOT_KNOWN, duration, memory, rate

Facts = Mapping[str, str]


def of_the_moment(status: pb.GetStatusResponse) -> Facts:
    """What changes as training goes on."""
    return {
        "learning rate": f"{status.learning_rate:g}, K {status.bucket_size}",
        "loss": f"{status.loss:.4f}" if status.HasField("loss") else NOT_KNOWN,
        "evaluation": _evaluation(status),
        "delay": f"mean {status.delay_mean:.1f}, largest {status.delay_max:,}",
        "tickets": f"{status.tickets_in_flight} in flight, {status.slots_waiting} slots waiting",
        "checkpoint": _checkpoint(status),
        "memory": memory(status.resident_bytes) if status.resident_bytes else NOT_KNOWN,
    }


def of_the_method(status: pb.GetStatusResponse) -> Facts:
    """How it trains what."""
    return {
        "method": (
            f"{status.method}: update rule {status.update_rule}, step scale {status.step_scale} "
            f"(mean {status.step_scale_mean:.3g}), scheduler {status.scheduler}"
        ),
        "model": f"{status.model_parameters:,} parameters",
    }


def position(status: pb.GetStatusResponse) -> str:
    """How far the run is, and where it ends if that is set."""
    gradients, samples = status.settings.stop_after_gradients, status.settings.stop_after_samples
    iteration = f"iteration {status.iteration.number:,}" + (f" of {gradients:,}" if gradients else "")
    return f"{iteration}, {status.samples:,}" + (f" of {samples:,}" if samples else "") + " samples"


def mean_throughput(status: pb.GetStatusResponse) -> str:
    """Over the whole time since the server started: one answer tells no more."""
    per_second = status.applied / status.uptime_seconds if status.uptime_seconds > 0 else None
    discarded = f", {status.discarded:,} discarded" if status.discarded else ""
    return f"{rate(per_second)} gradients/s since the server started ({status.applied:,} applied{discarded})"


def throughput(rates: Rates | None) -> str:
    """As measured."""
    if rates is None:
        return NOT_KNOWN
    return f"{rate(rates.gradients)} gradients/s, {rate(rates.samples)} samples/s"


def share_done(status: pb.GetStatusResponse) -> float | None:
    """How much of the run is done, 0 to 1; None if no end is set."""
    shares = [done / end for done, end, _ in _ends(status, None)]
    return min(1.0, max(shares)) if shares else None


def seconds_left(status: pb.GetStatusResponse, rates: Rates | None) -> float | None:
    """Until the run's end, if it goes on at this rate; None if that can't be told."""
    left = [max(0, end - done) / per_second for done, end, per_second in _ends(status, rates) if per_second > 0]
    return min(left, default=None)


def _ends(status: pb.GetStatusResponse, rates: Rates | None) -> list[tuple[int, int, float]]:
    """For each end that is set: where the run is, where it ends, and its rate."""
    settings = status.settings
    both = [
        (status.iteration.number, settings.stop_after_gradients, rates.gradients if rates else 0.0),
        (status.samples, settings.stop_after_samples, rates.samples if rates else 0.0),
    ]
    return [(done, end, per_second) for done, end, per_second in both if end]


def refusals(status: pb.GetStatusResponse) -> str:
    """By reason, the most frequent first."""
    counts = sorted(status.refusals.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in counts) or "none"


def _evaluation(status: pb.GetStatusResponse) -> str:
    if not status.HasField("evaluation"):
        return NOT_KNOWN
    found = status.evaluation
    accuracy = f"accuracy {found.accuracy:.1%}, " if found.HasField("accuracy") else ""
    return f"{accuracy}loss {found.loss:.4f} at iteration {found.iteration.number:,}"


def _checkpoint(status: pb.GetStatusResponse) -> str:
    if not status.checkpoint_path:
        return "none"
    age = f", {duration(status.checkpoint_age_seconds)} ago" if status.HasField("checkpoint_age_seconds") else ""
    return f"iteration {status.checkpoint_iteration:,}{age}"
