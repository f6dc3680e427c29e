"""The generated parts of the README: run as a program it writes them anew."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from prometheus_client import CollectorRegistry

from ormo_runtime.settings import settings_table
from ormo_runtime.timeouts import DESCRIPTIONS, FailureDetection
from ormo_server.core.method import PRESETS
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.metrics import Metrics
from ormo_worker.metrics import EvaluatorMetrics, WorkerMetrics

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ALERTS = ROOT / "deploy" / "prometheus" / "rules" / "alerts.yml"
# The generator of the dashboards is no installed package.
sys.path.insert(0, str(ROOT / "deploy" / "grafana"))
_TABLE = re.compile(
    r"(?P<head><!-- (?P<own>own )?settings: (?P<module>[\w.]+):(?P<name>\w+) -->\n).*?(?P<end>\n<!-- end -->)",
    re.DOTALL,
)
_METRICS = re.compile(r"(?P<head><!-- metrics: (?P<whose>\w+) -->\n).*?(?P<end>\n<!-- end -->)", re.DOTALL)
_METHODS = re.compile(r"(?P<head><!-- methods -->\n).*?(?P<end>\n<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The text with the tables of methods, metrics and settings, as the code gives them."""

    def table(match: re.Match[str]) -> str:
        settings = getattr(importlib.import_module(match["module"]), match["name"])
        # A blank line on both sides: inside <details> Markdown needs it.
        return f"{match['head']}\n{settings_table(settings, own=match['own'] is not None)}{match['end']}"

    def metrics(match: re.Match[str]) -> str:
        return f"{match['head']}\n{metrics_table(registry_of(match['whose']))}{match['end']}"

    text = _METRICS.sub(metrics, text)
    for name, table_of in (("panels", panels_table), ("alerts", alerts_table), ("failures", failures_table)):
        head, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        before, _, after = text.partition(head)
        behind = f"\n{after}".partition(end)[2]  # there may be nothing between the marks yet
        text = f"{before}{head}\n{table_of()}{end}{behind}"
    return _METHODS.sub(lambda match: f"{match['head']}{methods_table()}{match['end']}", _TABLE.sub(table, text))


def failures_table() -> str:
    """A Markdown table of what follows from some failure timeouts."""
    timeouts = (5.0, 30.0, 120.0)
    rows = [f"| seconds | {' | '.join(f'{seconds:g}' for seconds in timeouts)} |", "| --- " * (len(timeouts) + 1) + "|"]
    for name, what in DESCRIPTIONS.items():
        values = (getattr(FailureDetection(seconds), name) for seconds in timeouts)
        rows.append(f"| {what} | {' | '.join(f'{value:.3g}' for value in values)} |")
    return "\n".join(rows) + "\n"


def methods_table() -> str:
    """A Markdown table of the presets: their choices, and what the update rule keeps."""
    rows = ["| preset | update rule | step scale | scheduler | keeps besides `w` |", "| --- | --- | --- | --- | --- |"]
    for method in PRESETS.values():
        rule = UPDATE_RULES[method.rule]
        kept = f"{rule.vectors_per_slot} per slot" if rule.vectors_per_slot else f"{rule.vectors_per_run}"
        discards = f", discards from {method.discard_buckets}K on" if method.discard_buckets else ""
        scale = (
            f"{method.scale}, from {method.delay_threshold:g}K on" if method.scale == "delay-adaptive" else method.scale
        )
        rows.append(f"| `{method.name}` | {method.rule}{discards} | {scale} | {method.scheduler} | {kept} |")
    return "\n".join(rows) + "\n"


def registry_of(whose: str) -> CollectorRegistry:
    """What a server, a worker or an evaluator exports."""
    if whose == "server":
        return Metrics().registry
    # A GPU that need not exist: it is asked when it is scraped.
    return WorkerMetrics("", torch.device("cuda")).registry if whose == "worker" else EvaluatorMetrics().registry


def metrics_table(registry: CollectorRegistry) -> str:
    """A Markdown table of a registry's metrics, but for those that the library brings for every Python process."""
    rows = ["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |"]
    for name, kind, labels, text in _families(registry):
        shown = ", ".join(f"`{label}`" for label in labels)
        rows.append(f"| `{name}` | {kind} | {shown} | {text} |")
    return "\n".join(rows) + "\n"


def _families(registry: CollectorRegistry) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    described = [one for one in registry._collector_to_names if hasattr(one, "describe")]
    for collector in described:
        for family in collector.describe():
            labels = getattr(family, "_labelnames", None) or getattr(collector, "_labelnames", ())
            suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
            yield family.name.removesuffix(suffix) + suffix, family.type, tuple(labels), family.documentation


def exported_names() -> set[str]:
    """Every name that a page of metrics can have; a histogram has three."""
    names = set()
    for whose in ("server", "worker", "evaluator"):
        for name, kind, _, _ in _families(registry_of(whose)):
            names |= {f"{name}_{part}" for part in ("bucket", "count", "sum")} if kind == "histogram" else {name}
    return names


def panels_table() -> str:
    """A Markdown table of the dashboards' panels."""
    from ormo_dashboards import texts

    return texts.panels_table()


def alerts_table() -> str:
    """A Markdown table of the alerts."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    rows = ["| alert | severity | after | means |", "| --- | --- | --- | --- |"]
    for rule in (rule for group in groups for rule in group["rules"]):
        name, severity = rule["alert"], rule["labels"]["severity"]
        means = re.sub(r"( on)? \{\{ \$labels\.instance \}\}", "", rule["annotations"]["summary"])
        means = re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"*\1*", means)
        link = f"[{name}](deploy/RUNBOOK.md#{name.lower()})"
        rows.append(f"| {link} | {severity} | {rule['for']} | {means} |")
    return "\n".join(rows) + "\n"


def example(name: str) -> str:
    """The Python code that follows a marker."""
    found = re.search(rf"<!-- {name} example -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
