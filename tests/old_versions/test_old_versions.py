"""What earlier versions wrote restores and replays to the same bits. How it was written: `recorded`."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from old_versions.recorded import WRITTEN
from ormo_runtime.settings import UsageError
from ormo_server.core import snapshot
from ormo_server.core.machine import StateMachine
from ormo_server.core.snapshot import Snapshot
from ormo_server.service.server import Server
from ormo_server.settings import ServerSettings, TrainingSettings
from ormo_server.sim.plan import Plan
from ormo_server.sim.settings import SimSettings
from ormo_server.store import StoreError
from ormo_server.store.checkpoints import Checkpoint, read_files
from service.wire import served
from store.building import reseal

RUNS = [pytest.param(run, id=f"{run.name} of {run.parent.name}") for run in sorted(WRITTEN.glob("*/*"))]
assert RUNS
# What each server has of its own.
OWN = ("epoch", "waiting")


def settings_of(run: Path) -> dict[str, Any]:
    given = json.loads((run / "settings.json").read_text())
    return {ServerSettings.renamed.get(name, name): value for name, value in given.items()}


@contextmanager
def restored(run: Path, place: Path, **changes: Any) -> Iterator[Server]:
    """A server that goes on with a copy of the run's folder."""
    shutil.copytree(run / "run", place)
    with served(place, journal=True, **settings_of(run) | changes) as server:
        yield server


def bits(taken: Snapshot) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in taken.tensors.items()}


def told_by(expected: Any, found: Any) -> Any:
    """Of what was found, what the earlier version knew of: later ones may add fields."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return {key: told_by(value, found[key]) for key, value in expected.items()}
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [told_by(*pair) for pair in zip(expected, found, strict=True)]
    return list(found) if isinstance(found, tuple) else found


def fields(kept: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kept.items() if name not in OWN}


def expected(run: Path) -> Checkpoint:
    return read_files(run / "restored")


def assert_same(machine: StateMachine, checkpoint: Checkpoint) -> None:
    taken = snapshot.take(machine)
    assert bits(taken) == bits(checkpoint.snapshot)
    kept = fields(checkpoint.snapshot.fields)
    assert told_by(kept, json.loads(json.dumps(fields(taken.fields)))) == kept


def follow(run: Path) -> StateMachine:
    """A simulation that goes by the run's trace, at its end."""
    plan = Plan(
        SimSettings(trace=run / "trace.jsonl", workload="old_versions.recorded:workload", evaluate_every_gradients=1000)
    )
    return plan.run().training.machine


@pytest.mark.parametrize("run", RUNS)
def test_a_checkpoint_and_its_journal_restore_to_the_same_bits(run: Path, tmp_path: Path) -> None:
    checkpoint = expected(run)
    assert checkpoint.snapshot.fields["tickets"], "a run without tickets in flight would show less"
    with restored(run, tmp_path / "run") as server, server.host.engine.inspect() as machine:
        assert_same(machine, checkpoint)
    assert not list(tmp_path.glob("run/journal-damaged*"))


def test_a_run_keeps_the_delay_threshold_that_it_began_with_unless_another_is_set(tmp_path: Path) -> None:
    def in_force(server: Server) -> float:
        with server.host.engine.inspect() as machine:
            return machine.run.method.delay_threshold

    run = WRITTEN / "8d2ce78" / "asgd-da"
    unset = settings_of(run) | {"journal": True, "delay_threshold": None}
    with restored(run, tmp_path / "run") as server:
        assert in_force(server) == 2.0
    with served(tmp_path / "run", **unset) as server:  # from what the newer one wrote
        assert in_force(server) == 2.0
    with served(tmp_path / "run", **unset | {"delay_threshold": 1.5}) as server:
        assert in_force(server) == 1.5
    with served(tmp_path / "new", **unset | {"model": tmp_path / "run" / "latest"}) as server:
        assert in_force(server) == 1.0


@pytest.mark.parametrize("run", RUNS)
def test_a_checkpoint_comes_back_as_it_was_read(run: Path) -> None:
    checkpoint = expected(run)
    of_training = {name: value for name, value in settings_of(run).items() if name in TrainingSettings.model_fields}
    machine = snapshot.resume(TrainingSettings(**of_training).run(), read_files(run / "restored").snapshot)
    assert_same(machine, checkpoint)


@pytest.mark.parametrize("run", RUNS)
def test_a_trace_is_followed_to_the_same_bits(run: Path) -> None:
    checkpoint = expected(run)
    state = follow(run).state
    vectors = {"params": state.params} | {f"rule.{name}": vector for name, vector in state.rule.vectors.items()}
    followed = {name: vector.numpy().tobytes() for name, vector in vectors.items()}
    assert followed == {name: found for name, found in bits(checkpoint.snapshot).items() if name in followed}
    assert (state.iteration, state.newest_bucket, state.next_ticket) == tuple(
        checkpoint.snapshot.fields[name] for name in ("iteration", "newest_bucket", "next_ticket")
    )


def copied(run: Path, place: Path, **rules: bool) -> Path:
    """The run's folder and trace, with another rule written where they say which is in force, or none."""
    shutil.copytree(run, place)
    (checkpoint,) = (place / "run").glob("checkpoint-*")
    document = checkpoint / "checkpoint.json"
    kept = json.loads(document.read_text())
    first, *inputs = (place / "trace.jsonl").read_text().splitlines()
    start = json.loads(first)
    for settings in (kept["settings"], start["settings"]):
        settings.pop("waits_for_idle", None)
        settings.update(rules)
    document.write_text(json.dumps(kept))
    reseal(checkpoint)
    lines = [json.dumps(start, separators=(",", ":")), *inputs]
    (place / "trace.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return place


@pytest.mark.parametrize(("version", "other"), [("b649548", {"waits_for_idle": False}), ("dd9ef9f", {})])
def test_rounds_are_done_again_by_the_rule_that_the_files_name_and_not_by_the_other(
    version: str, other: dict[str, bool], tmp_path: Path
) -> None:
    run = copied(WRITTEN / version / "idle", tmp_path / "other", **other)
    with pytest.raises(StoreError, match="can't be repeated as it was"), restored(run, tmp_path / "run"):
        pass
    with pytest.raises(UsageError, match=r"input \d+ of the trace does not fit"):
        follow(run)
