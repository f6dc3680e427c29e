"""What rank 0 of a worker's ranks has learnt, on its way to the other ranks: outcomes, parameters, errors."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch

from ormo_protos.limits import MAX_SAMPLES
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker import errors
from ormo_worker.client import Delivered, ExchangeOutcome
from ormo_worker.errors import GroupBroken, ModelUnusable, OptionRefused, OrmoError, Refused, RunFinished
from ormo_worker.pytorch.devices import Arriving
from ormo_worker.pytorch.pipeline import Gathered, Pipeline
from ormo_worker.pytorch.ranks import Ranks, Row
from ormo_worker.pytorch.transfer import Staging

A = TypeVar("A")
SWAP, NEXT, RENEW = range(3)  # what ranks do together
_NO_PAYLOAD: Any = None
# Ranks with unlike GPUs clip the same gradient by factors that differ in the last bits; gradients that were not reduced
# differ by far more.
_TOLERANCE = 1e-3


class State(NamedTuple):
    """What an optimizer goes by, of rank 0's pipeline."""

    current: int | None
    under_way: int
    awaits_result: bool

    @classmethod
    def of(cls, pipeline: Pipeline | None) -> "State | None":
        """As it is now; None for a call that has none."""
        return None if pipeline is None else cls(pipeline.current, pipeline.under_way, pipeline.awaits_result)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of rank 0's.

    Attributes:
        kind: name of its class.
        text: its sentence.
        reason: of a refusal; empty for none.
    """

    kind: str
    text: str
    reason: str = ""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """As others are told of it."""
        return cls(type(error).__name__, str(error), getattr(error, "reason", ""))

    def error(self) -> Exception:
        """The same error, where it is one of ours."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, Refused):
            return kind(self.text, self.reason)
        if isinstance(kind, type) and issubclass(kind, OrmoError | RunFinished):
            return kind(self.text)
        said = f"{self.kind}: {self.text}" if self.text else self.kind
        return GroupBroken(f"rank 0 of this worker's ranks has failed and takes no further part in the run: {said}")


@dataclass(frozen=True, slots=True)
class Said:
    """What rank 0 tells the others.

    Attributes:
        answer: what came of the call, without its parameters; None if that was nothing, or an error.
        failure: the error.
        delivered: the parameters that came, without their payload: that follows by itself, see `layout`.
        layout: of the payload: dtype, whether there are buffers, whether there are frozen tensors.
        state: of the pipeline; None where it was not asked.
    """

    answer: Any = None
    failure: Failure | None = None
    delivered: Delivered | None = None
    layout: tuple[pb.Dtype.ValueType, bool, bool] | None = None
    state: State | None = None


class Relay:
    """What rank 0 has learnt, on its way to the other ranks.

    Args:
        ranks: this rank and the others.
        staging: the model's tensors.

    Attributes:
        ranks: as given.
    """

    def __init__(self, ranks: Ranks, staging: Staging) -> None:
        self.ranks = ranks
        self._staging = staging
        self._is_reduced = False
        self._payloads: dict[int | None, Payload] = {}

    def begin(self) -> None:
        """Have all ranks join the run, with one model.

        Raises:
            GroupBroken: a rank is gone.
            ModelUnusable: the ranks' models are not the same.
        """
        self.ranks.open()
        digests = self.ranks.gather(self._staging.tensors.manifest.model_digest)
        for rank, digest in enumerate(digests):
            if digest != digests[0]:
                raise ModelUnusable(
                    f"the model of rank {rank} of this worker's ranks is not that of rank 0: build the same one in "
                    "all, with the same parameters frozen"
                )

    def agree(self, act: int, gathered: Gathered | None = None) -> Gathered | None:
        """Have all ranks do the same, and give all of them rank 0's buffers.

        Returns:
            What rank 0 shall push: the samples of all ranks, and the mean of their losses.

        Raises:
            GroupBroken: a rank is gone, or does something else.
            OptionRefused: the ranks' gradients are not the same, or have too many samples together.
        """
        rows = [Row.of(each) for each in self.ranks.gather(self._row(act, gathered).to_bytes())]
        self._check(rows)
        self._is_reduced |= gathered is not None
        self.ranks.share(self._staging.tensors.buffers)
        if gathered is None:
            return None
        samples = sum(row.samples for row in rows)
        if samples > MAX_SAMPLES:
            raise OptionRefused(
                f"the samples of {len(rows)} ranks are {samples}, and one push counts at most {MAX_SAMPLES}: count in "
                "larger units, such as sequences for tokens"
            )
        losses = [row.loss for row in rows if row.loss is not None]
        loss = gathered.loss if isinstance(gathered.loss, Arriving) else None  # that has been reduced on its device
        return replace(gathered, samples=samples, loss=sum(losses) / len(losses) if losses else loss)

    def lead(self, work: Callable[[], A], pipeline: Pipeline | None = None) -> A:
        """Do this in rank 0, and tell the others what came of it."""
        try:
            answer = self.ranks.while_waiting(work)
        except GroupBroken:
            raise  # there is nobody to tell
        except BaseException as error:
            self.ranks.tell(Said(failure=Failure.of(error), state=State.of(pipeline)))
            raise
        delivered = answer.delivered if isinstance(answer, ExchangeOutcome) else answer
        if not isinstance(delivered, Delivered):
            self.ranks.tell(Said(answer, state=State.of(pipeline)))
            return answer
        outcome = replace(answer, delivered=None) if isinstance(answer, ExchangeOutcome) else None
        layout = delivered.payload.layout
        about = (layout.dtype, layout.with_buffers, layout.frozen > 0)
        bare = replace(delivered, payload=_NO_PAYLOAD)
        self.ranks.tell(Said(outcome, delivered=bare, layout=about, state=State.of(pipeline)))
        self._spread(delivered.payload)
        return answer

    def follow(self) -> Said:
        """What rank 0 tells, with the parameters in their payload."""
        said: Said = self.ranks.hear()
        if said.delivered is None or said.layout is None:
            return said
        payload = self._payload(None if said.answer is None else said.answer.slot, *said.layout)
        self._spread(payload)
        return replace(said, delivered=replace(said.delivered, payload=payload))

    def _row(self, act: int, gathered: Gathered | None) -> Row:
        if gathered is None:
            return Row(act)
        loss = None if isinstance(gathered.loss, Arriving) else gathered.loss
        return Row(act, gathered.samples, loss, *(() if self._is_reduced else _look_at_gradients(self._staging)))

    def _check(self, rows: list[Row]) -> None:
        for rank, row in enumerate(rows):
            if row.act != rows[0].act:
                raise GroupBroken(
                    f"rank {rank} of this worker's ranks is at another point of its step than rank 0: have all ranks "
                    "call step() equally often, and start them again"
                )
            if not _alike(row, rows[0]):
                raise OptionRefused(
                    f"the gradient of rank {rank} of this worker's ranks is not that of rank 0: put the model into "
                    "torch.nn.parallel.DistributedDataParallel for the same process group, compute the loss through "
                    "that, and let its reduction come to an end (no_sync() only before the last backward(); "
                    "find_unused_parameters=True where some parameters get no gradient)"
                )

    def _payload(self, slot: int | None, dtype: pb.Dtype.ValueType, with_buffers: bool, with_frozen: bool) -> Payload:
        layout = PayloadLayout.of(
            self._staging.tensors.manifest, dtype, with_buffers=with_buffers, with_frozen=with_frozen
        )
        if slot not in self._payloads or self._payloads[slot].layout != layout:
            # Where parameters come on a device, it only says how they lie there.
            self._payloads[slot] = Payload(layout, pin_memory=self._staging.pinned and not self._staging.spreads)
        return self._payloads[slot]

    def _spread(self, payload: Payload) -> None:
        """Whatever does not go from device to device when it is loaded."""
        if not self._staging.spreads:
            self.ranks.broadcast(torch.from_numpy(payload.array))
        elif payload.layout.frozen:
            self.ranks.broadcast(payload.frozen)


def _look_at_gradients(staging: Staging) -> tuple[float, float]:
    """The sum and the norm of all gradients; waits for their devices."""
    gradients = [each.grad for each in staging.tensors.parameters if each.grad is not None]
    dense = [each.coalesce().values() if each.is_sparse else each for each in gradients]
    total = sum(float(each.sum(dtype=torch.float64)) for each in dense)
    return total, math.hypot(*(float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in dense))


def _alike(row: Row, first: Row) -> bool:
    pairs = ((row.gradient_sum, first.gradient_sum), (row.gradient_norm, first.gradient_norm))
    bound = _TOLERANCE * max(row.gradient_norm, first.gradient_norm)
    # Where they are not finite in one, they are in none, and the server refuses them.
    return all(
        abs(one - other) <= bound or (not math.isfinite(one) and not math.isfinite(other)) for one, other in pairs
    )
