"""Every PromQL expression of dashboards, console pages and rules, and whether it has data.

    python deploy/expressions.py http://127.0.0.1:9090

asks a Prometheus that scrapes a cluster under load. An expression without data is an error, unless
it reads a metric that only a node with a GPU has; those are listed. Of an alert, which has no data
while all is well, what it compares is asked for.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from services.gpu_metrics import ENGINE_GPU_DEFINITIONS, NVML_DEFINITIONS, TIER_DEFINITIONS

HERE = Path(__file__).parent
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks this machine's Prometheus, whatever http_proxy says."""
_COMPARISON = re.compile(r" (==|!=|<=|>=|<|>) ")


@dataclass(frozen=True)
class Expression:
    """One expression and where it stands."""

    where: str
    promql: str


def all_expressions() -> list[Expression]:
    """Of Grafana's dashboards, the console pages and the rules, as committed."""
    return [*_dashboards(), *_consoles(), *_rules()]


def needing_gpu(expressions: list[Expression]) -> set[Expression]:
    """Those that read a metric that only a node with a GPU exports, through recorded ones too."""
    definitions = (*ENGINE_GPU_DEFINITIONS, *TIER_DEFINITIONS, *NVML_DEFINITIONS)
    names = {one.name for one in definitions}
    for rule in _rule_list():
        if "record" in rule and names & _words(rule["expr"]):
            names.add(rule["record"])
    return {one for one in expressions if names & _words(one.promql)}


def answers(prometheus: str, expression: Expression) -> int:
    """Number of series that Prometheus has for an expression now."""
    query = urllib.parse.urlencode({"query": expression.promql})
    with DIRECTLY.open(f"{prometheus}/api/v1/query?{query}", timeout=30) as answer:
        return len(json.load(answer)["data"]["result"])


def _dashboards() -> Iterator[Expression]:
    for path in sorted((HERE / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield Expression(f"{path.name}: {panel['title']}", _for_all(target["expr"]))


def _consoles() -> Iterator[Expression]:
    for path in sorted((HERE / "consoles").glob("*.html")):
        embedded = re.search(r'id="panels">(.*?)</script>', path.read_text(), re.DOTALL)
        assert embedded is not None, path
        for panel in json.loads(embedded[1]):
            for line in panel["lines"]:
                yield Expression(f"{path.name}: {panel['title']}", _for_all(line["expression"]))


def _rules() -> Iterator[Expression]:
    for rule in _rule_list():
        if "record" in rule:
            yield Expression(f"record {rule['record']}", rule["expr"].strip())
        else:
            compared = _COMPARISON.sub(r" \1 bool ", rule["expr"].strip())
            yield Expression(f"alert {rule['alert']}", compared)


def _rule_list() -> list[dict[str, str]]:
    groups = yaml.safe_load((HERE / "rules" / "fluxion.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _for_all(expression: str) -> str:
    """What a page asks: all nodes, rates over a minute."""
    return expression.replace("$node", ".+").replace("$__rate_interval", "1m")


def _words(promql: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_:][\w:]*", promql))


def main(prometheus: str) -> int:
    """Ask for every expression; returns the exit status."""
    expressions = all_expressions()
    excused = needing_gpu(expressions)
    empty = [one for one in expressions if answers(prometheus, one) == 0]
    for one in empty:
        status = "needs a GPU" if one in excused else "EMPTY"
        print(f"{status:12} {one.where}\n{'':12} {one.promql}")
    failed = [one for one in empty if one not in excused]
    print(
        f"{len(expressions)} expressions: {len(expressions) - len(empty)} with data, "
        f"{len(empty) - len(failed)} empty for want of a GPU, {len(failed)} empty"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1].rstrip("/")))
