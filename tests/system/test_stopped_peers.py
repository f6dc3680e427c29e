"""Peers that stop without a word, as real processes: the others go on within the failure timeout, and so do they."""

import os
import signal
from typing import Any

import pytest

from system.programs import Stage

LEASE = 1.5
WAITING: dict[str, dict[str, Any]] = {
    "synchronous": {"method": "ssgd"},
    "bounded-staleness": {"method": "asgd", "scheduler": "bounded-staleness", "staleness_bound": 1},
}


def training(stage: Stage, **flags: Any) -> None:
    stage.server(failure_timeout_seconds=LEASE, learning_rate=0.01, min_workers=2, **flags)


@pytest.mark.parametrize("scheduler", WAITING)
def test_nobody_waits_for_a_stopped_worker_beyond_its_lease_and_it_comes_back(stage: Stage, scheduler: str) -> None:
    training(stage, **WAITING[scheduler])
    stopped, other = (stage.worker(name, failure_timeout_seconds=LEASE) for name in ("stopped", "other"))
    stage.until(lambda s: s.iteration.number > 20 and len(s.workers) == 2, "both train")
    os.kill(stopped.process.pid, signal.SIGSTOP)
    try:
        alone = stage.until(lambda s: [w.worker for w in s.workers] == ["other"], "the lease ends")
        stage.until(lambda s: s.iteration.number > alone.iteration.number + 20, "the other one trains alone")
    finally:
        os.kill(stopped.process.pid, signal.SIGCONT)
    stage.until(lambda s: any(w.worker == "stopped" and w.applied > 5 for w in s.workers), "it takes part again")
    assert [stopped.process.poll(), other.process.poll()] == [None, None]


@pytest.mark.parametrize("scheduler", WAITING)
def test_nobody_waits_for_a_worker_that_hangs_beyond_the_ticket_timeout(stage: Stage, scheduler: str) -> None:
    training(stage, ticket_timeout_seconds=1.0, **WAITING[scheduler])
    stage.worker("hung", slow_factor=1e6, failure_timeout_seconds=LEASE)
    stage.worker("other", failure_timeout_seconds=LEASE)
    status = stage.until(lambda s: s.iteration.number > 10, "the other one goes on")
    assert sorted(worker.worker for worker in status.workers) == ["hung", "other"], "its heartbeats keep it a member"


def test_workers_go_on_when_a_stopped_server_does(stage: Stage) -> None:
    server = stage.server(failure_timeout_seconds=LEASE, learning_rate=0.01)
    workers = [stage.worker(name, failure_timeout_seconds=LEASE) for name in ("a", "b")]
    before = stage.until(lambda s: s.iteration.number > 20 and len(s.workers) == 2, "both train")
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        signal.sigtimedwait([], 2 * LEASE)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    after = stage.until(
        lambda s: s.iteration.number > before.iteration.number + 50 and len(s.workers) == 2, "both train again"
    )
    assert after.iteration.epoch == before.iteration.epoch
    assert [worker.process.poll() for worker in workers] == [None, None]


def test_workers_warn_of_a_server_that_is_killed_and_not_of_one_that_stops_in_order(stage: Stage) -> None:
    def both_train() -> None:
        stage.until(lambda s: [w.applied > 0 for w in s.workers] == [True, True], "both train")

    def warnings() -> list[int]:
        return [worker.log.read_text().count(" WARNING ") for worker in workers]

    server = stage.server(learning_rate=0.01)
    # A slow one is between two exchanges when the server stops, and is told nothing but that its stream has ended.
    workers = [stage.worker("fast"), stage.worker("slow", slow_factor=20.0)]
    both_train()
    assert server.terminate() == 0
    server = stage.server(learning_rate=0.01)
    both_train()
    assert warnings() == [0, 0]
    server.kill()
    stage.server(learning_rate=0.01)
    both_train()
    assert all(warnings())
