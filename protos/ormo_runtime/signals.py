"""SIGTERM and SIGINT as an exception that can't get lost, and does no harm where it is raised.

Python raises `KeyboardInterrupt` wherever the main thread happens to be. Where that is a finalizer, or a callback of a
library, it is reported and forgotten, and the program would go on. Where gRPC, or a lock, has just been taken it is
never given back, and whoever needs it next waits for ever. There it is not raised: what the main thread waits for is
ended instead, by another thread, so that it comes to a place where it may be.

Where the main thread is can be told from its stack alone. The simpler way, to raise nothing at the first signal and
have our loops look, would leave a stop unheeded while a task loads its data or sleeps, for these have no loop of ours.
"""

import signal
import threading
import time
import weakref
from types import FrameType
from typing import Protocol

_SECONDS_BETWEEN_CALLS = 0.5

_asked = threading.Event()


class Waited(Protocol):
    """What the main thread may wait for."""

    def cancel_open(self) -> None:
        """End all calls that are under way."""


_waited: "weakref.WeakSet[Waited]" = weakref.WeakSet()


def leave_on_signals() -> None:
    """From now on both signals raise `KeyboardInterrupt`, the second one in any case."""
    _asked.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)


def end_on_signals(waited: Waited) -> None:
    """End its calls when a signal has come, for as long as it is there."""
    _waited.add(waited)


def leave_if_asked() -> None:
    """Raise it again, if a signal has come and was lost: for loops to call now and then.

    Raises:
        KeyboardInterrupt: a signal has come.
    """
    if _asked.is_set():
        raise KeyboardInterrupt


def _interrupt(_number: int, frame: FrameType | None) -> None:
    again = _asked.is_set()
    _asked.set()
    if again or not _holds_locks(frame):
        raise KeyboardInterrupt
    threading.Thread(target=_end_waits, name="ormo-interruption", daemon=True).start()


def _holds_locks(frame: FrameType | None) -> bool:
    modules = []
    while frame is not None:
        modules.append(str(frame.f_globals.get("__name__")))
        frame = frame.f_back
    return modules[:1] == ["threading"] or any(name.split(".")[0] == "grpc" for name in modules)


def _end_waits() -> None:
    # Again and again: a call may begin just after.
    while _asked.is_set():
        for each in list(_waited):
            each.cancel_open()
        time.sleep(_SECONDS_BETWEEN_CALLS)
