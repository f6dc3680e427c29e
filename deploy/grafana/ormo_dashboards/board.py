"""What all dashboards have in common: variables, links, annotations, and how panels are laid out."""

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard as building
from grafana_foundation_sdk.models.dashboard import (
    AnnotationContainer,
    AnnotationQuery,
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    GridPos,
    Panel,
    RowPanel,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from ormo_dashboards.panels import DATASOURCE
from ormo_dashboards.promql import series

TAG = "ormo"
_COLUMNS = 24


@dataclass(frozen=True, slots=True)
class Section:
    """A row of panels under a heading; a collapsed one is not queried until it is opened."""

    title: str
    panels: Sequence[Panel]
    collapsed: bool = False


def board(uid: str, title: str, description: str, sections: Sequence[Section]) -> Dashboard:
    """A dashboard of these sections."""
    builder = building.Dashboard(title).uid(uid).description(description).tags([TAG])
    # Shipped dashboards are changed in their source, not in the browser: the next start would undo that.
    builder.readonly().tooltip(DashboardCursorSync.CROSSHAIR).refresh("30s").time("now-1h", "now").timezone("browser")
    for variable in (_datasource(), _jobs(), _runs()):
        builder.with_variable(variable)
    builder.link(_links())
    dashboard = builder.build()
    dashboard.annotations = AnnotationContainer([_restarts(), _alerts()])
    dashboard.panels = _laid_out(sections)
    return dashboard


def _datasource() -> building.DatasourceVariable:
    return building.DatasourceVariable("datasource").label("Data source").type("prometheus")


def _jobs() -> building.QueryVariable:
    description = "The scrape job of the servers."
    return _labels("job", "Job", "label_values(ormo_iteration, job)").description(description)


def _runs() -> building.QueryVariable:
    description = "The servers, each of which is one run. Heatmaps add up all that are selected: choose one there."
    query = 'label_values(ormo_iteration{job=~"$job"}, instance)'
    return _labels("instance", "Run", query).description(description)


def _labels(name: str, label: str, query: str) -> building.QueryVariable:
    variable = building.QueryVariable(name).label(label).datasource(DATASOURCE).query(query)
    variable.multi(True).include_all(True).current(VariableOption(text="All", value="$__all"))
    # Runs that ended before the time shown are not offered; "All" has no wildcard, as it would catch other programs'
    # process_* and grpc_* metrics.
    return variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)


def _links() -> building.DashboardLink:
    # By tag: Grafana leaves out the dashboard that is open, and finds the others under any path that it is served at.
    link = building.DashboardLink("Ordered momentum").type(DashboardLinkType.DASHBOARDS).tags([TAG])
    return link.as_dropdown(False).include_vars(True).keep_time(True)


class _Marks(AnnotationQuery):
    """The SDK's annotation, with the texts that Grafana's Prometheus data source reads besides."""

    def __init__(self, name: str, expression: str, *, colour: str, title: str, text: str, tags: str) -> None:
        super().__init__(name=name, datasource=DATASOURCE, expr=expression, icon_color=colour)
        self._texts = {"titleFormat": title, "textFormat": text, "tagKeys": tags}

    def to_json(self) -> dict[str, object]:
        return super().to_json() | self._texts


def _restarts() -> AnnotationQuery:
    started = series("process_start_time_seconds")
    text = "The server {{instance}} was started again; what came after its last checkpoint was lost unless it drained."
    return _Marks(
        "Restarts",
        f"changes({started}[$__rate_interval]) > 0",
        colour="blue",
        title="Server restarted",
        text=text,
        tags="instance",
    )


def _alerts() -> AnnotationQuery:
    return _Marks(
        "Firing alerts",
        series("ALERTS", 'alertstate="firing"'),
        colour="red",
        title="{{alertname}}",
        text="{{severity}} at {{instance}}",
        tags="alertname,severity",
    )


def _laid_out(sections: Sequence[Section]) -> list[Panel | RowPanel]:
    """Rows of panels from left to right and top to bottom, numbered in reading order."""
    laid: list[Panel | RowPanel] = []
    top, number = 0, 0
    for section in sections:
        number += 1
        row = RowPanel(section.collapsed, section.title, id_val=number, grid_pos=GridPos(h=1, w=_COLUMNS, x=0, y=top))
        top = _place(section.panels, top + 1)
        for panel in section.panels:
            number += 1
            panel.id_val = number
        if section.collapsed:  # Grafana keeps the panels of a collapsed row inside it, and of an open one after it
            row.panels = list(section.panels)
        laid.extend([row] if section.collapsed else [row, *section.panels])
    return laid


def _place(panels: Sequence[Panel], top: int) -> int:
    """Give panels their places from a line of the grid on; returns the first line that is free below them."""
    left = height = 0
    for panel in panels:
        place = panel.grid_pos
        assert place is not None
        if left + place.w > _COLUMNS:
            left, top, height = 0, top + height, 0
        place.x, place.y = left, top
        left, height = left + place.w, max(height, place.h)
    return top + height
