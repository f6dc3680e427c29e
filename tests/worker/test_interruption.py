"""A signal whose exception gets lost ends the program all the same."""

import os
import signal
from collections.abc import Iterator

import pytest

from ormo_worker.interruption import leave_if_asked, leave_on_signals


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
