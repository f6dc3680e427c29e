"""Rows get to the tracker that was named, and nothing that it does gets back to the run."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ormo_runtime import tracking
from ormo_runtime.settings import UsageError
from ormo_runtime.tracking import Position, Tracking, refuse_unusable_tracker

MINE = """
import threading
rows, threads, closed, release = [], set(), [], threading.Event()
class Tracker:
    def __init__(self, settings):
        threads.add(threading.current_thread().name)
        self.settings = settings
    def track(self, figures, position):
        threads.add(threading.current_thread().name)
        if figures.get("bad"):
            raise ValueError("no room")
        rows.append((figures, position, self.settings))
    def close(self):
        threads.add(threading.current_thread().name)
        closed.append(len(rows))
class Hanging(Tracker):
    def track(self, figures, position):
        release.wait(60)
class NeverClosed:
    def __init__(self, settings):
        pass
    def track(self, figures, position):
        rows.append(position["updates"])
def broken(settings):
    raise KeyError("WANDB_API_KEY")
def nothing(settings):
    return settings
def demanding(settings, more):
    return None
number = 7
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "mine_tracked.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("mine_tracked", None)


def at(updates: int) -> Position:
    return Position(updates=updates, samples=32 * updates, seconds=0.5 * updates)


def test_rows_and_settings_get_to_a_tracker_of_ones_own_in_one_thread() -> None:
    told: list[str] = []
    mine = Tracking("mine_tracked.py:Tracker", {"method": "ormo"}, told.append)
    mine.track({"test_loss": 0.5}, at(1))
    mine.track({"test_loss": 0.25}, at(2))
    mine.close()
    module = sys.modules["mine_tracked"]
    assert module.rows == [
        ({"test_loss": 0.5}, {"updates": 1, "samples": 32, "seconds": 0.5}, {"method": "ormo"}),
        ({"test_loss": 0.25}, {"updates": 2, "samples": 64, "seconds": 1.0}, {"method": "ormo"}),
    ]
    assert module.closed == [2]
    assert module.threads == {"tracker"}
    assert told == []
    assert "tracker" not in {thread.name for thread in threading.enumerate()}


def test_a_tracker_without_close_has_all_rows() -> None:
    mine = Tracking("mine_tracked:NeverClosed", {})
    mine.track({}, at(3))
    mine.close()
    assert sys.modules["mine_tracked"].rows == [3]


def test_what_fails_is_told_once_counted_and_tried_again() -> None:
    told: list[str] = []
    mine = Tracking("mine_tracked:Tracker", {}, told.append)
    for updates, bad in enumerate([1, 1, 0, 1, 0]):
        mine.track({"bad": bad}, at(updates))
    mine.close()
    assert [row[1]["updates"] for row in sys.modules["mine_tracked"].rows] == [2, 4]
    assert told == [
        "the tracker mine_tracked:Tracker failed at update 0: ValueError: no room; the run goes on, and further "
        "failures are only counted",
        "3 of 5 rows did not get to the tracker mine_tracked:Tracker",
    ]


def test_a_tracker_that_hangs_holds_up_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_MOST_WAITING", 3)
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 0.2)
    told: list[str] = []
    mine = Tracking("mine_tracked:Hanging", {}, told.append)
    for updates in range(10):
        mine.track({}, at(updates))
    mine.close()
    sys.modules["mine_tracked"].release.set()
    assert told == [
        "the tracker mine_tracked:Hanging is 3 rows behind: what it has no time for is left out",
        "the tracker mine_tracked:Hanging is not through after 0.2 s, and is left alone",
        "10 of 10 rows did not get to the tracker mine_tracked:Hanging",
    ]


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("tensorboard", r"--track 'tensorboard' names no tracker: expected tensorboard:DIR, or the import path"),
        ("tensorboard:", r"--track tensorboard: names no directory: type tensorboard:DIR"),
        ("no_such_module:Tracker", r"the tracker 'no_such_module:Tracker' can't be imported \(No module named"),
        ("gone.py:Tracker", r"the tracker 'gone.py:Tracker' names the file .*gone.py, which does not exist"),
        ("mine_tracked:Tracked", r"its module \(.*mine_tracked.py\) has no 'Tracked': put the name of a class"),
        ("mine_tracked:number", r"can't be made \(7 is not a callable object\): it must be a class or function that"),
        ("mine_tracked:demanding", r"can't be made \(missing a required argument: 'more'\)"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_sentence(address: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        refuse_unusable_tracker(address)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "broken",
            r"mine_tracked:broken could not be made \(KeyError: 'WANDB_API_KEY'\): correct it, or leave --track",
        ),
        ("nothing", r"--track mine_tracked:nothing made dict without a method track\(figures, position\)"),
    ],
)
def test_a_tracker_that_can_not_be_made_is_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Tracking(f"mine_tracked:{name}", {})


def test_without_tensorboard_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UsageError, match=r"--track tensorboard:here needs TensorBoard, .*: pip install tensorboard$"):
        Tracking("tensorboard:here", {})
