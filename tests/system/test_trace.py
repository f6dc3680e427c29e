"""Runs of real processes, traced across a crash, and while a worker is stopped."""

import os
import signal

from ormo_server.core.effects import Redeemed
from ormo_server.core.inputs import Input, Join, Push
from ormo_server.sim.plan import Plan
from ormo_server.sim.settings import SimSettings
from ormo_server.store.checkpoints import read_files
from ormo_server.trace import Recorded, Segment, read_trace
from system.programs import Stage


def inputs(segment: Segment) -> list[Input]:
    return [entry.input for entry in segment.inputs if isinstance(entry, Recorded)]


def redeemed(segment: Segment) -> list[Redeemed]:
    entries = [entry for entry in segment.inputs if isinstance(entry, Recorded)]
    return [entry.redeemed for entry in entries if entry.redeemed is not None]


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
    assert [type(given) for given in inputs(first)[:1]] == [Join]
    assert {given.worker for given in inputs(first) if isinstance(given, Push)} == {"a", "b"}
    assert second.start.iteration > 0
    for segment in (first, second):
        after = [each.iteration_after for each in redeemed(segment)]
        assert after == [segment.start.iteration + number for number in range(1, len(after) + 1)]


def test_run_of_a_worker_that_was_stopped_for_longer_than_its_lease_is_followed_to_the_same_bits(stage: Stage) -> None:
    lease = {"failure_timeout_seconds": 1.5}
    server = stage.server(trace="run.jsonl", learning_rate=0.01, min_workers=2, **lease)
    stopped, _ = (stage.worker(name, slow_factor=8, **lease) for name in "ab")
    stage.until(lambda s: s.iteration.number > 20, "both train")
    os.kill(stopped.process.pid, signal.SIGSTOP)
    try:
        stage.until(lambda s: [w.worker for w in s.workers] == ["b"], "the lease ends")
    finally:
        os.kill(stopped.process.pid, signal.SIGCONT)
    # The run goes on for as long as it takes to come back, and no longer: the other one is never waited for.
    stage.until(lambda s: "a" in [w.worker for w in s.workers if w.applied > 0], "it trains again")
    assert server.terminate() == 0
    (segment,) = read_trace(stage.folder / "run.jsonl")
    assert [given.worker for given in inputs(segment) if isinstance(given, Join)][2:] == ["a"]
    kept = read_files(max((stage.folder / "run").glob("checkpoint-*"))).snapshot
    settings = SimSettings(trace=stage.folder / "run.jsonl", evaluate_every_gradients=1000)
    state = Plan(settings).run().training.machine.state
    followed = {"params": state.params, "float_buffers": state.float_buffers, "int_buffers": state.int_buffers}
    assert {name: followed[name].numpy().tobytes() for name in followed} == {
        name: kept.tensors[name].numpy().tobytes() for name in followed
    }
