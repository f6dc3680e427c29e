"""A signal whose exception gets lost ends the program all the same."""

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from ormo_runtime.process import end_on_signals, interrupted_safely, leave_if_asked, leave_on_signals


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

    def end_waits(self) -> None:
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


# In programs that go on.


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Sends SIGINT, which has Python's own handler, at the beginning and at the end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield functools.partial(os.kill, os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    leave_if_asked()  # nothing is left of it


def test_what_is_interrupted_safely_comes_to_its_end(interrupt: Callable[[], None]) -> None:
    waited, done = Waited(), list[str]()
    end_on_signals(waited)

    @interrupted_safely
    def work() -> None:
        interrupt()
        assert waited.ended.wait(5)
        done.append("work")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["work"]
    with pytest.raises(KeyboardInterrupt):
        interrupt()  # as ever, outside


def test_it_is_raised_where_what_is_interrupted_safely_looks(interrupt: Callable[[], None]) -> None:
    @interrupted_safely
    def outer() -> None:
        inner()

    @interrupted_safely
    def inner() -> None:
        interrupt()
        leave_if_asked()
        pytest.fail("it has not looked")

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            outer()


def test_whoever_interrupts_twice_is_heard_at_once(interrupt: Callable[[], None]) -> None:
    @interrupted_safely
    def stuck() -> None:
        interrupt()
        interrupt()
        pytest.fail("it was not heard")

    with pytest.raises(KeyboardInterrupt):
        stuck()


def test_an_interruption_goes_before_the_error_that_comes_of_it(interrupt: Callable[[], None]) -> None:
    @interrupted_safely
    def fails() -> None:
        interrupt()
        raise ValueError("what it waited for was ended")

    with pytest.raises(KeyboardInterrupt):
        fails()


def test_a_handler_of_the_programs_own_stays(interrupt: Callable[[], None]) -> None:
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    interrupted_safely(interrupt)()
    assert came == [signal.SIGINT]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_are_not_interrupted(interrupt: Callable[[], None]) -> None:
    looked: list[str] = []

    def look() -> None:
        leave_if_asked()
        looked.append("nothing was raised")

    @interrupted_safely
    def work() -> None:
        interrupt()
        other = threading.Thread(target=look)
        other.start()
        other.join()

    with pytest.raises(KeyboardInterrupt):
        work()
    assert looked == ["nothing was raised"]
