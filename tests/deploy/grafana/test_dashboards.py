"""The dashboards: made by the generator, readable by Grafana's own types, and about metrics that exist."""

import copy
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard
from promql_parser import parse

from deploy.grafana.dashboards import FILES, GRAFANA, filled_in, load, panels, queries
from deploy.kubernetes.rendering import overlay
from reference_pages import exported_names

DEPLOY = GRAFANA.parent
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# What Prometheus itself, and the client library of every Python process, add.
ELSEWHERE = {"ALERTS", "process_resident_memory_bytes", "process_start_time_seconds", "process_cpu_seconds_total"}
ELSEWHERE |= {"process_open_fds", "process_max_fds"}
RULES = (DEPLOY / "prometheus" / "rules" / "recording.yml").read_text()
RECORDINGS = set(re.findall(r"record: (\S+)", RULES))
each_dashboard = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def test_dashboards_are_what_the_generator_makes() -> None:
    from ormo_dashboards.texts import as_json, dashboards

    made = {name: as_json(dashboard) for name, dashboard in dashboards().items()}
    assert set(made) == {file.stem for file in FILES}
    for file in FILES:
        assert file.read_text() == made[file.stem], "run `make dashboards`"


@each_dashboard
def test_grafana_s_types_read_a_dashboard_and_lose_nothing(file: Path) -> None:
    written = load(file)
    assert Dashboard.from_json(written).title == written["title"]
    assert written["uid"] == f"ormo-{file.stem}"
    assert written["editable"] is False
    assert written["tags"] == ["ormo"]
    assert (written["refresh"], written["time"]) == ("30s", {"from": "now-1h", "to": "now"})
    assert [one["name"] for one in written["templating"]["list"]] == ["datasource", "job", "instance"]
    assert [one["name"] for one in written["annotations"]["list"]] == ["Restarts", "Firing alerts"]


def flaws(dashboard: dict[str, Any]) -> list[str]:
    """What an operator would stumble over."""
    shown = list(panels(dashboard))
    found = [f"{p['title']}: no datasource" for p in shown if p.get("datasource") != DATASOURCE]
    found += [f"{p['title']}: no description" for p in shown if not p.get("description", "").count("**Bad:**")]
    found += [f"{p['title']}: no unit" for p in shown if not _units(p)]
    ids = [p["id"] for p in (*shown, *(p for p in dashboard["panels"] if p["type"] == "row"))]
    found += ["ids are not unique"] if len(ids) != len(set(ids)) else []
    for panel, target in ((p, t) for p in shown for t in p["targets"]):
        found += [f"{panel['title']}: {flaw}" for flaw in _flaws_of(target)]
    return found


def _units(panel: dict[str, Any]) -> bool:
    if panel["type"] == "heatmap":
        return "unit" in panel["options"]["yAxis"]
    properties = [p["id"] for o in panel["fieldConfig"]["overrides"] for p in o["properties"]]
    return "unit" in panel["fieldConfig"]["defaults"] or "unit" in properties


def _flaws_of(target: dict[str, Any]) -> list[str]:
    expression = target["expr"]
    found = [] if target.get("datasource") == DATASOURCE else ["a query without datasource"]
    found += [] if target.get("refId") else ["a query without letter"]
    if '$job"' not in expression or '$instance"' not in expression:
        found.append("a query that does not heed the selected runs")
    ranges = re.findall(r"(\w+)\([^()]*(?:\([^()]*\))?[^()]*\[([^\]]+)\]", expression)
    # How often a server was restarted is counted over the time of its alert.
    found += [f"{f} over {r}" for f, r in ranges if r != "$__rate_interval" and f != "changes"]
    try:
        parse(filled_in(expression, job="a", instance="b", interval="1m"))
    except ValueError as error:
        found.append(f"no PromQL: {error}")
    return found


@each_dashboard
def test_dashboard_has_no_flaw(file: Path) -> None:
    assert flaws(load(file)) == []


def _drop_description(panel: dict[str, Any]) -> None:
    del panel["description"]


def _fix_the_run(panel: dict[str, Any]) -> None:
    panel["targets"][0]["expr"] = 'ormo_iteration{job=~"$job"}'


def _fix_the_interval(panel: dict[str, Any]) -> None:
    panel["targets"][0]["expr"] = 'rate(ormo_samples_total{job=~"$job", instance=~"$instance"}[5m])'


def _break_the_query(panel: dict[str, Any]) -> None:
    panel["targets"][0]["expr"] += " +"


def _take_the_id_of_the_first(panel: dict[str, Any]) -> None:
    panel["id"] = 1


def _name_a_datasource(panel: dict[str, Any]) -> None:
    panel["targets"][0]["datasource"] = {"type": "prometheus", "uid": "mine"}


@pytest.mark.parametrize(
    "spoil",
    [
        _drop_description,
        _fix_the_run,
        _fix_the_interval,
        _break_the_query,
        _take_the_id_of_the_first,
        _name_a_datasource,
    ],
)
def test_planted_flaw_is_found(spoil: Callable[[dict[str, Any]], None]) -> None:
    dashboard = copy.deepcopy(load(FILES[0]))
    spoil(next(panel for panel in panels(dashboard) if panel["type"] == "timeseries"))
    assert len(flaws(dashboard)) == 1


def unknown_metrics(expression: str) -> set[str]:
    bare = re.sub(r'"[^"]*"', "", re.sub(r"\b(?:by|on|group_left|without) \([^)]*\)", "", expression))
    names = set(re.findall(r"(?<![\w:])(?:instance(?:_worker)?:[\w:]+|(?:ormo|grpc_server|process)_\w+|ALERTS)", bare))
    return names - exported_names() - ELSEWHERE - RECORDINGS


@each_dashboard
def test_queries_are_about_metrics_that_exist(file: Path) -> None:
    assert {name for query in queries(file) for name in unknown_metrics(query.expression)} == set()
    assert unknown_metrics("rate(ormo_pushs_total[5m])") == {"ormo_pushs_total"}


def test_links_lead_to_dashboards_that_are_there() -> None:
    text = "".join(file.read_text() for file in FILES)
    linked = set(re.findall(r"/d/([\w-]+)", text))
    assert linked
    assert linked <= {load(file)["uid"] for file in FILES}
    for file in FILES:
        (link,) = load(file)["links"]
        assert (link["type"], link["tags"], link["includeVars"], link["keepTime"]) == (
            "dashboards",
            ["ormo"],
            True,
            True,
        )


def test_limits_on_panels_are_those_at_which_alerts_fire() -> None:
    from ormo_dashboards import limits

    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules" / "alerts.yml").read_text())["groups"]
    expressions = {rule["alert"]: " ".join(rule["expr"].split()) for group in rules for rule in group["rules"]}
    for alert, condition in {
        "OrmoDelayHigh": f"p99_15m > {limits.RELATIVE_DELAY:g}",
        "OrmoLockSaturated": f"> {limits.LOCK_HELD:g}",
        "OrmoMemoryNearLimit": f"> {limits.MEMORY_USED:g}",
        "OrmoPushesRefused": f"ratio_rate5m > {limits.REFUSED_PUSHES:g}",
        "OrmoNonFiniteGradients": f"> {limits.NON_FINITE_GRADIENTS:g}",
        "OrmoWorkerSilent": f"> {limits.LAST_PUSH_SECONDS:g} # seconds",
        "OrmoCheckpointFailing": f"{limits.UNSAVED_INTERVALS_AFTER_FAILURE:g} * ormo_checkpoint_interval_seconds",
        "OrmoCheckpointTooOld": f"{limits.UNSAVED_INTERVALS:g} * ormo_checkpoint_interval_seconds",
        "OrmoMirrorBehind": f"({limits.MIRROR_BEHIND_SECONDS:g} + {limits.MIRROR_BEHIND_INTERVALS:g} * ormo_check",
        "OrmoServerRestarting": f"> {limits.RESTARTS - 1:g}",
    }.items():
        assert condition in expressions[alert], alert


def test_provisioning_names_the_places_where_compose_puts_things() -> None:
    provisioning = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "ormo.yaml").read_text())["providers"]
    assert source["type"] == "prometheus"
    compose = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())["services"]
    mounts = dict(mount.split(":")[:2] for mount in compose["grafana"]["volumes"])
    assert mounts["../grafana/dashboards"] == provider["options"]["path"]
    assert mounts["../grafana/provisioning"] == "/etc/grafana/provisioning"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped


def test_config_maps_hold_the_dashboards_with_the_sidecar_s_label() -> None:
    made = [each for each in overlay("monitoring").of("ConfigMap") if "grafana_dashboard" in each["metadata"]["labels"]]
    assert sorted(name for each in made for name in each["data"]) == [file.name for file in FILES]
    for each in made:
        ((name, text),) = each["data"].items()
        assert text == (GRAFANA / "dashboards" / name).read_text()
        assert len(text) < 256 * 1024  # what `kubectl apply` can keep in an annotation


def test_panels_are_laid_out_without_overlap() -> None:
    for file in FILES:
        placed = [panel["gridPos"] for panel in load(file)["panels"]]
        for one, other in itertools.combinations(placed, 2):
            apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
