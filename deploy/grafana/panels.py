"""Panels as Cutaway's dashboards want them: of few sizes, and with a description that says what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

CHOSEN = 'model_name=~"$model",instance=~"$instance"'
PROCESS = 'job=~"$job",instance=~"$instance"'  # metrics of the process know no model
SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
COLUMNS = 24
Panel = TypeVar("Panel", stat.Panel, timeseries.Panel, heatmap.Panel, table.Panel)


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and how its series are called."""

    expr: str
    legend: str


def rate(metric: str, by: str = "", **labels: str) -> str:
    """Per second, summed over instances but apart by the label `by`."""
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}(rate({metric}{{{_with(labels)}}}[$__rate_interval]))"


def total(metric: str, by: str = "", **labels: str) -> str:
    """A gauge, summed over instances but apart by the label `by`."""
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}({metric}{{{_with(labels)}}})"


def average(metric: str, by: str = "") -> str:
    """The mean of a histogram's numbers."""
    return f"{rate(f'{metric}_sum', by)} / {rate(f'{metric}_count', by)}"


def quantile(share: float, metric: str) -> str:
    """A histogram's quantile, over all instances chosen."""
    return f"histogram_quantile({share:g}, {rate(f'{metric}_bucket', 'le')})"


def quantiles(metric: str) -> list[Query]:
    """What half, most and nearly all stay below."""
    return [Query(quantile(share, metric), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)]


def number(
    title: str, unit: str, description: str, expr: str, *steps: tuple[float, str], decimals: int | None = None
) -> stat.Panel:
    """One number of now, coloured from each of `steps` (value, colour) on."""
    panel = _common(stat.Panel(), title, unit, description, [Query(expr, title)]).span(COLUMNS // 8).height(4)
    panel = panel.thresholds(_thresholds(steps)).color_scheme(_by_threshold())
    return panel if decimals is None else panel.decimals(decimals)


def graph(
    title: str, unit: str, description: str, *queries: Query, steps: tuple[tuple[float, str], ...] = (),
    stacked: bool = False, most: float | None = None, width: int = COLUMNS // 3,
) -> timeseries.Panel:  # fmt: skip
    """Lines over time, from 0; `steps` (value, colour) are drawn where they lie."""
    panel = _common(timeseries.Panel(), title, unit, description, list(queries)).span(width).height(8).min(0)
    panel = panel.fill_opacity(40 if stacked else 8).line_width(1).show_points(common.VisibilityMode.NEVER)
    panel = panel.tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
    if stacked:
        panel = panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    if most is not None:
        panel = panel.max(most)
    if steps:
        style = common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        panel = panel.thresholds(_thresholds(steps)).thresholds_style(style)
    return panel


def heat(title: str, unit: str, description: str, metric: str) -> heatmap.Panel:
    """How many of a histogram's numbers fell into each bucket, over time."""
    query = Query(f"sum by (le) (increase({metric}_bucket{{{CHOSEN}}}[$__rate_interval]))", "{{le}}")
    panel = _common(heatmap.Panel(), title, unit, description, [query], prometheus_models.PromQueryFormat.HEATMAP)
    panel = panel.span(COLUMNS // 2).height(8).cell_gap(1)
    return panel.y_axis(heatmap.YAxisConfig().unit(unit)).color(
        heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Oranges").steps(32)
    )


def facts(title: str, description: str, metric: str) -> table.Panel:
    """The labels of a metric that says what is so, a row for each instance."""
    panel = _common(
        table.Panel(), title, "", description, [Query(f"{metric}{{{CHOSEN}}}", "")],
        prometheus_models.PromQueryFormat.TABLE, instant=True,
    )  # fmt: skip
    hidden = dict.fromkeys(("Time", "Value", "__name__", "engine", "job"), True)
    organize = dashboard.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
    return panel.span(COLUMNS).height(5).with_transformation(organize)


def board(uid: str, title: str, description: str, rows: dict[str, list[object]]) -> builders.Dashboard:
    """A dashboard of rows of panels, with variables for data source, job, model and instance."""
    made = builders.Dashboard(title).uid(uid).description(description).tags(["cutaway"]).readonly()
    made = (
        made.time("now-1h", "now").refresh("10s").timezone("browser").tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
    )
    made = made.with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    for name, label, query in (
        ("job", "Job", "label_values(cutaway_ready, job)"),
        ("model", "Model", 'label_values(cutaway_ready{job=~"$job"}, model_name)'),
        ("instance", "Instance", 'label_values(cutaway_ready{job=~"$job",model_name=~"$model"}, instance)'),
    ):
        made = made.with_variable(_choice(name, label, query))
    others = builders.DashboardLink("Cutaway").type(dashboard.DashboardLinkType.DASHBOARDS).tags(["cutaway"])
    made = made.link(others.as_dropdown(True).keep_time(True).include_vars(True))
    for heading, panels in rows.items():
        made = made.with_row(builders.Row(heading))
        for panel in panels:
            made = made.with_panel(panel)
    return made


def _with(labels: dict[str, str]) -> str:
    return ",".join([CHOSEN, *(f'{name}="{value}"' for name, value in labels.items())])


def _common(
    panel: Panel, title: str, unit: str, description: str, queries: list[Query],
    form: prometheus_models.PromQueryFormat = prometheus_models.PromQueryFormat.TIME_SERIES, *, instant: bool = False,
) -> Panel:  # fmt: skip
    panel = panel.title(title).description(description).datasource(SOURCE)
    if unit:
        panel = panel.unit(unit)
    for letter, query in zip("ABCDEFGH", queries, strict=False):
        target = prometheus.Dataquery().ref_id(letter).expr(query.expr).legend_format(query.legend).format(form)
        panel = panel.with_target(target.datasource(SOURCE).instant() if instant else target.datasource(SOURCE).range())
    return panel


def _thresholds(steps: tuple[tuple[float, str], ...]) -> builders.ThresholdsConfig:
    all_steps = [dashboard.Threshold(value=None, color="green")]
    all_steps += [dashboard.Threshold(value=value, color=color) for value, color in steps]
    return builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(all_steps)


def _by_threshold() -> builders.FieldColor:
    return builders.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS)


def _choice(name: str, label: str, query: str) -> builders.QueryVariable:
    made = builders.QueryVariable(name).label(label).datasource(SOURCE).query(query).multi(True).include_all(True)
    everything = dashboard.VariableOption(selected=True, text="All", value="$__all")
    return made.refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED).current(everything).all_value(".+")
