"""Which gradients are let in: finite ones, no longer than the run allows, of workers whose others mostly were."""

from dataclasses import dataclass, replace

from ormo_protos.tensors import Payload
from ormo_server.core.errors import NonFinite, NormTooLarge, UnsoundWorker
from ormo_server.core.ids import TicketKey
from ormo_server.core.inputs import Requester


@dataclass(frozen=True, slots=True)
class ReceivedGradient:
    """A gradient that has arrived whole.

    Attributes:
        ticket: the one that it redeems.
        payload: its tensors.
        samples: how many the mini-batch had.
        loss: of the mini-batch, NaN if it is not finite; None if the worker did not say.
        compute_seconds: as the worker measured; 0 if it did not say.
        norm: Euclidean, of the gradient; None if it has NaN or infinity. Buffers are the core's to judge.
    """

    ticket: TicketKey
    payload: Payload
    samples: int
    loss: float | None
    compute_seconds: float
    norm: float | None


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of a run.

    Attributes:
        norm: the largest Euclidean norm of a gradient; None for any that leaves the model finite.
        clips: whether a longer gradient is scaled down to it; else it is refused.
        refused_share: a worker is sent away once more than this share of its gradients, smoothed, was refused as
            unsound; None for never.
    """

    norm: float | None = None
    clips: bool = True
    refused_share: float | None = None

    def exceeded_by(self, received: ReceivedGradient) -> bool:
        """Whether a finite gradient is longer than the bound."""
        return self.norm is not None and received.norm is not None and received.norm > self.norm

    def clip(self, received: ReceivedGradient) -> ReceivedGradient:
        """Scale a gradient down to the bound, in its payload."""
        assert self.norm is not None
        assert received.norm is not None
        received.payload.parameters.mul_(self.norm / received.norm)
        return replace(received, norm=self.norm)

    def too_large(self, requester: Requester, received: ReceivedGradient) -> NormTooLarge:
        """The refusal of a longer gradient."""
        return NormTooLarge(
            f"the gradient of worker {requester.worker!r}, request {requester.request}, has norm {received.norm:.4g}, "
            f"and this run takes gradients of a norm up to {self.norm:g}: it was not applied; its ticket stays valid, "
            "unless the exchange asked for the next one. Clip the gradient, or raise --max-gradient-norm of the server",
            worker=requester.worker,
        )


def non_finite(requester: Requester) -> NonFinite:
    """The refusal of a gradient that is not finite."""
    return NonFinite(
        f"the gradient of worker {requester.worker!r}, request {requester.request}, has NaN or infinite values and was "
        "not applied; its ticket stays valid, unless the exchange asked for the next one. Lower the learning rate, or "
        "clip or rescale the gradient",
        worker=requester.worker,
    )


def sent_away(worker: str) -> UnsoundWorker:
    """What a process is told whose gradients were unsound too often. A new one of the same worker may try again."""
    return UnsoundWorker(
        f"too many gradients of worker {worker!r} were not finite or too large, so this process was sent away: check "
        "its data, its device and its precision and start it again, or raise --max-refused-share of the server"
    )
