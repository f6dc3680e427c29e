"""A run of real processes, traced across a crash."""

from ormo_server.core.inputs import Joined, Pushed
from ormo_server.trace import Segment, read_trace
from system.programs import Stage


def pushes(segment: Segment) -> list[Pushed]:
    return [taken for taken in segment.inputs if isinstance(taken, Pushed)]


def pushes_in(text: str, worker: str) -> int:
    """Of what is in the file so far, which may end in the middle of a row."""
    return sum('"pushed"' in line and f'"{worker}"' in line for line in text.splitlines())


def test_trace_of_a_run_that_was_killed_and_restarted_has_a_segment_for_each_start(stage: Stage) -> None:
    flags = {"trace": "traces/run.jsonl", "min_workers": 2, "checkpoint_seconds": 0.2, "learning_rate": 0.02}
    server = stage.server(**flags)
    for name in ("a", "b"):
        stage.worker(name)
    stage.until(
        lambda s: s.checkpoint_iteration > 0 and [w.applied > 10 for w in s.workers] == [True, True], "two train"
    )
    trace = stage.folder / "traces/run.jsonl"
    # Rows are in the file half a second later, and a kill loses those that are not.
    stage.until(lambda s: all(pushes_in(trace.read_text(), name) for name in "ab"), "rows in the file")
    server.kill()
    server = stage.server(**flags)
    stage.until(lambda s: s.applied > 20, "training after the kill")
    assert server.terminate() == 0

    first, second = read_trace(trace)
    assert [segment.start.fresh for segment in (first, second)] == [True, False]
    assert [type(taken) for taken in first.inputs[:1]] == [Joined]
    assert {taken.requester.worker for taken in pushes(first)} == {"a", "b"}
    assert second.start.iteration > 0
    for segment in (first, second):
        after = [taken.result.iteration for taken in pushes(segment)]
        assert after == [segment.start.iteration + number for number in range(1, len(after) + 1)]
