"""The run's clock."""

import time


class RunClock:
    """Seconds that the run has been served, over all restarts: what the core is passed as `now`.

    It follows the monotonic clock, so that jumps of the wall clock do not matter.

    Args:
        start_seconds: what it shows at first; a restored run goes on where its checkpoint was.
    """

    def __init__(self, start_seconds: float = 0.0) -> None:
        self._offset = start_seconds - time.monotonic()

    def __call__(self) -> float:
        """Seconds now."""
        return time.monotonic() + self._offset
