"""A worker that is several processes: they reduce among themselves, and are one worker to the server."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from system import group_loop
from system.forked import Forked
from system.programs import ENVIRONMENT, Stage

RATE, MOMENTUM = 0.05, 0.9


class Group:
    """The ranks of one worker, as processes."""

    def __init__(self, stage: Stage, ranks: int, **options: Any) -> None:
        self.options = {"address": stage.address, "ranks": ranks, "store": "store"} | options
        self.stage = stage
        self.ranks = [self._rank(rank) for rank in range(ranks)]

    def _rank(self, rank: int) -> Forked:
        own = self.options | {"rank": rank}
        own |= own.pop(f"rank_{rank}", {})
        script, log = Path(group_loop.__file__), self.stage.folder / f"rank-{rank}.log"
        return Forked(script, [json.dumps(own)], folder=self.stage.folder, log=log, environment=ENVIRONMENT)

    def results(self, seconds: float = 60.0) -> list[dict[str, Any]]:
        """The last thing that each of them printed; nothing of one that was killed."""
        said = []
        for number, rank in enumerate(self.ranks):
            lines = rank.stdout.read().splitlines()
            rank.wait(seconds)
            log = (self.stage.folder / f"rank-{number}.log").read_text()
            assert lines or rank.poll() == -9, log
            said.append(json.loads(lines[-1]) if lines else {})
        return said

    def close(self) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait(10)
            rank.stdout.close()


@pytest.fixture
def groups() -> Iterator[list[Group]]:
    made: list[Group] = []
    yield made
    for group in made:
        group.close()


def started(groups: list[Group], stage: Stage, ranks: int = 2, **options: Any) -> Group:
    groups.append(Group(stage, ranks, **options))
    return groups[-1]


def served_model(stage: Stage, **options: Any) -> nn.Module:
    model = group_loop.Model(**options)
    model.load_state_dict(safetensors.torch.load_file(stage.model()), strict=True)
    return model


def test_ranks_push_one_gradient_a_step_that_is_the_one_of_all_their_samples(stage: Stage, groups: list[Group]) -> None:
    server = stage.server(learning_rate=RATE, momentum=MOMENTUM, stop_after_gradients=12)
    results = [said["result"] for said in started(groups, stage, 3).results()]
    assert [result["steps"] for result in results] == [12] * 3
    assert all(result == results[0] | {"rank": 0} for result in results)
    assert results[0]["finished"]
    assert (results[0]["counted"], results[0]["progress"]) == (12, 1.0)
    status = stage.status()
    assert (status.applied, status.samples) == (12, 12 * 3 * group_loop.PER_RANK)
    assert "K is 1" in server.log.read_text()
    assert "K is 2" not in server.log.read_text()
    assert server.terminate() == 0
    torch.manual_seed(0)  # rank 0's
    alone = group_loop.Model()
    optimizer = torch.optim.SGD(alone.parameters(), lr=RATE, momentum=MOMENTUM)
    for step in range(12):
        optimizer.zero_grad()
        loss = group_loop.loss_of(alone, group_loop.batch(step, 3))
        loss.backward()
        optimizer.step()
    assert status.loss == pytest.approx(loss.item(), rel=1e-4)
    trained = served_model(stage)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def same_digests(results: list[dict[str, Any]]) -> int:
    """How many models the ranks have had, each of which was the same in all, bit by bit."""
    assert all(result["digests"] == results[0]["digests"] for result in results)
    return len(set(results[0]["digests"]))


def test_ranks_with_batch_norm_and_two_in_flight_have_the_same_bits_after_each_step_and_reload(
    stage: Stage, groups: list[Group]
) -> None:
    stage.server(learning_rate=RATE, momentum=MOMENTUM, stop_after_gradients=10)
    group = started(groups, stage, batch_norm=True, in_flight=2, reloads_at=4)
    results = [said["result"] for said in group.results()]
    assert same_digests(results) >= 10
    assert [result["iteration"] for result in results] == [10, 10]
    assert stage.status().samples == 10 * 2 * group_loop.PER_RANK


def test_ranks_with_an_inner_optimizer_make_the_same_local_steps_and_push_their_sum_once(
    stage: Stage, groups: list[Group]
) -> None:
    stage.server(method="local-ormo", local_steps=4, stop_after_gradients=3)
    results = [said["result"] for said in started(groups, stage, inner=True).results()]
    assert same_digests(results) == 1 + 3 * 4
    assert [(result["steps"], result["counted"]) for result in results] == [(12, 3)] * 2
    assert stage.status().samples == 3 * 4 * 2 * group_loop.PER_RANK


def test_a_group_that_leaves_between_two_pushes_pushes_what_it_has(stage: Stage, groups: list[Group]) -> None:
    stage.server(method="local-ormo", local_steps=4)
    results = [said["result"] for said in started(groups, stage, inner=True, steps=6).results()]
    same_digests(results)
    status = stage.status()
    assert (status.applied, len(status.workers)) == (2, 0)
    assert status.samples == 6 * 2 * group_loop.PER_RANK


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_is_killed_ends_its_group_and_the_run_goes_on(stage: Stage, groups: list[Group], dies: int) -> None:
    stage.server(learning_rate=RATE, failure_timeout_seconds=5.0)
    group = started(groups, stage, **{f"rank_{dies}": {"dies_at": 3}})
    other = group.results()[1 - dies]
    assert group.ranks[1 - dies].poll() == 1
    assert other["seconds"] < 40  # as soon as its connection ends; the group's timeout is a minute
    stage.until(lambda status: not status.workers, "nobody of that group is in the run")
    assert 2 <= stage.status().applied <= 3
    assert [said["result"]["steps"] for said in started(groups, stage, store="again", steps=2).results()] == [2, 2]


def test_a_server_that_is_killed_loses_nothing_and_the_group_goes_on(stage: Stage, groups: list[Group]) -> None:
    flags = {"learning_rate": RATE, "journal": True, "checkpoint_seconds": 3600, "stop_after_gradients": 200}
    server = stage.server(**flags)
    group = started(groups, stage, step_timeout=8)
    stage.until(lambda status: status.applied >= 5, "the group trains")
    server.kill()
    with pytest.raises(subprocess.TimeoutExpired):  # a server that is away for longer is no rank that is gone
        group.ranks[1].wait(10)
    stage.server(**flags)
    results = [said["result"] for said in group.results()]
    assert same_digests(results) > 190
    assert [(result["iteration"], result["finished"]) for result in results] == [(200, True)] * 2
    assert stage.status().samples == 200 * 2 * group_loop.PER_RANK


def errors(group: Group) -> list[str]:
    return [said["said"] for said in group.results()]


@pytest.mark.parametrize("ddp", [None, "late"])
def test_ranks_of_a_parallel_model_that_are_not_said_to_be_one_worker_do_not_push_one_gradient_twice(
    stage: Stage, groups: list[Group], ddp: str | None
) -> None:
    stage.server(failure_timeout_seconds=5.0)
    refused = errors(started(groups, stage, process_group=False, ddp=ddp))[1]
    for said in (refused, (stage.folder / "rank-0.log").read_text()):
        assert "the model is in a DistributedDataParallel of 2 ranks, which have the same gradient" in said
        assert "process_group=torch.distributed.group.WORLD" in said
    stage.until(lambda status: not status.workers, "nobody is in the run")
    assert stage.status().applied <= 1


def test_ranks_whose_gradients_are_not_reduced_are_told_so_before_any_is_pushed(
    stage: Stage, groups: list[Group]
) -> None:
    stage.server()
    for said in errors(started(groups, stage, ddp="none")):
        assert said.startswith("the gradient of rank 1 of this worker's ranks is not that of rank 0: put the model")
    assert stage.status().applied == 0


def test_an_error_of_rank_0_is_the_error_of_all(stage: Stage, groups: list[Group]) -> None:
    stage.server()
    group = started(groups, stage, inner=True)  # at a server without local steps
    said = group.results()
    assert [each["error"] for each in said] == ["Refused"] * 2
    assert said[0]["said"] == said[1]["said"]
    assert "start ormo-server with --local-steps, or leave out inner=" in said[1]["said"]
