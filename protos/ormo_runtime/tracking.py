"""Figures of a run for the tracker that its user has: TensorBoard, or anything by a hook of ten lines.

Whatever the tracker does, the run goes on: it is called in a thread of its own, whose errors are counted, and what it
is too slow for is left out.
"""

import contextlib
import inspect
import logging
import operator
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypedDict, cast

from ormo_runtime.imports import imported
from ormo_runtime.process import leave_if_asked
from ormo_runtime.settings import UsageError

_LOG = logging.getLogger(__name__)

TENSORBOARD = "tensorboard:"
TRACK = (
    "where figures go besides: `tensorboard:DIR`, or the import path of a tracker of your own, as in "
    "`package.module:Tracker` or `file.py:Tracker`; none: nowhere"
)

_MOST_WAITING = 1000  # rows; there is one every few seconds
_CLOSE_SECONDS = 20.0  # who stops a program kills it soon: Kubernetes after 30
_LOOK_SECONDS = 0.2

Figures: TypeAlias = Mapping[str, float]
Setting: TypeAlias = str | int | float | bool | None


class Position(TypedDict):
    """Where in a run figures belong.

    Attributes:
        updates: gradients, or sums of local steps, applied so far.
        samples: counted so far.
        seconds: since the run's server started; in a simulation, of virtual time.
    """

    updates: int
    samples: int
    seconds: float


class Tracker(Protocol):
    """What a user's class, or what their function returns, has to have. All is called in one thread."""

    def track(self, figures: Figures, position: Position) -> None:
        """Take one row of figures, by name; those that are not known are left out."""

    def close(self) -> None:
        """Write what is left; a tracker without this method has nothing left."""


class TensorBoard:
    """Writes what `tensorboard --logdir DIR` shows: each figure by updates and by samples, either also by time.

    Args:
        directory: for the file with the events.

    Raises:
        UsageError: TensorBoard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from tensorboard.summary import Writer
        except ImportError as error:
            raise UsageError(
                f"--track {TENSORBOARD}{directory} needs TensorBoard, which can't be imported ({error}): "
                "pip install tensorboard"
            ) from error
        self._writer = Writer(str(directory))
        self._began: float | None = None

    def track(self, figures: Figures, position: Position) -> None:
        """Write a row. Its time of day is that of the first one, and what has passed since by the run's clock."""
        seconds = position["seconds"]
        if self._began is None:
            self._began = time.time() - seconds
        for axis, step in (("updates", position["updates"]), ("samples", position["samples"])):
            for name, value in figures.items():
                self._writer.add_scalar(f"by {axis}/{name}", value, step, wall_time=self._began + seconds)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def refuse_unusable_tracker(address: str) -> None:
    """Find the tracker and make none: before anything is started that would have to be stopped again.

    Raises:
        UsageError: there is no such tracker.
    """
    _maker(address, {})


class Tracking:
    """Brings rows to a tracker.

    Args:
        address: as `--track` has it.
        settings: of the run, for the tracker to show.
        tell: what sentences go to; the log by default.

    Raises:
        UsageError: there is no such tracker, or it could not be made.
    """

    def __init__(
        self, address: str, settings: Mapping[str, Setting], tell: Callable[[str], object] = _LOG.warning
    ) -> None:
        self._address = address
        self._tell = tell
        self._rows: queue.Queue[tuple[Figures, Position] | None] = queue.Queue(_MOST_WAITING)
        self._given = self._tracked = self._failed = self._left_out = 0
        self._refused: Exception | None = None
        self._made = threading.Event()
        make = _maker(address, dict(settings))
        self._thread = threading.Thread(target=self._work, args=(make,), name="tracker", daemon=True)
        self._thread.start()
        while not self._made.wait(_LOOK_SECONDS):
            leave_if_asked()
        if self._refused is not None:
            raise _not_made(address, self._refused)

    def track(self, figures: Figures, position: Position) -> None:
        """Hand a row over; never waits."""
        self._given += 1
        try:
            self._rows.put_nowait((figures, position))
        except queue.Full:
            self._left_out += 1
            if self._left_out == 1:
                self._tell(
                    f"the tracker {self._address} is {_MOST_WAITING} rows behind: what it has no time for is left out"
                )

    def close(self) -> None:
        """Let the tracker write what is left, some seconds at most, and say what did not get there."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        with contextlib.suppress(queue.Full):
            self._rows.put(None, timeout=_CLOSE_SECONDS)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._tell(f"the tracker {self._address} is not through after {_CLOSE_SECONDS:g} s, and is left alone")
        if self._tracked < self._given:
            missing = self._given - self._tracked
            self._tell(f"{missing} of {self._given} rows did not get to the tracker {self._address}")

    # In its own thread

    def _work(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()
        except Exception as error:  # noqa: BLE001 - a user's code may raise anything
            self._refused = error
            return
        finally:
            self._made.set()
        while (row := self._rows.get()) is not None:
            try:
                tracker.track(*row)
                self._tracked += 1
            except Exception as error:  # noqa: BLE001 - it must not reach the run
                self._note_failure(f"at update {row[1]['updates']}", error)
        try:
            getattr(tracker, "close", lambda: None)()
        except Exception as error:  # noqa: BLE001 - as above
            self._tell(f"the tracker {self._address} failed when it was closed: {_said(error)}")

    def _note_failure(self, where: str, error: Exception) -> None:
        self._failed += 1
        if self._failed == 1:
            self._tell(
                f"the tracker {self._address} failed {where}: {_said(error)}; the run goes on, and further failures "
                "are only counted"
            )
            _LOG.debug("the tracker's traceback", exc_info=error)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _not_made(address: str, error: Exception) -> UsageError:
    if isinstance(error, UsageError):
        return error
    made = UsageError(f"the tracker {address} could not be made ({_said(error)}): correct it, or leave --track out")
    made.__cause__ = error
    return made


def _maker(address: str, settings: dict[str, Setting]) -> Callable[[], Tracker]:
    if address.startswith(TENSORBOARD):
        directory = address.removeprefix(TENSORBOARD)
        if not directory:
            raise UsageError(f"--track {address} names no directory: type {TENSORBOARD}DIR")
        return lambda: TensorBoard(Path(directory))
    factory = _find_factory(address)

    def make() -> Tracker:
        tracker = factory(settings)
        if not callable(getattr(tracker, "track", None)):
            raise UsageError(
                f"--track {address} made {type(tracker).__name__} without a method track(figures, position): it is "
                "called with each row of figures"
            )
        return cast(Tracker, tracker)

    return make


def _find_factory(address: str) -> Callable[[dict[str, Setting]], Any]:
    module_name, _, attribute = address.rpartition(":")
    if not module_name or not attribute:
        raise UsageError(
            f"--track {address!r} names no tracker: expected tensorboard:DIR, or the import path of your own, as in "
            "package.module:Tracker or path/to/file.py:Tracker"
        )
    module = imported(f"the tracker {address!r}", module_name)
    try:
        factory: Callable[[dict[str, Setting]], Any] = operator.attrgetter(attribute)(module)
        inspect.signature(factory).bind({})
    except AttributeError as error:
        raise UsageError(
            f"the tracker {address!r} was not found: its module ({module.__file__}) has no {attribute!r}: put the name "
            "of a class, or of a function, after the colon"
        ) from error
    except (TypeError, ValueError) as error:  # not callable, or nothing is known of its arguments
        raise UsageError(
            f"the tracker {address!r} can't be made ({error}): it must be a class or function that takes one "
            "argument, the run's settings as a dictionary"
        ) from error
    return factory
