"""What is made of the dashboards: the text of each one's file, and the table of panels in docs/reference/metrics.md."""

import json
from collections.abc import Iterator, Mapping

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard, Panel, RowPanel

from ormo_dashboards.server import server
from ormo_dashboards.staleness import staleness
from ormo_dashboards.training import training


def dashboards() -> Mapping[str, Dashboard]:
    """All dashboards by the name of their file."""
    return {"training": training(), "staleness": staleness(), "server": server()}


def as_json(dashboard: Dashboard) -> str:
    """The text of a dashboard's file: the same for the same dashboard, a line for each value, so that changes show."""
    return json.dumps(dashboard, cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def panels_table() -> str:
    """A Markdown table of all panels: dashboard, panel and what it shows."""
    rows = ["| dashboard | panel | shows |", "| --- | --- | --- |"]
    for dashboard in dashboards().values():
        name = (dashboard.title or "").rpartition("/ ")[2]
        for panel in panels(dashboard):
            shows = (panel.description or "").partition("\n")[0]
            rows.append(f"| {name} | {panel.title} | {shows} |".replace("\\", "\\\\"))
    return "\n".join(rows) + "\n"


def panels(dashboard: Dashboard) -> Iterator[Panel]:
    """All panels of a dashboard in reading order, those in collapsed rows too."""
    for panel in dashboard.panels or ():
        if isinstance(panel, RowPanel):
            yield from panel.panels
        else:
            yield panel
