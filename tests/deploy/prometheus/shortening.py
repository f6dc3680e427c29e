"""The shipped configuration with all durations divided by one factor, so that a test need not wait for minutes.

What is a duration in it:

* the fields `for`, `keep_firing_for` and `interval` of rules and groups, and `scrape_interval`, `scrape_timeout` and
  `evaluation_interval` of the configuration;
* in expressions what stands in brackets (`[5m]`, `[1h:1m]`) or after `offset`;
* in expressions a number that ends its line and has the comment `# seconds`:

      time() - ormo_something_timestamp_seconds
        > 120  # seconds

  Any other number is a share, a count or a multiple and stays. A threshold that is a multiple of a setting which the
  server exports (`5 * ormo_checkpoint_interval_seconds`) follows that setting.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

DEPLOYED = Path(__file__).parents[3] / "deploy" / "prometheus"
JOBS = ("ormo-server", "ormo-worker", "ormo-evaluator")

_UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_DURATION = r"(?:\d+(?:ms|[smhdw]))+"
_IN_BRACKETS = re.compile(rf"\[({_DURATION})(?::({_DURATION})?)?\]")
_OFFSET = re.compile(rf"(?<=\boffset )(-?)({_DURATION})")
_SECONDS = re.compile(r"(\d+(?:\.\d+)?)(?=\s*# seconds\b)")
_DURATION_FIELDS = {
    "for",
    "keep_firing_for",
    "interval",
    "scrape_interval",
    "scrape_timeout",
    "evaluation_interval",
}


def shortened(text: str, factor: float) -> str:
    """A rules file, or `prometheus.yml`, with all its durations divided by the factor; comments outside of expressions
    are lost."""
    return yaml.safe_dump(_shortened(yaml.safe_load(text), factor), sort_keys=False)


def shortened_expression(expression: str, factor: float) -> str:
    """A PromQL expression with all its durations divided by the factor."""

    def range_or_subquery(match: re.Match[str]) -> str:
        length, step = match.groups()
        colon = ":" if ":" in match[0] else ""
        return f"[{shortened_duration(length, factor)}{colon}{shortened_duration(step, factor) if step else ''}]"

    expression = _IN_BRACKETS.sub(range_or_subquery, expression)
    expression = _OFFSET.sub(lambda match: match[1] + shortened_duration(match[2], factor), expression)
    return _SECONDS.sub(lambda match: f"{float(match[1]) / factor:g}", expression)


def shortened_duration(duration: str, factor: float) -> str:
    """A duration as Prometheus writes them, divided by the factor, in milliseconds."""
    assert re.fullmatch(_DURATION, duration), f"{duration!r} is no duration"
    parts = re.findall(r"(\d+)(ms|[smhdw])", duration)
    return f"{max(1, round(sum(int(number) * _UNITS_MS[unit] for number, unit in parts) / factor))}ms"


def configured(folder: Path, targets: Mapping[str, Sequence[str]], *, factor: float = 1.0) -> Path:
    """The shipped configuration in a folder of its own, for `prometheus(folder)`.

    Args:
        folder: is made; must not be there yet.
        targets: addresses (host:port) to scrape, by job; jobs without any get none.
        factor: all durations, those of scraping too, are divided by it.

    Returns:
        The folder.
    """
    (folder / "rules").mkdir(parents=True)
    (folder / "targets").mkdir()
    for source in (DEPLOYED / "prometheus.yml", *sorted((DEPLOYED / "rules").glob("*.yml"))):
        goal = folder / source.relative_to(DEPLOYED)
        if factor == 1.0:
            shutil.copyfile(source, goal)
        else:
            goal.write_text(shortened(source.read_text(), factor))
    for job in JOBS:
        write_targets(folder, job, targets.get(job, ()))
    return folder


def write_targets(folder: Path, job: str, addresses: Sequence[str]) -> None:
    """Set the addresses of a job; a running Prometheus notices it by itself."""
    aside = folder / "targets" / f".{job}.aside"
    aside.write_text(yaml.safe_dump([{"targets": list(addresses)}]))
    aside.replace(folder / "targets" / f"{job}.yml")


def _shortened(node: Any, factor: float) -> Any:
    if isinstance(node, list):
        return [_shortened(item, factor) for item in node]
    if not isinstance(node, dict):
        return node
    result = {}
    for key, value in node.items():
        if key in _DURATION_FIELDS and isinstance(value, str):
            result[key] = shortened_duration(value, factor)
        elif key == "expr":
            result[key] = shortened_expression(value, factor)
        else:
            result[key] = _shortened(value, factor)
    return result
