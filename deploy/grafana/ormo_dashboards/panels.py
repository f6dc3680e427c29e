"""Panels of the few kinds that the dashboards use, all drawn alike."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, heatmap, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as building
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models.common import TableColorTextCellOptions
from grafana_foundation_sdk.models.dashboard import (
    DashboardFieldConfigSourceOverrides,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    GridPos,
    MatcherConfig,
    Panel,
    Threshold,
    ThresholdsMode,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import Dataquery, PromQueryFormat, QueryEditorMode

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
# Data links, unlike a dashboard's own links, carry the selection only if it is spelled out.
_SELECTION = "${__url_time_range}&${datasource:queryparam}&${job:queryparam}&${instance:queryparam}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What is written on a panel and behind its information sign.

    Attributes:
        title: of the panel.
        shows: one sentence; it stands in docs/reference/metrics.md too.
        normal: what it looks like when all is well.
        bad: what is not well, and what to do then.
    """

    title: str
    shows: str
    normal: str
    bad: str

    def description(self) -> str:
        """Markdown, as Grafana shows it."""
        return f"{self.shows}\n\n**Normal:** {self.normal}\n\n**Bad:** {self.bad}"


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and the name of its lines, with `{{label}}` for labels."""

    expression: str
    legend: str = "{{instance}}"


@dataclass(frozen=True, slots=True)
class Size:
    """Of a panel, in Grafana's grid of 24 columns."""

    width: int
    height: int


HALF = Size(12, 8)
THIRD = Size(8, 8)
FULL = Size(24, 8)
_STAT = Size(4, 4)

# Without a number of decimals Grafana writes all that a number has: 1.7345678901234e-2.
SCIENTIFIC, SCIENTIFIC_DECIMALS = "sci", 2
# A worker that steps once in minutes has a line all the same, and one that was away for longer has a gap.
_BRIDGED_MILLISECONDS = 3_600_000

# Colours of thresholds, from good to bad.
GOOD, WARNING, CRITICAL = "green", "orange", "red"
Limits = Mapping[float, str]


def lines(
    text: Text,
    *queries: Query,
    unit: str,
    size: Size = HALF,
    limits: Limits | None = None,
    stacked: bool = False,
    logarithmic: bool = False,
    no_value: str = "",
    interval: str = "",
    bridged: bool = False,
) -> Panel:
    """Lines over time; `limits` are dashed lines, and `bridged` ones go on where there is no value for a while."""
    builder = timeseries.Panel().unit(unit).line_width(1).fill_opacity(30 if stacked else 5)
    builder.show_points(looks.VisibilityMode.NEVER).axis_soft_min(0)
    builder.legend(_legend(size)).tooltip(
        common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI).sort(looks.SortOrder.DESCENDING)
    )
    if stacked:
        builder.stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL).group("A"))
    if logarithmic:
        scale = common.ScaleDistributionConfig().type(looks.ScaleDistribution.LOG).log(10)
        builder.scale_distribution(scale)
    if no_value:
        builder.no_value(no_value)
    if interval:
        builder.interval(interval)
    if bridged:
        builder.span_nulls(_BRIDGED_MILLISECONDS)
    if unit == SCIENTIFIC:
        builder.decimals(SCIENTIFIC_DECIMALS)
    if limits:
        builder.thresholds(_thresholds(limits))
        builder.thresholds_style(common.GraphThresholdsStyleConfig().mode(looks.GraphThresholdsStyleMode.DASHED))
    return _finished(builder, text, queries, size)


def number(
    text: Text,
    query: Query,
    *,
    unit: str,
    limits: Limits | None = None,
    decimals: int | None = None,
    link_to: str = "",
    shows_name: bool = False,
    no_value: str = "",
) -> Panel:
    """The newest value, large; `shows_name` shows the legend instead of the value, `link_to` is a dashboard's uid."""
    builder = stat.Panel().unit(unit).color_mode(looks.BigValueColorMode.VALUE)
    builder.graph_mode(looks.BigValueGraphMode.NONE if shows_name else looks.BigValueGraphMode.AREA)
    builder.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    if shows_name:
        builder.text_mode(looks.BigValueTextMode.NAME)
    if decimals is not None or unit == SCIENTIFIC:
        builder.decimals(SCIENTIFIC_DECIMALS if decimals is None else decimals)
    if no_value:
        builder.no_value(no_value)
    if limits:
        builder.thresholds(_thresholds(limits))
    else:  # a number that nothing can be said about stays in the colour of text
        builder.color_scheme(building.FieldColor().mode(FieldColorModeId.FIXED).fixed_color("text"))
    if link_to:
        builder.data_links([building.DashboardLink("Details").url(f"/d/{link_to}?{_SELECTION}")])
    return _finished(builder, text, (query,), _STAT)


def distribution(text: Text, histogram_buckets: str, *, unit: str, size: Size = HALF) -> Panel:
    """A histogram over time; the darker a cell, the more observations fell in it."""
    builder = heatmap.Panel().calculate(False).cell_gap(1).show_legend().show_y_histogram()
    axis = heatmap.YAxisConfig().unit(unit).axis_placement(looks.AxisPlacement.LEFT)
    builder.y_axis(axis.decimals(SCIENTIFIC_DECIMALS) if unit == SCIENTIFIC else axis)
    builder.cell_values(heatmap.CellValues().unit("short").decimals(0))
    # Cells of no observation stay empty: else the whole panel is coloured.
    builder.filter_values(heatmap.FilterValueRange().le(1e-9)).mode(looks.TooltipDisplayMode.SINGLE)
    colours = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    builder.color(colours.scale(HeatmapColorScale.EXPONENTIAL).exponent(0.5).fill("dark-orange"))
    panel = _finished(builder, text, (Query(histogram_buckets, "{{le}}"),), size)
    for target in panel.targets or ():
        assert isinstance(target, Dataquery)
        target.format_val = PromQueryFormat.HEATMAP
    return panel


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Of a table: a query with its heading, unit and limits. All queries of a table have the same labels."""

    heading: str
    expression: str
    unit: str
    limits: Limits | None = None


def rows(
    text: Text,
    *columns: Column,
    labels: Mapping[str, str],
    sort_by: str,
    descending: bool = False,
    size: Size = FULL,
) -> Panel:
    """A table with a row for each set of labels; `labels` maps those that are shown to their headings, in order."""
    builder = (
        table.Panel().filterable(True).sort_by([common.TableSortByFieldState().display_name(sort_by).desc(descending)])
    )
    headings = {f"Value #{_letter(index)}": column.heading for index, column in enumerate(columns)}
    if len(columns) == 1:  # Grafana names the value of an only query without its letter
        headings = {"Value": columns[0].heading}
    builder.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    builder.with_transformation(_renamed({**labels, **headings}, hidden=("Time", "job", "__name__")))
    for column in columns:
        builder.override_by_name(column.heading, _cell(column))
    panel = _finished(builder, text, [Query(column.expression, "") for column in columns], size)
    return _tabular(panel)


def facts(text: Text, info: str, *, labels: Mapping[str, str], size: Size = FULL) -> Panel:
    """Chosen labels of an info metric, a row for each run; `labels` maps them to their headings, in order."""
    builder = table.Panel().unit("none").filterable(True)
    builder.with_transformation(_renamed(labels, hidden=("Time", "Value")))
    panel = _finished(builder, text, (Query(f"max by ({', '.join(labels)}) ({info})", ""),), size)
    return _tabular(panel)


def with_right_axis(panel: Panel, legend_pattern: str, unit: str) -> Panel:
    """The same panel, with the lines that match drawn on an axis of their own."""
    assert panel.field_config is not None
    properties = [DynamicConfigValue("custom.axisPlacement", "right"), DynamicConfigValue("unit", unit)]
    if panel.field_config.defaults.decimals is not None:  # which are not meant for these lines
        properties.append(DynamicConfigValue("decimals", 1))
    override = DashboardFieldConfigSourceOverrides(
        matcher=MatcherConfig("byRegexp", legend_pattern), properties=properties
    )
    panel.field_config.overrides = [*panel.field_config.overrides, override]
    return panel


def _finished(builder: Builder[Panel], text: Text, queries: Sequence[Query], size: Size) -> Panel:
    panel = builder.build()
    panel.title, panel.description = text.title, text.description()
    panel.datasource = DATASOURCE
    panel.grid_pos = GridPos(w=size.width, h=size.height)
    panel.targets = [_target(query, _letter(index)) for index, query in enumerate(queries)]
    return panel


def _target(query: Query, letter: str) -> Dataquery:
    target = Dataquery(expr=query.expression, ref_id=letter, datasource=DATASOURCE)
    target.legend_format, target.range_val, target.editor_mode = query.legend, True, QueryEditorMode.CODE
    return target


def _letter(index: int) -> str:
    return string.ascii_uppercase[index]


def _tabular(panel: Panel) -> Panel:
    """Ask for the newest values only, as a table."""
    for target in panel.targets or ():
        assert isinstance(target, Dataquery)
        target.format_val, target.instant, target.range_val = PromQueryFormat.TABLE, True, False
    return panel


def _renamed(headings: Mapping[str, str], *, hidden: Sequence[str]) -> DataTransformerConfig:
    """Columns in the order of the headings, under these headings."""
    options = {
        "excludeByName": dict.fromkeys(hidden, True),
        "indexByName": {name: index for index, name in enumerate(headings)},
        "renameByName": dict(headings),
    }
    return DataTransformerConfig(id_val="organize", options=options)


def _cell(column: Column) -> list[DynamicConfigValue]:
    properties = [DynamicConfigValue("unit", column.unit)]
    if column.limits:
        properties.append(DynamicConfigValue("thresholds", _thresholds(column.limits).build()))
        properties.append(DynamicConfigValue("custom.cellOptions", TableColorTextCellOptions()))
    return properties


def _thresholds(limits: Limits) -> building.ThresholdsConfig:
    steps = [Threshold(value=None, color=GOOD), *(Threshold(value, color) for value, color in sorted(limits.items()))]
    return building.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def _legend(size: Size) -> common.VizLegendOptions:
    """A table below the graph: Grafana lets it have a third of the panel's height, and scrolls it.

    A row is one line, however long, so a narrow panel has place for the name and one value only.
    """
    legend = common.VizLegendOptions().display_mode(looks.LegendDisplayMode.TABLE).show_legend(True)
    calculated = ["lastNotNull"] if size.width < HALF.width else ["lastNotNull", "max"]
    return legend.placement(looks.LegendPlacement.BOTTOM).calcs(calculated).sort_by("Last *").sort_desc(True)
