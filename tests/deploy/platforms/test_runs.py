"""A run as it is deployed: it trains, and goes on after whatever happens to its containers.

The same tests for each platform, in this order, of one run: `make test-containers` has those of Compose,
`make test-cluster` those of the cluster that KUBECONFIG names.
"""

import os
import time
from collections.abc import Callable

import pytest
import yaml

from deploy.docker.tree import ROOT
from deploy.platforms import engine, inside, kubectl
from deploy.platforms.checks import lost, not_json, unclean, unconfined, unhealthy
from deploy.platforms.platform import NotHere, Platform

if not {engine.VARIABLE, kubectl.VARIABLE} & set(os.environ):
    pytest.skip("`make test-containers` and `make test-cluster` do", allow_module_level=True)
pytestmark = pytest.mark.timeout(600)
MORE = 50  # gradients, that say that training gets on


def until(run: Platform, condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + run.patience_seconds
    while not _holds(condition):
        assert time.monotonic() < deadline, f"not within {run.patience_seconds:g} s: {what}"
        time.sleep(0.5)


def _holds(condition: Callable[[], bool]) -> bool:
    """A container that is on its way answers nothing yet."""
    try:
        return condition()
    except (AssertionError, ValueError):
        return False


def iteration(run: Platform) -> float:
    return inside.metrics(run, run.server)["ormo_iteration"]


def trains(run: Platform, workers: int) -> None:
    """All workers are there, and gradients are applied."""
    until(run, lambda: inside.metrics(run, run.server)["ormo_live_workers"] == workers, f"{workers} live workers")
    began = iteration(run)
    until(run, lambda: iteration(run) >= began + MORE, f"{MORE} gradients more than {began:.0f}")


def workers_of(run: Platform) -> int:
    return len(run.pods("worker"))


def test_everything_gets_healthy_and_trains(run: Platform) -> None:
    until(run, lambda: not unhealthy({pod: run.is_healthy(pod) for pod in run.all_pods()}), "all are healthy")
    trains(run, workers_of(run))
    assert unhealthy({pod: run.is_healthy(pod) for pod in run.all_pods()}) == []
    assert all(run.pods(role) for role in ("server", "worker", "evaluator"))


def test_evaluator_tells_how_good_the_model_is(run: Platform) -> None:
    until(run, lambda: inside.metrics(run, run.server)["ormo_test_iteration"] > 0, "an evaluation")


def test_prometheus_scrapes_all_targets_and_evaluates_every_shipped_rule(run: Platform) -> None:
    try:
        prometheus = run.prometheus()
    except NotHere as reason:
        pytest.skip(str(reason))
    prometheus.until_up("ormo-server", "ormo-evaluator", seconds=run.patience_seconds)
    prometheus.until(
        lambda: "unknown" not in {rule.health for rule in prometheus.rules()},
        "every rule is evaluated",
        seconds=run.patience_seconds,
    )
    assert [rule for rule in prometheus.rules() if rule.health != "ok"] == []
    assert sorted(rule.name for rule in prometheus.rules()) == sorted(shipped_rules())
    assert prometheus.firing() == set()


def shipped_rules() -> list[str]:
    files = (yaml.safe_load(path.read_text()) for path in (ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
    rules = [rule for file in files for group in file["groups"] for rule in group["rules"]]
    return [rule.get("alert") or rule["record"] for rule in rules]


def test_every_container_is_confined_and_within_its_limits(run: Platform) -> None:
    found = {pod: inside.facts(run, pod) for pod in run.all_pods()}
    assert [sentence for pod, facts in found.items() for sentence in unconfined(pod, facts)] == []


def test_server_that_crashes_comes_back_with_all_that_was_acknowledged(run: Platform) -> None:
    workers, server, before = workers_of(run), run.server, iteration(run)
    lives = run.lives(server)
    inside.kill(run, server)
    until(run, lambda: run.lives(server) > lives and run.is_healthy(server), "another life of the server")
    assert lost(before, iteration(run)) == []
    trains(run, workers)


def test_worker_that_crashes_is_replaced(run: Platform) -> None:
    workers = workers_of(run)
    inside.kill(run, run.pods("worker")[0])
    trains(run, workers)


def test_worker_that_is_evicted_leaves_at_once_and_is_replaced(run: Platform) -> None:
    workers = workers_of(run)
    assert unclean([run.evict(run.pods("worker")[-1])]) == []
    trains(run, workers)


def test_worker_that_is_cut_off_loses_its_lease_and_joins_again(run: Platform) -> None:
    workers = workers_of(run)
    try:
        with run.cut_off(run.pods("worker")[0]):
            trains(run, workers - 1)
    except NotHere as reason:
        pytest.skip(str(reason))
    trains(run, workers)


def test_scale_is_followed_both_ways(run: Platform) -> None:
    workers = workers_of(run)
    for wanted in (workers + 1, workers - 1, workers):
        run.scale(wanted)
        trains(run, wanted)


def test_renewed_certificates_are_served_without_a_restart(run: Platform) -> None:
    if not run.guarded:
        pytest.skip("nobody has a certificate here")
    server, workers = run.server, workers_of(run)
    lives, shown = run.lives(server), inside.certificate(run, server)
    run.replace_certificates()
    until(run, lambda: inside.certificate(run, server) != shown, "another certificate")
    run.scale(workers + 1)  # who joins from now on, joins with it
    trains(run, workers + 1)
    run.scale(workers)
    trains(run, workers)
    assert run.lives(server) == lives


def test_machine_that_is_drained_loses_nothing(run: Platform) -> None:
    workers, before = workers_of(run), iteration(run)
    run.drain()
    trains(run, workers)
    assert lost(before, iteration(run)) == []


def test_every_line_of_every_program_is_json(run: Platform) -> None:
    assert [sentence for pod in run.all_pods() for sentence in not_json(pod, run.log(pod))] == []


def test_all_end_in_time_and_with_the_code_of_a_clean_end(run: Platform) -> None:
    # Last: nothing runs after it.
    assert unclean(run.stop()) == []
