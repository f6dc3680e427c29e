"""A signal whose exception gets lost ends the program all the same."""

import functools
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from ormo_runtime.process import end_on_signals, leave_if_asked, leave_on_signals


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    leave_on_signals()
    yield
    leave_on_signals()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_lost_signal_is_raised_again(number: signal.Signals) -> None:
    leave_if_asked()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            leave_if_asked()


def test_a_signal_in_a_finalizer_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    lost: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: lost.append(unraisable.exc_type))
    one = Finalized()
    del one
    assert lost == [KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        leave_if_asked()


class Waited:
    def __init__(self) -> None:
        self.ended = threading.Event()

    def cancel_open(self) -> None:
        self.ended.set()


@pytest.mark.parametrize("module", ["grpc._channel", "threading"])
def test_a_signal_is_not_raised_where_a_lock_may_just_have_been_taken(module: str) -> None:
    """It would stay taken for ever: there what is waited for ends, and it is raised by who had waited."""
    waited = Waited()
    end_on_signals(waited)
    # `partial` has no frame of its own: the signal finds `wait`.
    there = {"__name__": module, "kill": functools.partial(os.kill, os.getpid(), signal.SIGTERM)}
    exec("def wait():\n    kill()\n    return 'done'", there)
    assert there["wait"]() == "done"
    assert waited.ended.wait(5)
    with pytest.raises(KeyboardInterrupt):
        leave_if_asked()
    with pytest.raises(KeyboardInterrupt):
        there["wait"]()  # whoever asks twice is heard at once
