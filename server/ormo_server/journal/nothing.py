"""What a run without a journal has in its place."""
# ruff: noqa: D102 - `Journal` says what they do

from ormo_protos.tensors import Payload
from ormo_server.core.inputs import Input
from ormo_server.core.keys import SlotKey
from ormo_server.journal.records import StoredGradient


class NoJournal:
    """As `Journal`, and keeps nothing.

    Args:
        log: number that no log has; checkpoints name it where there was a journal before, so that its files are known
            to be older, and those of a later one to be newer.
    """

    position = 0
    size_bytes = 0
    full = False

    def __init__(self, log: int | None = None) -> None:
        self.log = log

    def store(self, payload: Payload) -> StoredGradient | None: ...

    def release(self, stored: StoredGradient | None) -> None: ...

    def announce(self, stored: StoredGradient | None) -> None: ...

    def take(self, taken: Input) -> None: ...

    def delivered(self, slot: SlotKey, dtype: int) -> None: ...

    def begin_log(self) -> int | None:
        return self.log

    def settle(self, position: int) -> None: ...

    def forget_before(self, log: int | None) -> None: ...

    def close(self) -> None: ...
