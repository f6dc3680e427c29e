"""SIGTERM and SIGINT as an exception that can't get lost.

Python raises `KeyboardInterrupt` wherever the main thread happens to be. Where that is a finalizer, or a callback of a
library, it is reported and forgotten, and the program would go on.
"""

import signal
import threading
from types import FrameType

_asked = threading.Event()


def leave_on_signals() -> None:
    """From now on both signals raise `KeyboardInterrupt`."""
    _asked.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)


def leave_if_asked() -> None:
    """Raise it again, if a signal has come and was lost: for loops to call now and then.

    Raises:
        KeyboardInterrupt: a signal has come.
    """
    if _asked.is_set():
        raise KeyboardInterrupt


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt
