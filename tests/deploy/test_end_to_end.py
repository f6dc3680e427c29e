"""The stack as it is shipped, watched by a real Prometheus: what breaks is told, and no longer once it is mended.

All durations of the shipped rules, and those of scraping, are divided by `FACTOR`. Nothing else is changed.
"""

import math
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.grafana.dashboards import FILES, filled_in, queries
from deploy.prometheus.prometheus import Prometheus, free_port, prometheus
from deploy.prometheus.shortening import configured, write_targets
from system.programs import Program, Stage, staged

FACTOR = 60
TASKS = Path(__file__).parent / "paced_task.py"
# So that some 70 gradients of the two others come before one of the slow worker: with K = 3, more than 16 K.
SLOWER = 45
# Longer than any window of a shortened rule with its `for`, on a machine that is busy.
PATIENCE_SECONDS = 60.0

pytestmark = pytest.mark.timeout(300)


class Run:
    """A server and its workers, started as anybody would."""

    def __init__(self, stage: Stage, task: str = "Paced", **flags: object) -> None:
        self.stage = stage
        self.task = f"{TASKS}:{task}"
        self.server = stage.server(
            metrics_listen="127.0.0.1:0",
            checkpoint_seconds=1.0,
            failure_timeout_seconds=2.0,
            learning_rate=1e-4,
            **flags,
        )

    @property
    def instance(self) -> str:
        return self.stage.metrics

    def worker(self, name: str, **flags: object) -> Program:
        return self.stage.worker(name, **{"task": self.task, "failure_timeout_seconds": 2.0} | flags)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Three workers, one of them slow, and an evaluator; one of the workers exports metrics of its own."""
    with staged(tmp_path_factory.mktemp("run")) as stage:
        yield Run(stage, mirror=tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="module")
def watched(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    worker, evaluator = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    folder = tmp_path_factory.mktemp("prometheus") / "configuration"
    targets = {"ormo-server": [run.instance], "ormo-worker": [worker], "ormo-evaluator": [evaluator]}
    with prometheus(configured(folder, targets, factor=FACTOR)) as running:
        run.worker("fast", metrics_listen=worker)
        run.worker("steady")
        run.worker("slow", slow_factor=SLOWER)
        run.stage.evaluator("evaluator", task=run.task, metrics_listen=evaluator, every_seconds=0.5)
        running.until_up(*targets)
        yield running


def until_firing(watched: Prometheus, instance: str, *names: str) -> None:
    def firing() -> bool:
        found = {alert.name for alert in watched.alerts(state="firing") if alert.labels["instance"] == instance}
        return set(names) <= found

    watched.until(firing, f"{names} firing for {instance}", seconds=PATIENCE_SECONDS)


def until_resolved(watched: Prometheus, instance: str, *names: str) -> None:
    def resolved() -> bool:
        return not [a for a in watched.alerts() if a.labels["instance"] == instance and a.name in names]

    watched.until(resolved, f"{names} resolved for {instance}", seconds=PATIENCE_SECONDS)


def test_every_rule_evaluates(watched: Prometheus) -> None:
    watched.until(lambda: all(rule.health != "unknown" for rule in watched.rules()), "all evaluated", seconds=20)
    rules = watched.rules()
    assert {rule.health for rule in rules} == {"ok"}, [(rule.name, rule.last_error) for rule in rules]
    assert {rule.type for rule in rules} == {"alerting", "recording"}


# Queries that rightly find nothing in this run, by what they ask for.
NOT_HERE = {
    "ormo_worker_gpu_memory_bytes": "there is no GPU",
    "ormo_worker_retries_total": "nothing had to be tried again",
    "ormo_staleness_bound_iterations": "the method has no bound",
    "ormo_discard_limit_iterations": "the method discards nothing",
    "ormo_journal_commit_seconds": "this run has no journal; a later one has",
    "ormo_worker_local_steps": "these workers push gradients; those of a later run make local steps",
    "ormo_refusals_total": "only reasons that have occurred are shown, and none has",
    "changes(": "no server was started again",
    'ALERTS{alertstate="firing"': "nothing is wrong yet",
}


def without_data(watched: Prometheus, run: Run, about: str = "") -> list[str]:
    """Queries about this, or about all that is here, that find no number; a quantile of no calls is none."""
    found = []
    for query in (query for file in FILES for query in queries(file)):
        if about not in query.expression or (not about and any(words in query.expression for words in NOT_HERE)):
            continue
        expression = filled_in(query.expression, job="ormo-server", instance=run.instance, interval="5s")
        samples = watched.query(expression)
        if not any(math.isfinite(sample.value) for sample in samples):
            found.append(f"{query.dashboard}, {query.where}: {expression}: {samples}")
    return found


def test_every_query_of_every_dashboard_returns_data(run: Run, watched: Prometheus) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (missing := without_data(watched, run)) and time.monotonic() < deadline:
        time.sleep(1)
    assert missing == []


def test_slow_worker_s_delay_fires_and_its_leaving_resolves_it(run: Run, watched: Prometheus) -> None:
    until_firing(watched, run.instance, "OrmoDelayHigh")
    assert watched.firing() == {"OrmoDelayHigh"}, "a run that trains has nothing else to tell"
    (slow,) = [program for program in run.stage.programs if program.name == "slow"]
    assert slow.terminate() == 0
    until_resolved(watched, run.instance, "OrmoDelayHigh")


def test_killed_worker_fires_and_its_return_resolves_it(run: Run, watched: Prometheus) -> None:
    (steady,) = [program for program in run.stage.programs if program.name == "steady"]
    run.worker("third")
    run.stage.until(lambda status: len(status.workers) == 3, "a third worker")
    live = f'ormo_live_workers{{instance="{run.instance}"}}'  # a loss is one from what was seen before
    watched.until(lambda: [it.value for it in watched.query(live)] == [3.0], "three seen", seconds=PATIENCE_SECONDS)
    steady.kill()
    until_firing(watched, run.instance, "OrmoWorkersLost")
    run.worker("steady-again", worker_id="steady")
    until_resolved(watched, run.instance, "OrmoWorkersLost")


def test_disk_that_takes_no_checkpoint_fires_and_resolves_when_it_does_again(run: Run, watched: Prometheus) -> None:
    server = run.server.process.pid
    limits = resource.prlimit(server, resource.RLIMIT_FSIZE)
    resource.prlimit(server, resource.RLIMIT_FSIZE, (0, limits[1]))  # not a byte into any file
    until_firing(watched, run.instance, "OrmoCheckpointFailing", "OrmoCheckpointTooOld")
    assert run.stage.status().phase == run.stage.status().PHASE_TRAINING
    resource.prlimit(server, resource.RLIMIT_FSIZE, limits)
    until_resolved(watched, run.instance, "OrmoCheckpointFailing", "OrmoCheckpointTooOld")


def test_local_steps_have_data_in_the_dashboards(run: Run, watched: Prometheus, tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        local = Run(stage, method="local-ormo", local_steps=2)
        write_targets(watched.log.parent, "ormo-server", [run.instance, local.instance])
        local.worker("local", inner="adamw")
        watched.until(
            lambda: not without_data(watched, local, "local_steps"), "data of local steps", seconds=PATIENCE_SECONDS
        )
    write_targets(watched.log.parent, "ormo-server", [run.instance])


def test_worker_that_computes_nan_fires_and_a_sound_one_resolves_it(
    run: Run, watched: Prometheus, tmp_path: Path
) -> None:
    with staged(tmp_path) as stage:
        broken = Run(stage, journal=True)
        write_targets(watched.log.parent, "ormo-server", [run.instance, broken.instance])
        spoiled = broken.worker("spoiled", task=f"{TASKS}:Spoiled")
        until_firing(watched, broken.instance, "OrmoNonFiniteGradients", "OrmoNoProgress")
        assert stage.status().iteration.number == 0
        spoiled.terminate()
        broken.worker("sound")
        until_resolved(watched, broken.instance, "OrmoNonFiniteGradients", "OrmoNoProgress")
        watched.until(lambda: not without_data(watched, broken, "ormo_journal_"), "data of its journal", seconds=20)
        stops_and_goes_on(broken, watched)
    write_targets(watched.log.parent, "ormo-server", [run.instance])


def stops_and_goes_on(run: Run, watched: Prometheus) -> None:
    """A server that hangs is down; when it goes on, so does the run."""
    os.kill(run.server.process.pid, signal.SIGSTOP)
    try:
        until_firing(watched, run.instance, "OrmoServerDown")
    finally:
        os.kill(run.server.process.pid, signal.SIGCONT)
    until_resolved(watched, run.instance, "OrmoServerDown")
    reached = run.stage.status().iteration.number
    run.stage.until(lambda status: status.iteration.number > reached, "it goes on")
