"""Dashboards, console pages and rules: fresh, of metrics that exist, in PromQL that parses."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import promql_parser
import pytest

from services.decode.metric_definitions import DECODE_DEFINITIONS
from services.gpu_metrics import ENGINE_GPU_DEFINITIONS, NVML_DEFINITIONS, TIER_DEFINITIONS
from services.metrics import NODE_DEFINITIONS
from services.prefill.metrics import PREFILL_DEFINITIONS
from tests.tools import require_program

DEPLOY = Path(__file__).parents[2] / "deploy"
DEFINITIONS = (
    *(*NODE_DEFINITIONS, *DECODE_DEFINITIONS, *PREFILL_DEFINITIONS),
    *(*ENGINE_GPU_DEFINITIONS, *TIER_DEFINITIONS, *NVML_DEFINITIONS),
)


def load(path: Path) -> Iterator[ModuleType]:
    """A module of deploy/, for as long as it is wanted."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


@pytest.fixture(scope="module")
def expressions():
    yield from load(DEPLOY / "expressions.py")


@pytest.fixture(scope="module")
def panels():
    """Of all pages."""
    for module in load(DEPLOY / "grafana" / "panels.py"):
        yield [panel for page in module.DASHBOARDS.values() for panel in page.panels]


def test_generated_files_are_fresh():
    check = subprocess.run(
        [sys.executable, DEPLOY / "grafana" / "generate.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_every_expression_parses(expressions):
    found = expressions.all_expressions()
    assert len({one.where.partition(":")[0] for one in found}) > 6
    for one in found:
        promql_parser.parse(one.promql)


def test_an_expression_that_does_not_parse_is_noticed():
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        promql_parser.parse("sum(rate(fluxion_requests_total[1m])")


def test_every_metric_that_is_asked_for_is_exported_or_recorded(expressions):
    known = {"process_cpu_seconds_total"}
    for one in DEFINITIONS:
        suffixes = ("_bucket", "_sum", "_count") if one.kind == "histogram" else ("",)
        known |= {one.name + suffix for suffix in suffixes}
    recorded = {rule["record"] for rule in expressions._rule_list() if "record" in rule}
    for one in expressions.all_expressions():
        asked = set(re.findall(r"\bfluxion[_:][\w:]+", one.promql))
        assert asked
        assert asked <= known | recorded, one


def test_every_label_that_is_asked_for_exists(expressions):
    labels = {label for one in DEFINITIONS for label in one.labels} | {"le", "instance", "job"}
    for one in expressions.all_expressions():
        for grouping in re.findall(r"(?:by|on) \(([^)]*)\)", one.promql):
            assert {label.strip() for label in grouping.split(",")} <= labels, one


def dimension(promql: str) -> str:
    """What a line counts, from the definitions of the metrics that it reads."""
    if "histogram_quantile" in promql:
        return "seconds"
    if recorded := re.search(r"\bfluxion:\w+:(ratio|count)", promql):
        return recorded[1]
    if " / " in promql:
        above, below = (dimension(side) for side in promql.split(" / "))
        return "ratio" if above == below else f"{above} for {below}"
    (metric,) = (one for one in DEFINITIONS if re.search(rf"\b{one.name}\b", promql))
    # Each request that a prefill node knows is one prompt.
    unit = "requests" if metric.unit == "prompts" else metric.unit
    return unit + ("/s" if promql.startswith(("sum", "avg")) and "rate(" in promql else "")


GRAFANA_UNITS = {
    "bytes": "bytes",
    "bytes/s": "Bps",
    "bytes/s for tokens/s": "bytes",
    "tokens/s for steps/s": "suffix: sequences",
    "seconds": "s",
    "seconds/s": "percentunit",
    "ratio": "percentunit",
    "0 to 1": "percentunit",
    "1": "suffix: nodes",
}


def test_every_line_of_a_panel_is_in_the_panels_unit(panels):
    for panel in panels:
        for line in panel.lines:
            counted = dimension(line.expression)
            assert panel.unit == GRAFANA_UNITS.get(counted, f"suffix: {counted}"), line


def test_every_line_is_of_the_nodes_chosen(panels):
    for panel in panels:
        for line in panel.lines:
            selectors = re.findall(r"\bfluxion[_:][\w:]+(\{[^}]*\})?", line.expression)
            assert set(selectors) == {'{instance=~"$node"}'}, line


def test_every_panel_says_in_one_sentence_why_it_is_empty(panels):
    for panel in panels:
        assert re.fullmatch(r"[A-Z][^.]+\.", panel.absent), panel


def test_lines_of_a_panel_have_different_names():
    for path in (DEPLOY / "grafana" / "dashboards").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            legends = [target["legendFormat"] for target in panel["targets"]]
            assert len(set(legends)) == len(legends), panel["title"]


def test_what_needs_a_gpu_is_known_through_recorded_metrics_too(expressions):
    needing = {one.where for one in expressions.needing_gpu(expressions.all_expressions())}
    assert "alert FluxionPcieNearLimit" in needing
    assert "traffic.json: Share of the PCIe link" in needing
    assert "traffic.json: Device tier: hits" in needing
    assert "overview.json: Requests" not in needing


def test_every_documented_metric_group_is_on_a_dashboard(expressions):
    shown = " ".join(one.promql for one in expressions.all_expressions())
    unseen = {one.name for one in DEFINITIONS if one.name not in shown}
    # Those beside what is shown: the node's labels, one request's time, hand-offs and
    # samples as counts.
    assert unseen == {
        "fluxion_node_info",
        "fluxion_request_seconds",
        "fluxion_store_sequences",
        "fluxion_handoffs_total",
        "fluxion_head_error_samples_total",
        "fluxion_head_error_bytes_total",
        "fluxion_prefill_handoffs_total",
        "fluxion_prefill_prompts_total",
        "fluxion_prefill_busy_seconds_total",
        "fluxion_prefill_seconds",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "rules/fluxion.yml"),
        ("test", "rules", "rules/fluxion.test.yml"),
    ],
)
def test_promtool_accepts_configuration_and_rules(arguments):
    require_program("promtool", package="prometheus")
    result = subprocess.run(
        ["promtool", *arguments], cwd=DEPLOY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
