"""The shipped configuration and rules: valid, tested, documented, and about metrics that exist."""

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from promql_parser import parse

from deploy.prometheus.prometheus import program
from deploy.prometheus.shortening import DEPLOYED, configured, shortened, shortened_duration, shortened_expression
from ormo_server.service.server import Server
from ormo_worker.metrics import EvaluatorMetrics, WorkerMetrics
from reference_pages import exported_names
from service.test_metrics import race
from service.wire import connected, served

RUNBOOK = DEPLOYED.parent / "RUNBOOK.md"
FILES = {name: (DEPLOYED / "rules" / f"{name}.yml").read_text() for name in ("alerts", "recording")}
TESTS = sorted((DEPLOYED / "tests").glob("*.yml"))
# What Prometheus itself, and the client library of every Python process, add.
ELSEWHERE = {"up", "process_resident_memory_bytes", "process_start_time_seconds"}


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(FILES[name])["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts")}
RECORDINGS = {rule["record"]: rule for rule in rules("recording")}


def promtool(*arguments: object, page: str | None = None) -> str:
    done = subprocess.run(
        [program("promtool"), *map(str, arguments)],
        input=page,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_configuration_is_valid() -> None:
    assert "2 rule files found" in promtool("check", "config", DEPLOYED / "prometheus.yml")


def test_rules_are_valid() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", *(DEPLOYED / "rules" / f"{name}.yml" for name in FILES))


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_rules_do_what_their_tests_say(file: Path) -> None:
    promtool("test", "rules", file)


def unit_tests() -> Iterator[dict[str, Any]]:
    for file in TESTS:
        yield from yaml.safe_load(file.read_text())["tests"]


def test_every_alert_is_tested_to_fire_and_not_to_fire() -> None:
    cases = [case for test in unit_tests() for case in test.get("alert_rule_test", ())]
    fire = {case["alertname"] for case in cases if case.get("exp_alerts")}
    keep_quiet = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert (fire, keep_quiet) == (set(ALERTS), set(ALERTS))


def test_every_recording_is_tested_and_used() -> None:
    tested = " ".join(case["expr"] for test in unit_tests() for case in test.get("promql_expr_test", ()))
    boards = "".join(board.read_text() for board in (DEPLOYED.parent / "grafana" / "dashboards").glob("*.json"))
    expressions = [rule["expr"] for rule in (*ALERTS.values(), *RECORDINGS.values())]
    used = boards + RUNBOOK.read_text() + " ".join(expressions)
    assert [name for name in RECORDINGS if name not in tested or name not in used] == []


@pytest.mark.parametrize("name", ALERTS)
def test_alert_says_how_bad_it_is_what_it_means_and_what_to_do(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"] == {"severity": rule["labels"]["severity"]}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert "for" in rule
    assert rule["annotations"]["runbook"] == f"deploy/RUNBOOK.md#{name.lower()}"


def test_runbook_has_an_entry_for_each_alert_and_for_nothing_else() -> None:
    entries = re.findall(r"^### (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sorted(entries) == sorted(ALERTS)


def metrics_in(text: str) -> set[str]:
    """Names of metrics, as they are exported: a histogram has three suffixes."""
    words = set(re.findall(r"\b(?:ormo|grpc_server|process)_[a-z0-9_]+\b", re.sub(r'"[^"]*"', "", text)))
    return words - {word for word in words if f":{word}" in text}


def unknown(text: str) -> set[str]:
    known = exported_names() | ELSEWHERE
    return {name for name in metrics_in(text) if name not in known}


@pytest.mark.parametrize("name", FILES)
def test_rules_are_about_metrics_that_exist(name: str) -> None:
    expressions = [rule["expr"] for rule in rules(name)]
    assert set().union(*map(unknown, expressions)) == set()
    assert {"ormo_iterations", "process_none"} == unknown("rate(ormo_iterations[5m]) + process_none + ormo_iteration")


def test_runbook_is_about_metrics_that_exist() -> None:
    histograms = {name.removesuffix("_sum") for name in exported_names() if name.endswith("_sum")}
    assert unknown(RUNBOOK.read_text()) - histograms == set()


@pytest.mark.parametrize("name", [*ALERTS, *RECORDINGS])
def test_no_aggregation_mixes_runs(name: str) -> None:
    expression = (ALERTS | RECORDINGS)[name]["expr"]
    parse(expression)
    for how, kept in re.findall(r"\b(?:sum|max|min|avg|count) (by|without) \(([^)]*)\)", expression):
        assert how == "by"
        assert {"job", "instance"} <= set(kept.replace(" ", "").split(","))
    assert not re.search(r"\b(?:sum|max|min|avg|count)\(", expression)


def test_rules_for_the_operator_are_those_of_the_files() -> None:
    spec = importlib.util.spec_from_file_location("generate", DEPLOYED / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (DEPLOYED / "prometheus-rule.yaml").read_text() == generate.prometheus_rule(), "run `make dashboards`"
    groups = yaml.safe_load(generate.prometheus_rule())["spec"]["groups"]
    assert [rule for group in groups for rule in group["rules"]] == [*ALERTS.values(), *RECORDINGS.values()]


def page_of(server: Server) -> str:
    return generate_latest(server.metrics.registry).decode()


def test_what_the_server_exports_keeps_the_rules_of_prometheus(tmp_path: Path) -> None:
    with served(tmp_path, method="ringmaster", scheduler="bounded-staleness", staleness_bound=8) as server:
        with connected(server) as stub:
            race(stub)
        promtool("check", "metrics", page=page_of(server))


@pytest.mark.parametrize("registry", [WorkerMetrics("w", torch.device("cpu")).registry, EvaluatorMetrics().registry])
def test_what_workers_and_evaluators_export_keeps_the_rules_of_prometheus(registry: CollectorRegistry) -> None:
    promtool("check", "metrics", page=generate_latest(registry).decode())


def test_page_that_breaks_the_rules_is_found() -> None:
    with pytest.raises(AssertionError, match="no help text"):
        promtool("check", "metrics", page="ormo_iteration 1\n")


def test_every_duration_is_shortened_and_nothing_else() -> None:
    text = """
        groups:
          - name: g
            interval: 30s
            rules:
              - alert: A
                expr: |
                  rate(x_total[5m]) > 10
                    and max_over_time(y[1h:1m] offset 2m)
                      > 120  # seconds
                for: 1h30m
                labels: {severity: 5m}
    """
    (group,) = yaml.safe_load(shortened(text, 60))["groups"]
    (rule,) = group["rules"]
    assert group["interval"] == "500ms"
    assert rule["for"] == "90000ms"
    assert rule["labels"] == {"severity": "5m"}
    expected = "rate(x_total[5000ms]) > 10 and max_over_time(y[60000ms:1000ms] offset 2000ms) > 2 # seconds"
    assert " ".join(rule["expr"].split()) == expected


def test_shortened_configuration_is_valid(tmp_path: Path) -> None:
    folder = configured(tmp_path / "short", {"ormo-server": ["127.0.0.1:1"]}, factor=60)
    promtool("check", "config", folder / "prometheus.yml")
    assert "scrape_interval: 250ms" in (folder / "prometheus.yml").read_text()


@pytest.mark.parametrize("bad", ["5", "m", "5 m", ""])
def test_what_is_no_duration_is_not_taken_for_one(bad: str) -> None:
    with pytest.raises(AssertionError, match="is no duration"):
        shortened_duration(bad, 2)


def test_expression_without_durations_stays() -> None:
    assert shortened_expression("a{b='5m'} > 10", 60) == "a{b='5m'} > 10"
