"""What is let in: gradients that are finite and no longer than the run allows, and the one model that is asked for."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from ormo_protos.int8 import scales_of
from ormo_protos.manifest import FLOAT32, Manifest
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_server.core.errors import MemoryLimit, NonFinite, NormTooLarge, NotWanted, UnsoundWorker
from ormo_server.core.ids import TicketKey
from ormo_server.core.inputs import Requester
from ormo_server.core.method import MemoryNeed, Run, memory_need
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.journal import Storing
from ormo_server.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class ReceivedGradient:
    """A gradient that has arrived whole.

    Attributes:
        ticket: the one that it redeems.
        payload: its tensors.
        samples: how many the mini-batch had.
        loss: of the mini-batch, NaN if it is not finite; None if the worker did not say.
        compute_seconds: as the worker measured; 0 if it did not say.
        local_steps: that it is the sum of; 0 for a gradient.
        norm: Euclidean, of the gradient; None if it has NaN or infinity. Buffers are the core's to judge.
        storing: its way to the journal; None without one.
    """

    ticket: TicketKey
    payload: Payload
    samples: int
    loss: float | None
    compute_seconds: float
    local_steps: int
    norm: float | None
    storing: Storing | None = None


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

    def clip(self, received: ReceivedGradient, begin_storing: Callable[[Payload], Storing | None]) -> ReceivedGradient:
        """Scale a gradient down to the bound, in its payload, which is to be stored as it is then."""
        assert self.norm is not None
        assert received.norm is not None
        if received.storing is not None:
            received.storing.give_up()
        received.payload.gradient.mul_(self.norm / received.norm)
        return replace(received, norm=self.norm, storing=begin_storing(received.payload))

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


_LOG = logging.getLogger(__name__)

# How long the others wait before they ask again.
WAIT_SECONDS = 0.5
_FLOAT_BYTES = 4


class ModelOffers:
    """Remembers who is asked for the model, on a lease that its bytes renew. Time is an argument.

    Args:
        lease_seconds: how long the asked worker may be silent.
    """

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._asked: tuple[str, int] | None = None
        self._until = 0.0
        self._lock = threading.Lock()  # of the two: many ask at once, each in a thread of its own

    def ask(self, worker: str, incarnation: int, now: float) -> bool:
        """Whether this worker is the one to send its model. Asking again renews nothing: its bytes must come."""
        with self._lock:
            if now >= self._until:
                self._asked, self._until = (worker, incarnation), now + self.lease_seconds
            return self._asked == (worker, incarnation)

    def renew(self, worker: str, incarnation: int, now: float) -> None:
        """Bytes came.

        Raises:
            NotWanted: this worker was not asked, or was silent for so long that another one was.
        """
        with self._lock:
            if self._asked != (worker, incarnation):
                raise NotWanted(
                    f"worker {worker!r} is not the one that was asked for the model, or was silent for more than "
                    f"{self.lease_seconds:g} s: join again"
                )
            self._until = now + self.lease_seconds

    def give_up(self, worker: str, incarnation: int) -> None:
        """The worker's offer failed: whoever asks next is asked, unless another one is asked already."""
        with self._lock:
            if self._asked == (worker, incarnation):
                self._until = 0.0


def room_for(layout: PayloadLayout) -> Payload:
    """Memory for an offered model.

    Raises:
        MemoryLimit: this machine has not so much.
    """
    try:
        return Payload(layout)
    except RuntimeError as error:  # that is what PyTorch raises for it
        raise MemoryLimit(
            f"a model of {layout.total_bytes:,} bytes was offered, and this machine does not have the memory for it: "
            "offer a smaller one, or serve it on another machine"
        ) from error


def check_memory(settings: ServerSettings, run: Run, manifest: Manifest) -> MemoryNeed:
    """What a model needs here, its frozen tensors included.

    Raises:
        MemoryLimit: more than the settings allow.
    """
    _check_in_flight(settings, manifest)
    elements, frozen = manifest.sizes["parameters"], manifest.sizes["frozen"]
    slots = settings.max_workers * settings.slots_per_worker
    buffer_bytes = 4 * manifest.sizes["float_buffers"] + 8 * manifest.sizes["int_buffers"]
    need = memory_need(run, elements, slots, buffer_bytes, scales_of(manifest.trained_sizes))
    # Once: they are sent, and written to the disk, from where they are.
    need = replace(need, state_bytes=need.state_bytes + frozen * _FLOAT_BYTES)
    rule = run.method.rule
    numbers = f"{elements:,} parameters" + (f" and {frozen:,} that are frozen" if frozen else "")
    _LOG.info(
        "a model of %s: %.1f MB of state%s, up to %.1f MB for exchanges (all slots at once), %.1f MB for a checkpoint",
        numbers,
        need.state_bytes / 1e6,
        f" ({rule} keeps a vector for each of up to {slots} slots)" if UPDATE_RULES[rule].vectors_per_slot else "",
        need.exchange_bytes / 1e6,
        need.checkpoint_bytes / 1e6,
    )
    limit = settings.memory_limit_bytes
    if limit is not None and need.total_bytes > limit:
        raise MemoryLimit(
            f"a model of {numbers} needs up to {need.total_bytes:,} bytes with "
            f"{settings.max_workers} workers of {settings.slots_per_worker} slots, and memory_limit_bytes is "
            f"{int(limit):,}: raise it, or lower max_workers or slots_per_worker"
        )
    return need


def _check_in_flight(settings: ServerSettings, manifest: Manifest) -> None:
    limit = settings.max_bytes_in_flight
    exchange = 2 * PayloadLayout.of(manifest, FLOAT32, with_buffers=True).total_bytes
    offer = PayloadLayout.of(manifest, FLOAT32, with_buffers=True, with_frozen=True).total_bytes
    if limit is not None and max(exchange, offer) > limit:
        what, size = ("one exchange", exchange) if exchange >= offer else ("an offer", offer)
        raise MemoryLimit(
            f"{what} of this model may have {size:,} bytes under way, and max_bytes_in_flight is "
            f"{int(limit):,}: raise it"
        )
