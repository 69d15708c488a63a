"""Write the dashboards and the console pages from panels.py, and the rules as a Kubernetes object;
with --check only compare.

    python deploy/grafana/generate.py [--check]

Grafana's JSON comes from its own schema's builders (grafana-foundation-sdk), so that a field it
does not know is an error here.
"""

from __future__ import annotations

import html
import json
import sys
import textwrap
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from panels import DASHBOARDS, Dashboard, Panel

HERE = Path(__file__).parent
CONSOLES = HERE.parent / "consoles"
RULES = HERE.parent / "rules" / "fluxion.yml"
PROMETHEUS_RULE = HERE.parent / "kubernetes" / "base" / "prometheus-rule.yaml"
PANEL_WIDTH, PANEL_HEIGHT = 12, 8
"""In Grafana's grid, 24 wide."""
_PROMETHEUS = models.DataSourceRef(type_val="prometheus", uid="prometheus")
_ONLY_IN_LEGEND = models.DynamicConfigValue(
    id_val="custom.hideFrom", value={"viz": True, "legend": False, "tooltip": False}
)


def grafana_panel(panel: Panel, place: int) -> timeseries.Panel:
    """A time series; panels fill the page from left to right in two columns."""
    row, column = divmod(place, 2)
    stacking = (
        common_models.StackingMode.NORMAL if panel.is_stacked else common_models.StackingMode.NONE
    )
    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.meaning)
        .no_value(panel.absent)
        .unit(panel.unit)
        .min(0)
        .datasource(_PROMETHEUS)
        .grid_pos(
            models.GridPos(
                h=PANEL_HEIGHT, w=PANEL_WIDTH, x=column * PANEL_WIDTH, y=row * PANEL_HEIGHT
            )
        )
        .fill_opacity(60 if panel.is_stacked else 0)
        .stacking(common.StackingConfig().mode(stacking))
        .legend(common.VizLegendOptions().show_legend(True).calcs(["lastNotNull"]))
    )
    for ordinal, line in enumerate(panel.lines):
        legend = line.legend.replace("{", "{{").replace("}", "}}")
        built = built.with_target(
            prometheus.Dataquery()
            .expr(line.expression)
            .legend_format(legend)
            .ref_id(chr(ord("A") + ordinal))
        )
        if not line.is_drawn:
            built = built.override_by_name(legend, [_ONLY_IN_LEGEND])
    return built


def grafana_json(page: Dashboard) -> str:
    """A dashboard as Grafana reads it."""
    built = (
        dashboard.Dashboard(page.title)
        .uid(page.uid)
        .tags(["fluxion"])
        .refresh("10s")
        .time("now-15m", "now")
        .readonly()
        .with_variable(
            dashboard.QueryVariable("node")
            .label("Node")
            .datasource(_PROMETHEUS)
            .query("label_values(fluxion_node_ready, instance)")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".+")
            .current(models.VariableOption(selected=True, text="All", value="$__all"))
        )
    )
    for place, panel in enumerate(page.panels):
        built = built.with_panel(grafana_panel(panel, place))
    return (
        json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(built.build())), indent=1) + "\n"
    )


def console_html(name: str, page: Dashboard) -> str:
    """A page that draws the same panels with nothing but Prometheus' own API."""
    links = " · ".join(
        f'<a href="{other}.html">{html.escape(DASHBOARDS[other].title)}</a>'
        if other != name
        else f"<b>{html.escape(page.title)}</b>"
        for other in DASHBOARDS
    )
    # Prometheus runs console pages through Go's templates, which take double braces for theirs.
    panels = json.dumps(
        [
            {
                "title": panel.title,
                "unit": panel.unit,
                "meaning": panel.meaning,
                "absent": panel.absent,
                "stacked": panel.is_stacked,
                "lines": [
                    {"expression": one.expression, "legend": one.legend, "drawn": one.is_drawn}
                    for one in panel.lines
                ],
            }
            for panel in page.panels
        ],
        indent=1,
    )
    template = (HERE / "console_template.html").read_text()
    return (
        template.replace("@TITLE@", html.escape(page.title))
        .replace("@LINKS@", links)
        .replace("@SCRIPT@", (HERE / "console.js").read_text())
        .replace("@PANELS@", panels)
    )


def prometheus_rule() -> str:
    """The rules as the Prometheus operator reads them."""
    return f"""\
# deploy/rules/fluxion.yml for the Prometheus operator. Written by deploy/grafana/generate.py.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: fluxion
spec:
{textwrap.indent(RULES.read_text(), "  ")}"""


def generated() -> dict[Path, str]:
    """Every file and what belongs in it."""
    files = {PROMETHEUS_RULE: prometheus_rule()}
    for name, page in DASHBOARDS.items():
        files[HERE / "dashboards" / f"{name}.json"] = grafana_json(page)
        files[CONSOLES / f"{name}.html"] = console_html(name, page)
    return files


def main(arguments: list[str]) -> int:
    """Write, or compare; returns the exit status."""
    files = generated()
    if arguments == ["--check"]:
        stale = [
            path.name
            for path, text in files.items()
            if not path.is_file() or path.read_text() != text
        ]
        if stale:
            print(f"not fresh: {', '.join(stale)}; run python deploy/grafana/generate.py")
        return 1 if stale else 0
    if arguments:
        print(__doc__)
        return 2
    for path, text in files.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
