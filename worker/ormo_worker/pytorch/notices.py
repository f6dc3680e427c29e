"""What an optimizer says in its log: a warning once for each tensor, and what became of gradients."""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from ormo_protos.refusals import UNSOUND_GRADIENT
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.logs import Fields
from ormo_worker.client import ExchangeOutcome

_LOG = logging.getLogger(__name__)
_SHOWN_NAMES = 3
# In a mixture of experts each step may have tensors of its own to name, for a while; in a loop that has diverged each
# gradient is refused.
_SECONDS_BETWEEN_LINES = 10.0


class Tally:
    """What became of the gradients of one optimizer, for the program that trains, and what its log says of it.

    For the training thread alone: it counts what that thread has got to know, as the figures beside a model have to;
    `WorkerMetrics` counts in whichever thread an exchange ends.

    Args:
        worker: its id, for lines of the log.

    Attributes:
        last_result: what the server said to the last gradient whose outcome is known; None for a refused one.
        counted: gradients that the server is known to have applied, or discarded as too late.
        refusals: how many gradients were refused, by reason.
    """

    def __init__(self, worker: str) -> None:
        self.last_result: pb.PushResult | None = None
        self.counted = 0
        self.refusals: Counter[str] = Counter()
        self._worker = worker
        self._warned_at = float("-inf")

    def note(self, outcome: ExchangeOutcome, iteration: int) -> None:
        """Count the gradient of this exchange, if it had one.

        Args:
            outcome: what came of the exchange.
            iteration: of the parameters that the model has, for the log.
        """
        if outcome.fate is None:
            return
        self.last_result = outcome.result
        self.counted += outcome.result is not None
        if outcome.refusal is not None and not outcome.finished:
            self._note_refusal(outcome.refusal, iteration)

    def note_mended(self, buffers: list[str], iteration: int) -> None:
        """Say that these buffers have the server's values again."""
        if self._may_warn():
            said = "buffers had NaN or infinity, and have the server's values again, as their gradients count: %s"
            _LOG.warning(said, listed(buffers), extra=Fields(worker=self._worker, iteration=iteration))

    def _note_refusal(self, refusal: pb.PushResult, iteration: int) -> None:
        self.refusals[refusal.refusal] += 1
        about = Fields(worker=self._worker, request=refusal.request, iteration=iteration, reason=refusal.refusal)
        if refusal.refusal not in UNSOUND_GRADIENT:
            said = "a gradient was lost, training goes on: %s: %s"
            _LOG.info(said, refusal.refusal, refusal.refusal_message, extra=about)
            return
        if self._may_warn():  # a loop that has diverged refuses every gradient
            count = self.refusals[refusal.refusal]
            said = "the server refused a gradient, %d so far: %s"
            _LOG.warning(said, count, refusal.refusal_message, extra=about)

    def _may_warn(self) -> bool:
        now = time.monotonic()
        if now - self._warned_at < _SECONDS_BETWEEN_LINES:
            return False
        self._warned_at = now
        return True


class Notice:
    """A warning that names each tensor once.

    Args:
        sentence: with one %s, for the names.

    Attributes:
        sentence: as given.
        named: the tensors of which it was, or is about to be, said.
        unsaid: those of which it is about to be.
    """

    def __init__(self, sentence: str) -> None:
        self.named: set[str] = set()
        self.sentence = sentence
        self.unsaid: list[str] = []
        self._said_at = float("-inf")

    def note(self, names: Iterable[str]) -> None:
        """Say it of those that it was not said of, at once or together with the next few."""
        new = [name for name in names if name not in self.named]
        self.named.update(new)
        self.unsaid += new
        if time.monotonic() - self._said_at >= _SECONDS_BETWEEN_LINES:
            self.flush()

    def flush(self) -> None:
        """Say what was put off."""
        if self.unsaid:
            _LOG.warning(self.sentence, listed(self.unsaid))
            self.unsaid.clear()
            self._said_at = time.monotonic()


def listed(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(names) - _SHOWN_NAMES
    return ", ".join(map(repr, names[:_SHOWN_NAMES])) + (f" and {more} more" if more > 0 else "")
