"""How much memory a run needs: stated before it is taken."""

from dataclasses import dataclass

from ormo_server.core.method import Run
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.core.schedulers import SCHEDULERS

_BYTES_PER_NUMBER = 4


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes beyond the interpreter, by what takes them.

    Attributes:
        state_bytes: w, the rule's vectors, and the model's buffers.
        exchange_bytes: one buffer of the model's size for each exchange that may be under way.
        checkpoint_bytes: the copy that is being written.
    """

    state_bytes: int
    exchange_bytes: int
    checkpoint_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.state_bytes + self.exchange_bytes + self.checkpoint_bytes


def need(run: Run, elements: int, slots: int, buffer_bytes: int = 0) -> MemoryNeed:
    """What a model of `elements` numbers needs with `slots` in-flight places; what it has besides are buffers."""
    rule = UPDATE_RULES[run.method.rule]
    vectors = 1 + rule.vectors_per_run + rule.vectors_per_slot * slots
    # A scheduler whose workers wait for each other keeps the parameters of the round's opening.
    vectors += SCHEDULERS[run.method.scheduler].keeps_opening
    vector_bytes = elements * _BYTES_PER_NUMBER
    state_bytes = vectors * vector_bytes + buffer_bytes
    return MemoryNeed(state_bytes, slots * (vector_bytes + buffer_bytes), state_bytes)
