"""What PromQL asks for: the dashboards' and rules' queries, and the metrics and labels in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

DEPLOY = Path(__file__).parent.parent / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
RULES = sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))


@dataclass(frozen=True, slots=True)
class Asked:
    """A query, and where it stands."""

    where: str
    expr: str


@dataclass(frozen=True, slots=True)
class Selector:
    """A metric that a query reads, with the labels it is picked by, as PromQL."""

    name: str
    labels: frozenset[str]
    text: str


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """All panels but the rows' headings."""
    found = json.loads(dashboard.read_text())["panels"]
    nested = [inner for panel in found for inner in panel.get("panels", [])]
    return [panel for panel in found + nested if panel["type"] != "row"]


def panel_queries(interval: str = "1m", **variables: str) -> list[Asked]:
    """Every panel's queries, with Grafana's variables filled in."""
    return [
        Asked(f"{path.stem}: {panel['title']}", _filled(target["expr"], interval, variables))
        for path in DASHBOARDS
        for panel in panels(path)
        for target in panel["targets"]
    ]


def rules() -> list[dict[str, Any]]:
    """All recording and alert rules."""
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def rule_queries() -> list[Asked]:
    """Every rule's query."""
    return [Asked(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]


def selectors(expr: str) -> Iterator[Selector]:
    """What a query reads."""
    for node in _nodes(promql_parser.parse(expr)):
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name, f"{expr} reads metrics of any name"
            yield Selector(node.name, frozenset(m.name for m in node.matchers.matchers), node.prettify())


def grouped_by(expr: str) -> set[str]:
    """The labels that a query groups by."""
    return {
        label
        for node in _nodes(promql_parser.parse(expr))
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None
        for label in node.modifier.labels
    }


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    for name in ("lhs", "rhs", "expr", "param", "vector_selector"):
        child = getattr(node, name, None)
        if child is not None:
            yield from _nodes(child)
    for child in getattr(node, "args", None) or ():
        yield from _nodes(child)


def _filled(expr: str, interval: str, variables: dict[str, str]) -> str:
    expr = expr.replace("$__rate_interval", interval)
    for name in ("model", "instance", "job"):
        expr = expr.replace(f"${name}", variables.get(name, ".+"))
    assert "$" not in expr, f"an unknown variable in {expr}"
    return expr
