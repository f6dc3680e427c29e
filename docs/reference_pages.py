"""The generated pages of the documentation: run as a program it writes them anew (`make reference`).

`docs/reference/` is written as a whole. Two pages that people write have a table between two marks:
`docs/algorithm.md` (the methods) and `docs/failures.md` (what follows from a failure timeout).
"""

import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from prometheus_client import CollectorRegistry

import ormo_worker
from ormo_protos import limits
from ormo_protos.refusals import refusals_table
from ormo_runtime.settings import settings_table
from ormo_runtime.timeouts import DESCRIPTIONS, FailureDetection
from ormo_server.core.method import PRESETS
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.metrics import Metrics
from ormo_worker.metrics import EvaluatorMetrics, WorkerMetrics

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ALERTS = ROOT / "deploy" / "prometheus" / "rules" / "alerts.yml"
PROTO = ROOT / "protos" / "ormo_protos" / "v1" / "parameter_server.proto"
# The generator of the dashboards is no installed package.
sys.path.insert(0, str(ROOT / "deploy" / "grafana"))

_GENERATED = "<!-- Written by `make reference`: change the code that it comes from instead. -->"
# Heading, class, and whether to leave out what the first table has already.
SETTINGS = (
    ("How to train: `ormo-server serve` and `ormo-sim`", "ormo_server.settings:TrainingSettings", False),
    ("`ormo-server serve`, besides those of training", "ormo_server.settings:ServerSettings", True),
    ("`ormo-server status`", "ormo_server.console.settings:StatusSettings", False),
    ("`ormo-server top`", "ormo_server.console.settings:TopSettings", False),
    ("`ormo-server control`", "ormo_server.console.settings:ControlSettings", False),
    ("`ormo-server export`", "ormo_server.export:ExportSettings", False),
    ("`ormo-worker run`", "ormo_worker.settings:RunSettings", False),
    ("`ormo-worker evaluate`", "ormo_worker.settings:EvaluateSettings", False),
    ("`ormo-local`", "ormo_worker.local.cli:LocalSettings", False),
    ("`ormo-ray`", "ormo_worker.integrations.ray.settings:RaySettings", False),
    ("`ormo-ray scale`", "ormo_worker.integrations.ray.settings:ScaleSettings", False),
    ("`ormo-sim`, besides those of training", "ormo_server.sim.settings:SimSettings", True),
    ("`ormo-sim reproduce`", "ormo_server.sim.reproduce.command:ReproduceSettings", False),
)


def pages() -> dict[Path, str]:
    """Every page that is generated, as a whole or in part, as it should be."""
    tables = {"algorithm.md": ("methods", methods_table), "failures.md": ("failures", failures_table)}
    return {
        DOCS / "reference" / "settings.md": settings_page(),
        DOCS / "reference" / "metrics.md": metrics_page(),
        DOCS / "reference" / "python.md": python_page(),
        DOCS / "reference" / "protocol.md": protocol_page(),
    } | {DOCS / page: with_table(DOCS / page, name, table()) for page, (name, table) in tables.items()}


def with_table(page: Path, name: str, table: str) -> str:
    """The page with this table between its marks."""
    before, found, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, ended, after = rest.partition("<!-- end -->")
    assert found, f"{page} has no line <!-- {name} -->"
    assert ended, f"{page} has no line <!-- end --> after <!-- {name} -->"
    return f"{before}{found}\n{table}\n{ended}{after}"


# Settings


def settings_page() -> str:
    """All settings of all programs."""
    parts = [
        "# Settings",
        _GENERATED,
        "A flag goes before the environment, the environment before the TOML file that `--config` (or `ORMO_CONFIG`) "
        "names. A key of the file is the flag without its dashes. *Flag only* is what is done once, when somebody "
        "types it. A misspelt flag or key is an error that guesses what was meant; a variable `ORMO_…` that no "
        "program reads gets a warning if it is spelt nearly like one. Sizes may have a unit, as in `512MiB`. `none` "
        "as a default means: not set.",
    ]
    for heading, path, own in SETTINGS:
        module, _, name = path.partition(":")
        parts += [f"## {heading}", settings_table(getattr(importlib.import_module(module), name), own=own).strip()]
    return "\n\n".join(parts) + "\n"


# Metrics


def metrics_page() -> str:
    """All metrics, panels and alerts."""
    heads = {
        "server": "The server (`ormo-server serve --metrics-listen 127.0.0.1:9464`)",
        "worker": "A worker (`ormo-worker run --metrics-listen 0.0.0.0:9465`)",
        "evaluator": "An evaluator (`ormo-worker evaluate --metrics-listen 0.0.0.0:9466`)",
    }
    parts = [
        "# Metrics, panels and alerts",
        _GENERATED,
        "[Monitoring](../monitoring.md) says how to look at them. Besides these there are `process_*` and `python_*` "
        "of the client library. Names, labels and alert names only grow.",
    ]
    for whose, heading in heads.items():
        parts += [f"## {heading}", metrics_table(registry_of(whose)).strip()]
    parts += ["## The dashboards' panels", panels_table().strip()]
    alerts = "The rules are in `deploy/prometheus/rules/`; what to do is in the [runbook](../../deploy/RUNBOOK.md)."
    parts += ["## Alerts", alerts, alerts_table().strip()]
    return "\n\n".join(parts) + "\n"


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
    described = [one for one in registry._collector_to_names if hasattr(one, "describe")]  # noqa: SLF001
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
        link = f"[{name}](../../deploy/RUNBOOK.md#{name.lower()})"
        rows.append(f"| {link} | {severity} | {rule['for']} | {means} |")
    return "\n".join(rows) + "\n"


# Tables in pages that people write


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
        kept = f"{rule.vectors_per_slot} per slot" if rule.vectors_per_slot else f"{len(rule.vectors_of_run)}"
        discards = f", discards from {method.discard_buckets}K on" if method.discard_buckets else ""
        scale = (
            f"{method.scale}, from {method.delay_threshold:g}K on" if method.scale == "delay-adaptive" else method.scale
        )
        mean = ", mean of buckets" if method.bucket == "mean" else ""
        rows.append(f"| `{method.name}` | {method.rule}{discards}{mean} | {scale} | {method.scheduler} | {kept} |")
    return "\n".join(rows) + "\n"


# Python


def python_page() -> str:
    """The public names of `ormo_worker`, with signatures and docstrings."""
    parts = [
        "# Python",
        _GENERATED,
        "What `from ormo_worker import …` gives; all else may change. [Training](../training.md) shows it in use.",
    ]
    for name in sorted(ormo_worker.__all__):
        parts += list(_described(name, getattr(ormo_worker, name)))
    return "\n\n".join(parts) + "\n"


_PUBLIC = [getattr(ormo_worker, name) for name in ormo_worker.__all__]


def _described(name: str, thing: Any) -> Iterator[str]:
    yield f"## {name}"
    if not inspect.isclass(thing) or not issubclass(thing, BaseException):
        yield f"```python\n{_signature(name, thing)}\n```"
    yield _docstring(thing)
    if inspect.isclass(thing):
        # Also of the classes of ours that it is made of and that have no place of their own here.
        parts = [each for each in thing.__mro__[1:] if each.__module__.startswith("ormo_") and each not in _PUBLIC]
        for member, value in [pair for each in (thing, *parts) for pair in vars(each).items()]:
            if not member.startswith("_") and (callable(value) or isinstance(value, property)) and value.__doc__:
                shown = f"{name}.{member}"
                yield f"### {shown}"
                if not isinstance(value, property):
                    yield f"```python\n{_signature(shown, value)}\n```"
                yield _docstring(value)


def _signature(name: str, thing: Any) -> str:
    parameters = [
        re.sub(r"\b(?:ormo_\w+\.|collections\.|torch\.nn\.modules\.module\.|pathlib\.)[\w.]*?(?=[A-Z])", "", str(one))
        for one in inspect.signature(thing).parameters.values()
        if one.name != "self" and one.kind is not one.VAR_KEYWORD
    ]
    keywords = [one.kind is one.KEYWORD_ONLY for one in inspect.signature(thing).parameters.values()]
    if True in keywords:
        ahead = sum(
            one.name != "self" for one in list(inspect.signature(thing).parameters.values())[: keywords.index(True)]
        )
        parameters.insert(ahead, "*")
    line = f"{name}({', '.join(parameters)})"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(parameters) + ",\n)"


def _docstring(thing: Any) -> str:
    """Its docstring; sections such as *Args* become lists, and what follows `::` blocks of code."""
    lines: list[str] = []
    text = re.sub(r"::\n\n((?: {4}.*\n|\n)+)", _fenced, f"{inspect.getdoc(thing) or ''}\n")
    for line in text.splitlines():
        if line.startswith("```") or lines.count("```python") > lines.count("```"):
            lines.append(line)
        elif re.fullmatch(r"(Args|Attributes|Returns|Raises):", line):
            lines += [f"*{line.removesuffix(':')}*", ""]
        elif match := re.match(r" {4}(\w[\w, ]*): (.*)", line):
            lines.append(f"- `{match[1]}`: {match[2]}")
        else:
            lines.append(f"  {line.strip()}" if line.startswith("     ") else line.strip())
    return "\n".join(lines)


def _fenced(code: re.Match[str]) -> str:
    return f":\n\n```python\n{textwrap.dedent(code[1]).strip()}\n```\n\n"


# The protocol


def protocol_page() -> str:
    """The contract: calls, reasons, messages, and how long lists may be, from the proto's own comments."""
    head, entries = _read_proto(PROTO.read_text(encoding="utf-8"))
    parts = [
        "# Protocol",
        _GENERATED,
        "The contract is `protos/ormo_protos/v1/parameter_server.proto`, and this page is made of its comments.",
        "```text\n" + head + "\n```",
        "## Calls",
    ]
    for kind, name, comment, _ in entries:
        if kind == "rpc":
            parts += [f"### {name.partition('(')[0]}", f"```proto\nrpc {name}\n```", _prose(comment)]
    parts += ["## Reasons", refusals_table().strip(), "## Limits", limits_table().strip()]
    parts += ["## Lengths of lists", lists_table().strip(), "## Messages"]
    for kind, name, comment, fields in entries:
        if kind != "rpc":
            parts += [f"### {name}", _prose(comment)]
            rows = [f"| `{field}` | {number} | {text} |" for field, number, text in fields]
            if rows:
                parts.append("\n".join(["| field | number | meaning |", "| --- | ---: | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def limits_table() -> str:
    """A Markdown table of the numbers that the contract states; how long its lists may be is in `lists_table`."""
    mib, kib = 1 << 20, 1 << 10
    chunks = f"{limits.FREE_CHUNKS}, and one more for each {limits.BYTES_PER_CHUNK // kib} KiB"
    parts = f"{limits.FREE_PARTS}, and one more for each {limits.TENSORS_PER_PART} tensors"
    bounds = {
        "a worker's id": limits.WORKER_ID_IN_WORDS,
        "slots of a worker": f"1 to {limits.MAX_SLOTS}",
        "samples of a gradient": f"0 to {limits.MAX_SAMPLES:,}",
        "seconds that a gradient took to compute": f"0 to {limits.MAX_COMPUTE_SECONDS:,.0f}",
        "tensors of a model": f"1 to {limits.MAX_TENSORS:,}",
        "a tensor's name": f"1 to {limits.MAX_NAME_BYTES} bytes of UTF-8",
        "dimensions of a tensor": f"at most {limits.MAX_DIMENSIONS}",
        "elements of a tensor, and of a section of the payload": f"at most {limits.MAX_ELEMENTS:,}",
        "messages of an offered manifest": f"at most {parts}",
        "a chunk": f"1 byte to {limits.MAX_CHUNK_BYTES / mib:g} MiB; senders use {limits.CHUNK_BYTES / mib:g} MiB",
        "chunks of a payload": f"at most {chunks}",
        "a request that is one message": f"at most {limits.SMALL_MESSAGE_BYTES // kib} KiB",
        "any message": f"at most {limits.MAX_MESSAGE_BYTES // kib:,} KiB",
    }
    rows = ["| what | limit |", "| --- | --- |", *(f"| {what} | {bound} |" for what, bound in bounds.items())]
    return "\n".join(rows) + "\n"


def lists_table() -> str:
    """A Markdown table of how many elements each list of the contract may have in one message."""
    rows = ["| list | most elements |", "| --- | ---: |"]
    rows += [
        f"| `{name.removeprefix('ormo.v1.')}` | {number:,} |" for name, number in sorted(limits.LONGEST_LISTS.items())
    ]
    return "\n".join(rows) + "\n"


_Entry = tuple[str, str, list[str], list[tuple[str, str, str]]]


def _read_proto(text: str) -> tuple[str, list[_Entry]]:
    """Its opening comment, and each call, message and enum with comment and fields; `buf format` keeps the shape."""
    head, _, body = text.partition("syntax =")
    entries: list[_Entry] = []
    comment: list[str] = []
    for line in map(str.strip, body.splitlines()):
        if line.startswith("//"):
            comment.append(line.removeprefix("//").removeprefix(" "))
            continue
        if call := re.fullmatch(r"rpc (.*);", line):
            entries.append(("rpc", call[1], comment, []))
        elif kind := re.match(r"(message|enum) (\w+) \{", line):
            entries.append((kind[1], kind[2], comment, []))
        elif field := re.match(r"(?:optional |repeated )?(?:[\w.]+ )?(\w+) = (\d+);", line):
            entries[-1][3].append((field[1], field[2], " ".join(comment)))
        comment = []
    return "\n".join(line.removeprefix("//").removeprefix(" ") for line in head.strip().splitlines()), entries


def _prose(comment: list[str]) -> str:
    """A comment as a paragraph; the lines of its table of status codes stay as they are."""
    parts: list[str] = []
    for line in comment:
        if not line.startswith("  "):
            parts.append(line)
        elif parts and parts[-1].endswith("\n```"):
            parts[-1] = parts[-1].removesuffix("```") + line[2:] + "\n```"
        else:
            parts.append(f"\n```text\n{line[2:]}\n```")
    return "\n".join(parts)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
