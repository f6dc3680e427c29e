"""What can go wrong on disk, in sentences."""

from collections.abc import Sequence

_LISTED = 3


class StoreError(Exception):
    """Something on disk can't be read, written or used; the sentence says which, why and what to do."""


class NotFinite(StoreError):
    """The state has NaN or infinite values, and must not replace one that is sound."""


def listed(items: Sequence[str]) -> str:
    """The first few items and how many more there are, for a sentence."""
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")
