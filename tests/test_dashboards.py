"""Dashboards, rules and docs/metrics.md name nothing but what a live server has; test_prometheus.py runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cutaway_server.service.metrics import CATALOG
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from promql import DASHBOARDS, DEPLOY, Asked, grouped_by, panel_queries, panels, rule_queries, rules, selectors
from scraping import Scrape, fetch, parsed
from serving import asking, serving, stub
from tiny import save_tiny

ROOT = DEPLOY.parent
SCRAPED = {"job", "instance"}  # labels that Prometheus adds
# Prometheus's own, and what only a server on a GPU has.
NOT_OURS = {"up"}
ON_GPUS = {
    "cutaway_gpu_memory_bytes", "cutaway_torch_allocated_bytes", "cutaway_torch_reserved_bytes",
    "cutaway_activations_peak_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def exposition(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a server says that has answered one request."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", path)
    with serving(path, metrics_compat="vllm") as live, stub(live.address) as client:
        list(client.Generate(asking([40, 41, 42], max_tokens=4)))
        return fetch(live.server.metrics.address)


@pytest.fixture(scope="module")
def live(exposition: str) -> Scrape:
    return parsed(exposition)


def known(live: Scrape) -> dict[str, set[str]]:
    """Names and labels that a query may use."""
    recorded = {rule["record"]: {"model_name", "instance"} for rule in rules() if "record" in rule}
    gpu = {name: {"model_name", "engine", "state"} for name in ON_GPUS}
    return {**live.series, **recorded, **gpu, **{name: set() for name in NOT_OURS}}


@pytest.mark.parametrize("script", ["deploy/grafana/generate.py", "docs/generate.py"])
def test_what_is_generated_is_up_to_date(script: str) -> None:
    done = subprocess.run([sys.executable, ROOT / script, "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("asked", panel_queries() + rule_queries(), ids=lambda asked: asked.where)
def test_every_query_reads_metrics_and_labels_that_a_live_server_has(asked: Asked, live: Scrape) -> None:
    there = known(live)
    read = list(selectors(asked.expr))
    assert read, "a query that reads nothing"
    for selector in read:
        assert selector.name in there, f"{asked.where} reads {selector.name}, which no server has"
        missing = selector.labels - there[selector.name] - SCRAPED
        assert not missing, f"{selector.name} has no label {missing}"
    labels = set.union(SCRAPED, *(there[selector.name] for selector in read))
    assert grouped_by(asked.expr) <= labels, f"{asked.where} groups by what its metrics have no label of"


def test_label_values_that_queries_pick_exist(live: Scrape) -> None:
    picked = re.compile(r'(\w+)\{[^}]*\b(reason|state|code|phase|rpc|what|le)="([^"]+)"')
    for asked in panel_queries() + rule_queries():
        for name, label, value in picked.findall(asked.expr):
            values = {s.labels.get(label) for s in live.samples if s.name == name}
            assert value in values, f"{asked.where}: {name} has no {label}={value}, but {values}"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_of_grafanas_types_and_each_panel_explains_itself(path: Path) -> None:
    register_default_plugins()
    text = path.read_text()
    read = Dashboard.from_json(json.loads(text))
    again = json.loads(json.dumps(read, cls=JSONEncoder))
    for variable in again["templating"]["list"]:
        for key in ("auto", "auto_min", "auto_count"):  # defaults of another kind of variable
            variable.pop(key)
    for panel in again["panels"]:
        if panel["type"] == "heatmap":
            panel["fieldConfig"]["defaults"].pop("custom")  # empty, and not needed
    assert again == json.loads(text), "a key or a value that Grafana's types have not"
    titles = [panel["title"] for panel in panels(path)]
    assert len(titles) >= 10
    assert {variable["name"] for variable in json.loads(text)["templating"]["list"]} >= {"model", "instance"}
    for panel in panels(path):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["type"] == "table" or panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"


def test_variables_ask_for_labels_that_exist(live: Scrape) -> None:
    for path in DASHBOARDS:
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                name, label = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
                assert label in live.series[name] | SCRAPED


def test_each_alert_says_what_to_do_and_has_a_test() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "tests" / "alerts.yml").read_text())["tests"]
    fired = {t["alertname"] for case in tests for t in case.get("alert_rule_test", []) if t.get("exp_alerts")}
    silent = {t["alertname"] for case in tests for t in case.get("alert_rule_test", []) if not t.get("exp_alerts")}
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) > 8
    for rule in alerts:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "action"}
        assert rule["alert"] in fired, "never seen to fire"
    assert len(silent) >= 6


def families(exposition: str) -> Iterator[tuple[str, str, str]]:
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", exposition, re.MULTILINE):
        help_text = re.search(rf"^# HELP {re.escape(name)} (.*)$", exposition, re.MULTILINE)
        assert help_text is not None
        yield name, kind, help_text[1]


def test_the_page_of_metrics_has_every_metric_that_is_served(exposition: str, live: Scrape) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `([\w:]+)` \| (.*) \|$", page, re.MULTILINE))
    served = {name: (kind, meaning) for name, kind, meaning in families(exposition)}
    ours = {name for name in served if name.startswith(("cutaway_", "vllm:"))}
    assert rows.keys() == ours | ON_GPUS
    for name in ours:
        kind, _, labels, meaning = rows[name].split(" | ", 3)
        assert (kind, meaning) == served[name]
        samples = {label for n in (name, f"{name}_bucket") for label in live.series.get(n, ())}
        told = set(re.findall(r"`(\w+)`", labels)) | {"model_name", "engine"}
        assert labels == "its facts" or samples - {"le"} == told, name
    for name in served.keys() - ours:
        assert f"`{name}`" in page, name


def test_names_end_as_prometheus_asks() -> None:
    units: dict[str, Any] = {"seconds": "_seconds", "bytes": "_bytes", "ratio": "_ratio"}
    for spec in (spec for heading, specs in CATALOG.items() if "vLLM" not in heading for spec in specs):
        assert re.fullmatch(r"cutaway_[a-z_]+", spec.name)
        assert (spec.kind == "counter") == spec.name.endswith("_total")
        assert spec.name.removesuffix("_total").endswith(units.get(spec.unit, "")), spec.name


def test_kubernetes_gets_every_dashboard() -> None:
    made = yaml.safe_load((DEPLOY / "grafana" / "kustomization.yaml").read_text())["configMapGenerator"][0]["files"]
    assert made == [f"dashboards/{path.name}" for path in DASHBOARDS]
