"""The journal."""

from collections.abc import Callable

from ormo_server.metrics.families import SECONDS, Families


class JournalMetrics:
    """How large the journal is, and how long answers wait for it."""

    def __init__(self, families: Families) -> None:
        self.commit_seconds = families.histogram(
            "journal_commit_seconds", "Time of one write of the journal, with its fsync, for all who wait.", SECONDS
        )
        self._size = families.gauge("journal_size_bytes", "Bytes in the journal since the last checkpoint; 0 without.")

    def size(self, size: Callable[[], float]) -> None:
        """Ask for the size at each scrape."""
        self._size.set_function(size)
