"""Write the rules as a PrometheusRule into `prometheus-rule.yaml` beside this file, for the Prometheus operator."""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
GOAL = FOLDER / "prometheus-rule.yaml"
_HEAD = "# Made of rules/*.yml by generate.py: change those and run `make dashboards`.\n"


class _Dumper(yaml.SafeDumper):
    """Texts of several lines stay as they were written."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def prometheus_rule() -> str:
    """The manifest with all groups, in the order of the files' names."""
    files = sorted((FOLDER / "rules").glob("*.yml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]]
    manifest: dict[str, Any] = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "ormo", "labels": {"app.kubernetes.io/part-of": "ormo"}},
        "spec": {"groups": groups},
    }
    return _HEAD + yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def main() -> None:
    """Write it."""
    GOAL.write_text(prometheus_rule(), encoding="utf-8")


if __name__ == "__main__":
    main()
