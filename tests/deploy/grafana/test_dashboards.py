"""The dashboards: made by the generator, readable by Grafana's own types, and about metrics that exist."""

import copy
import itertools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard
from promql_parser import parse

from deploy.grafana.dashboards import FILES, GRAFANA, filled_in, load, panels, queries
from deploy.kubernetes.rendering import overlay
from deploy.prometheus.prometheus import program
from ormo_protos.refusals import Reason
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
    found += [f"{p['title']}: numbers with all their digits" for p in shown if not _short(p)]
    found += [f"{p['title']}: {flaw}" for p in shown if p["type"] == "timeseries" for flaw in _flaws_of_legend(p)]
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


def _short(panel: dict[str, Any]) -> bool:
    """Whether numbers in scientific notation are cut: Grafana 11.6 writes all digits of 0.0173456789 otherwise."""
    shown = panel["options"]["yAxis"] if panel["type"] == "heatmap" else panel["fieldConfig"]["defaults"]
    return shown.get("unit") != "sci" or shown.get("decimals", 99) <= 3


# What the longest names are, and the longest values as Grafana 11.6 writes them.
LONGEST_LABELS = {
    "worker": "gpu-node-17-31245-a3f9c1",
    "instance": "10.42.0.117:9464",
    "cause": "FAILED_PRECONDITION",
    "grpc_code": "FAILED_PRECONDITION",
    "grpc_method": "ServerReflectionInfo",
    "kind": "reserved",
    "method": "PushGradient",
    "outcome": "discarded",
    "reason": max(Reason, key=len),
    "stage": "compute",
    "work": "checkpoints",
}
LONGEST_VALUES = {
    "none": "0.000123",
    "short": "11.7 Mil",
    "locale": "12,345,678",
    "sci": "1.23e-2",
    "percentunit": "0.400%",
    "s": "1.65 weeks",
    "bytes": "42.9 MiB",
    "binBps": "42.9 MiB/s",
}
HEADINGS = {"lastNotNull": "Last *", "max": "Max"}
# Of a laptop's screen, in Grafana's grid of 24 columns, and of its small print; a panel and a cell have edges.
SCREEN, GRID, LETTER, EDGES, CELL, SIGN = 1440, 24, 6.5, 24, 16, 22


def _flaws_of_legend(panel: dict[str, Any]) -> list[str]:
    """A table below the graph, which Grafana cuts at a third of the panel's height; its rows are never cut."""
    legend, unit = panel["options"]["legend"], panel["fieldConfig"]["defaults"]["unit"]
    if (legend["displayMode"], legend["placement"]) != ("table", "bottom"):
        return ["a legend that is no table below the graph"]
    names = [
        re.sub(r"{{(\w+)}}", lambda label: LONGEST_LABELS[label[1]], target["legendFormat"])
        for target in panel["targets"]
    ]
    if any(override["properties"] for override in panel["fieldConfig"]["overrides"]):
        names = [f"{name} (right y-axis)" for name in names]
    value = LONGEST_VALUES.get(unit) or "12.3K " + unit.removeprefix("count:")
    width = SIGN + CELL + LETTER * max(map(len, names))
    width += sum(CELL + LETTER * max(len(HEADINGS[shown]), len(value)) for shown in legend["calcs"])
    place = panel["gridPos"]["w"] * SCREEN / GRID - EDGES
    return [f"a legend of {width:.0f} pixels where {place:.0f} are"] if width > place else []


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


def _show_all_digits(panel: dict[str, Any]) -> None:
    panel["fieldConfig"]["defaults"]["unit"] = "sci"


def _name_lines_at_length(panel: dict[str, Any]) -> None:
    panel["targets"][0]["legendFormat"] = (
        "{{worker}} of {{instance}}, in the stage {{stage}} for {{reason}} and {{cause}}"
    )


def _list_names(panel: dict[str, Any]) -> None:
    panel["options"]["legend"]["displayMode"] = "list"


@pytest.mark.parametrize(
    "spoil",
    [
        _show_all_digits,
        _name_lines_at_length,
        _list_names,
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


def shares(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"] if "compute_seconds" in target["expr"]]


@pytest.mark.parametrize("step_seconds", [4, 100, 400])
def test_a_worker_that_always_computes_has_a_share_of_100_percent_however_long_its_steps_are(
    tmp_path: Path, step_seconds: int
) -> None:
    asked = [query for panel in panels(load(GRAFANA / "dashboards" / "staleness.json")) for query in shares(panel)]
    assert len(asked) == 2, "a panel and a column of a table"
    steps = [seconds // step_seconds for seconds in range(0, 3600, 15)]
    labels = '{job="a", instance="b", worker="w"}'
    counters = {"compute": 0.95 * step_seconds, "training": step_seconds}
    tests = [
        {"expr": f"{shown} by (worker) ({shown}_over_time(({query})[45m:15s]))", "eval_time": "1h", "exp_samples": []}
        for query in (filled_in(each, job="a", instance="b", interval="1m") for each in asked)
        for shown in ("min", "max")
    ]
    for test in tests:
        test["expr"] = f"round({test['expr']}, 0.001)"
        test["exp_samples"] = [{"labels": '{worker="w"}', "value": 0.95}]
    series = [
        {"series": f"ormo_worker_{name}_seconds_total{labels}", "values": " ".join(str(each * step) for step in steps)}
        for name, each in counters.items()
    ]
    file = tmp_path / "shares.yml"
    file.write_text(
        yaml.safe_dump(
            {
                "evaluation_interval": "15s",
                "tests": [{"interval": "15s", "input_series": series, "promql_expr_test": tests}],
            }
        )
    )
    done = subprocess.run([program("promtool"), "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


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
