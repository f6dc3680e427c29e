"""What the log says of workers and gradients."""

import logging

from ormo_runtime.logs import Fields
from ormo_server.core.inputs import Requester
from ormo_server.core.state import Member, Ticket
from ormo_server.service.exchange import Outcome
from ormo_server.service.gradients import Push
from ormo_server.service.observations import WorkerObservation

log = logging.getLogger(__name__)
_bad_gradients = logging.getLogger("ormo_server.bad_gradients")


def joined(member: Member, iteration: int, bucket_size: int, caller: str) -> None:
    """A process has become a member. Nobody's name is that of a caller in this process."""
    about = Fields(worker=member.worker, incarnation=f"{member.incarnation:016x}", iteration=iteration, caller=caller)
    said = "worker %s joined (rank %d, %d slots) from %r; K is %d"
    log.info(said, member.worker, member.rank, len(member.slots), caller or "here", bucket_size, extra=about)


def left(worker: str, incarnation: int, iteration: int) -> None:
    """A worker has given up its lease."""
    about = Fields(worker=worker, incarnation=f"{incarnation:016x}", iteration=iteration)
    log.info("worker %s left", worker, extra=about)


def lapsed(worker: str, lease_seconds: float, iteration: int) -> None:
    """A worker has lost its lease."""
    about = Fields(worker=worker, iteration=iteration)
    log.warning("worker %s was silent for %g s and lost its lease", worker, lease_seconds, extra=about)


def overdue(ticket: Ticket, iteration: int) -> None:
    """A ticket is void."""
    worker, slot = ticket.slot
    about = Fields(worker=worker, slot=slot, ticket=ticket.number, iteration=iteration)
    log.warning(
        "a ticket of worker %s was out for too long and is void; the worker stays a member, and nobody waits for it "
        "until it asks for another",
        worker,
        extra=about,
    )


def sent_away(requester: Requester, seen: WorkerObservation) -> None:
    """A worker's gradients are unsound too often."""
    about = Fields(worker=requester.worker, incarnation=f"{requester.incarnation:016x}")
    said = "worker %s is sent away: %d of its gradients were refused, %.0f %% of the latest"
    log.warning(said, requester.worker, seen.refused, 100 * seen.refused_share, extra=about)


def gradient(requester: Requester, push: Push, outcome: Outcome) -> None:
    """What became of a gradient, of which there are many."""
    if outcome.result is not None and outcome.result.buffers_kept and not outcome.result.repeated:
        _buffers_kept(requester, outcome.result.iteration)
    if not log.isEnabledFor(logging.DEBUG):
        return
    about = Fields(
        worker=requester.worker,
        incarnation=f"{requester.incarnation:016x}",
        slot=requester.slot,
        request=requester.request,
        ticket=push.ticket[1],
        epoch=f"{push.ticket[0]:016x}",
        samples=push.samples,
        loss=push.loss,
    )
    if outcome.refusal is not None:
        about["reason"] = outcome.refusal.reason
        log.debug("refused a gradient of worker %s: %s", requester.worker, outcome.refusal, extra=about)
    elif outcome.result is not None:
        result = outcome.result
        about["iteration"], about["delay"] = result.iteration, result.delay
        about["lag_buckets"], about["step_size"] = result.lag_buckets, result.step_size
        what = "repeated the result of" if result.repeated else "discarded" if result.discarded else "applied"
        log.debug("%s a gradient of worker %s with delay %d", what, requester.worker, result.delay, extra=about)


def _buffers_kept(requester: Requester, iteration: int) -> None:
    about = Fields(worker=requester.worker, iteration=iteration)
    said = (
        "buffers came with NaN or infinity from worker %s, beside a gradient that counts: the server keeps its own and "
        "tells the worker, whose log names them"
    )
    _bad_gradients.warning(said, requester.worker, extra=about)
