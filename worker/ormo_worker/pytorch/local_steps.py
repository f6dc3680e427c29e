"""Local steps: a worker moves its own parameters several times, and pushes the sum of its moves.

That sum, the *pseudo-gradient*, is what the parameters were when they were loaded less what they have become, in
float32. The server takes it for a gradient.
"""

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ormo_protos.limits import MAX_SAMPLES
from ormo_protos.manifest import INT8
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker.client import ExchangeOutcome
from ormo_worker.errors import OptionRefused
from ormo_worker.pytorch.devices import Copies
from ormo_worker.pytorch.inner import Inner
from ormo_worker.pytorch.pipeline import Gathered, Pipeline
from ormo_worker.pytorch.reference import Reference
from ormo_worker.pytorch.transfer import Staging, Transfer
from ormo_worker.pytorch.watch import Watch

_LOG = logging.getLogger(__name__)


class LocalSteps:
    """The local steps since parameters were last loaded; for the training thread, but for `finish`.

    Args:
        inner: makes them.
        staging: the model's tensors.
        outgoing: for each slot, the way of what it pushes.
        pipeline: the slots.
        watch: looks at the model before the last step of each push.
        on_not_finite: told how many have a sum that is not finite; it must not know the `RemoteOptimizer`.

    Attributes:
        made: since the parameters were loaded.
        pushed: by slot, how many it pushed last.
    """

    def __init__(
        self,
        inner: Inner,
        staging: Staging,
        outgoing: Sequence[Transfer],
        pipeline: Pipeline,
        watch: Watch,
        on_not_finite: Callable[[int], object],
    ) -> None:
        self.made = 0
        self.pushed: dict[int, int] = {}
        self._due = 1
        self._ticket: pb.Ticket | None = None
        self._spent = True  # the moves are pushed or dropped: other parameters must come before the next step
        self._given: Gathered | None = None  # what was pushed last, until other parameters are loaded
        self._inner = inner
        self._pipeline = pipeline
        self._watch = watch
        self._on_not_finite = on_not_finite
        self._staging = staging
        self._outgoing = outgoing
        self._reference = Reference(staging.tensors.parameters)
        self._samples = 0
        self._loss_sum: float | Tensor = 0.0
        self._losses = 0
        self._loaded_at = 0.0
        self._before: Copies | None = None
        inner.take_over()
        moved = inner.parameters
        if any(each.dtype == torch.bfloat16 and each in moved for each in staging.tensors.parameters):
            _LOG.warning(
                "the model has parameters in bfloat16, in which small steps of the inner optimizer vanish: keep the "
                "model in float32 and compute under torch.autocast"
            )

    def begin(self, ticket: pb.Ticket, most: int) -> None:
        """The model has just got other parameters, to make local steps from.

        Args:
            ticket: says how many.
            most: how many the run has at most; those of a ticket are brought within its bounds, for a worker that never
                pushed would look busy for ever.
        """
        # Of the model's own values, and not of what came: rounded to bfloat16 they would differ without any step.
        self._reference.note()
        self._ticket = ticket
        self.made, self._due = 0, min(max(1, ticket.local_steps), max(1, most))
        self._samples, self._loss_sum, self._losses = 0, 0.0, 0
        self._loaded_at = time.monotonic()
        self._given, self._spent = None, False

    def restart(self) -> None:
        """The model has once more what it had then: the moves since are dropped."""
        if not self._spent and self._ticket is not None:
            self.begin(self._ticket, self._due)

    def drop(self) -> None:
        """Nobody takes the moves any more."""
        self._spent, self._given = True, None

    def step(self, samples: int, loss: float | Tensor | None) -> ExchangeOutcome | None:
        """Make one and, if it is the last one that is due, push their sum and wait for the next parameters.

        Args:
            samples: how many its mini-batch had.
            loss: the mini-batch's mean; None if not known.

        Returns:
            What came of the push; None if it was not yet time for one.

        Raises:
            OptionRefused: more samples than one push may have.
            ModelUnusable, ParametersChanged: as `Watch.check_local`. After either of these nothing was moved.
            OrmoError: as `Pipeline.swap`.
        """
        if self._spent:  # an earlier step was interrupted while it waited: this gradient is of parameters gone by
            return self._resume()
        if self._samples + samples > MAX_SAMPLES:
            raise OptionRefused(
                f"the samples of {self.made + 1} local steps are {self._samples + samples}, and one push counts at "
                f"most {MAX_SAMPLES}: count in larger units, such as sequences for tokens"
            )
        if self.made + 1 == self._due:
            self._watch.check_local()
        with self._staging.loading:  # a model half of which has moved must not become a run's
            self._inner.step()
        self.made += 1
        self._samples += samples
        if loss is not None:  # on its device: nobody waits for it before it is sent
            self._loss_sum = self._loss_sum + (loss.detach().float() if isinstance(loss, Tensor) else loss)
            self._losses += 1
        return self._push() if self.made == self._due else None

    def finish(self) -> None:
        """Push what there is, for the worker leaves; the pipeline's `settle` waits for it. From any thread."""
        current, gathered = self._pipeline.current, self._unanswered()
        try:
            if not self._spent and self.made and current is not None:
                gathered = self._gather(current)
            if gathered is not None:
                self._pipeline.finish(gathered)
        finally:
            self.drop()
            self._inner.release()

    def _push(self) -> ExchangeOutcome:
        slot = self._pipeline.current
        assert slot is not None
        gathered = self._gather(slot)
        if gathered is None:
            self._inner.reset()
            return self._pipeline.renew()
        self._given = gathered
        return self._pipeline.swap(gathered)

    def _resume(self) -> ExchangeOutcome:
        gathered = self._unanswered()
        if gathered is not None:
            return self._pipeline.swap(gathered)
        return self._pipeline.next() if self._pipeline.current is None else self._pipeline.renew()

    def _unanswered(self) -> Gathered | None:
        # It goes out again under its own ticket: if it was applied, that is used up.
        return self._given if self._pipeline.awaits_result else None

    def _gather(self, slot: int) -> Gathered | None:
        """Send the sum of the moves on its way into the slot's payload; None if it is not finite."""
        self._spent = True
        moves = self._reference.take_moves(self._inner.parameters)
        if not self._reference.is_finite():
            self._on_not_finite(self.made)
            return None
        before = self._before if len(self._outgoing) > 1 else None  # as in `RemoteOptimizer._gather`
        outgoing, loss = self._outgoing[slot], self._loss_sum / self._losses if self._losses else None
        if outgoing.payload.layout.dtype == INT8:
            assert self._ticket is not None  # it came with the parameters that the moves began at
            self._before = outgoing.begin_codes(self._reference.in_a_row(), self._ticket)
        else:
            self._before = outgoing.begin_moves(moves)
        self.pushed[slot] = self.made
        return Gathered(
            payload=outgoing.payload,
            copies=self._before,
            samples=self._samples,
            loss=self._staging.fetch_number(loss) if isinstance(loss, Tensor) else loss,
            loaded_at=self._loaded_at,
            before=before,
            local_steps=self.made,
        )
