"""The committed dashboards, and their queries as Grafana would send them."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRAFANA = Path(__file__).parents[3] / "deploy" / "grafana"
FILES = sorted((GRAFANA / "dashboards").glob("*.json"))
# The generator is no installed package.
sys.path.insert(0, str(GRAFANA))


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a dashboard; `where` is a panel's title with the letter of the query, or what else asks."""

    dashboard: str
    where: str
    expression: str

    def __str__(self) -> str:
        return f"{self.dashboard}: {self.where}: {self.expression}"


def load(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All panels, those in collapsed rows too, without the rows."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def queries(file: Path) -> Iterator[Query]:
    """What panels, annotations and variables ask, as it is written."""
    dashboard = load(file)
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield Query(file.stem, f"{panel['title']} {target['refId']}", target["expr"])
    for marks in dashboard["annotations"]["list"]:
        yield Query(file.stem, f"annotation {marks['name']}", marks["expr"])
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            series = re.fullmatch(r"label_values\((.*), \w+\)", variable["query"])
            assert series is not None, variable["query"]
            yield Query(file.stem, f"variable {variable['name']}", series[1])


def filled_in(expression: str, *, job: str, instance: str, interval: str) -> str:
    """The expression with the variables' values in it; several values are joined as Grafana does."""
    values = {"$__rate_interval": interval, "$job": job, "$instance": re.escape(instance).replace("\\", "\\\\")}
    for name, value in values.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, f"a variable is left in {expression}"
    return expression
