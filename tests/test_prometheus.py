"""A real Prometheus scrapes a real server under load: every panel and rule is answered, and says what clients saw."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from cutaway.v1 import capture_pb2, machine_pb2
from cutaway.v1 import introspection_pb2 as inside
from inspecting import Seen, capture, doubled, looking
from promql import DASHBOARDS, DEPLOY, Asked, panel_queries, rule_queries, selectors
from scraping import fetch, scrape
from serving import LiveServer, asking, eventually, serving, stub
from tiny import save_tiny

pytestmark = pytest.mark.prometheus
SECONDS = 14.0  # of load
INTERVAL = "5s"  # of rates
# Panels that rightly show nothing here: no GPU.
EMPTY = {"memory: GPU", "memory: torch", "memory: Activations, peak"}


def need(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, f"{name} is not installed: on Debian, apt-get install --no-install-recommends prometheus"
    return path


def promtool(*arguments: str, **options: Any) -> str:
    done = subprocess.run([need("promtool"), *arguments], capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running Prometheus."""

    address: str

    def get(self, path: str, **parameters: Any) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        assert answer["status"] == "success"
        assert not answer.get("warnings"), answer
        return answer["data"]

    def series(self, expr: str, start: float, end: float) -> list[list[float]]:
        """The numbers of each series that `expr` gives between two times, those that are none left out."""
        data = self.get("query_range", query=expr, start=start, end=end, step=1)
        found = [[float(v) for _, v in series["values"] if not math.isnan(float(v))] for series in data["result"]]
        return [values for values in found if values]

    def ready(self) -> bool:
        try:
            return bool(self.get("query", query="up{job='cutaway'} == 1")["result"])
        except (OSError, AssertionError):  # it answers 503 while it starts
            return False


@dataclass(frozen=True, slots=True)
class Load:
    """What clients saw, and when."""

    prometheus: Prometheus
    live: LiveServer
    start: float
    end: float
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated: int
    inspected: Seen


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def config(path: Path, target: str | None) -> Path:
    """The committed config with the committed rules, for this server and in a hurry."""
    settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": "500ms", "scrape_timeout": "400ms", "evaluation_interval": "1s"}
    settings["rule_files"] = [str(DEPLOY / "prometheus" / "rules" / "*.yml")]
    settings["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    file = path / "prometheus.yml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    path = tmp_path_factory.mktemp("prometheus")
    save_tiny("llama", path / "tiny")
    address = f"127.0.0.1:{free_port()}"
    # Room for six long sequences, so that blocks are evicted and requests preempted.
    with serving(path / "tiny", served_name="org/tiny", kv_cache_memory=150 * 12288, max_running=12) as live:
        command = [
            need("prometheus"), f"--config.file={config(path, live.server.metrics.address)}",
            f"--storage.tsdb.path={path / 'data'}", f"--web.listen-address={address}", "--log.level=warn",
        ]  # fmt: skip
        with (path / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            prometheus = Prometheus(address)
            assert eventually(prometheus.ready), (path / "log").read_text()
            yield drive(prometheus, live)
        finally:
            process.terminate()
            process.wait(20)


def drive(prometheus: Prometheus, live: LiveServer) -> Load:
    """Sixteen clients for a while: most finish, some leave, some ask nonsense; and one that looks inside."""
    start = time.time()
    usages: list[Any] = []
    inspected = Seen()
    threads = [threading.Thread(target=client, args=(live, seed, start + SECONDS, usages)) for seed in range(16)]
    threads.append(threading.Thread(target=inspect, args=(live, start + SECONDS, inspected)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    end = time.time()
    assert eventually(live.is_clean)
    time.sleep(1.5)  # for a last scrape of what is then at rest
    usages += inspected.usages
    sums = [sum(getattr(u, f"{kind}_tokens") for u in usages) for kind in ("prompt", "cached", "completion")]
    return Load(prometheus, live, start, end, len(usages), *sums, inspected)


def client(live: LiveServer, seed: int, until: float, usages: list[Any]) -> None:
    chance = random.Random(seed)
    with stub(live.address) as calls:
        while time.time() < until:
            if seed == 0:  # this one's are counted as failures or cancelled, and not in `usages`
                misbehave(calls, chance)
                continue
            begin = chance.randrange(40, 300)
            question = list(range(begin, begin + chance.randrange(40, 160)))
            call = calls.Generate(asking(question, max_tokens=chance.randrange(2, 250), n=chance.choice((1, 1, 2))))
            usages += [r.finished.usage for r in call if r.WhichOneof("event") == "finished"]


def inspect(live: LiveServer, until: float, seen: Seen) -> None:
    """Reads, changes, and does both, in prompts that begin alike and are partly found in the cache."""
    everywhere, edit = capture("blocks.*.hook_resid_post"), doubled("blocks.1.hook_resid_post", 3)
    lens, k = capture_pb2.Lens(top_k=3), capture_pb2.TopK(k=4)
    with grpc.insecure_channel(live.address) as channel, stub(live.address) as calls:
        for i in range(10**6):
            if time.time() > until:
                return
            prompt = [*range(40, 80), *(40 + (i * j) % 200 for j in range(20))]
            traced = looking(prompt, everywhere, capture("blocks.*.attn.hook_pattern", top_k=k), max_tokens=30)
            [began, *_] = seen.call(channel, "Trace", inside.TraceRequest(generate=traced))
            with contextlib.suppress(grpc.RpcError):  # what was kept of it has been evicted: that counts as refused
                name = began.event.started.request_id
                seen.call(channel, "ReadCache", machine_pb2.ReadCacheRequest(request_id=name))
            plain = looking(prompt, max_tokens=0)
            seen.call(channel, "GetHiddenStates", inside.GetHiddenStatesRequest(generate=plain))
            seen.call(channel, "LogitLens", inside.LogitLensRequest(generate=plain, lens=lens))
            seen.call(channel, "GetCacheStats")
            seen.take(calls.Generate(looking(prompt, edits=[edit], max_tokens=3)))
            seen.take(calls.Generate(looking(prompt, everywhere, edits=[edit], max_tokens=3)))


def misbehave(calls: Any, chance: random.Random) -> None:
    with pytest.raises(grpc.RpcError):
        list(calls.Generate(asking([40, 41], temperature=-1.0)))
    time.sleep(chance.uniform(0.05, 0.2))


@pytest.mark.parametrize("asked", panel_queries(INTERVAL), ids=lambda asked: asked.where)
def test_every_panel_shows_something(asked: Asked, load: Load) -> None:
    found = load.prometheus.series(asked.expr, load.start + 5, load.end)
    assert bool(found) is (asked.where not in EMPTY), asked.expr


@pytest.mark.parametrize("asked", rule_queries(), ids=lambda asked: asked.where)
def test_every_rule_is_answered_and_reads_metrics_that_are_there(asked: Asked, load: Load) -> None:
    load.prometheus.series(asked.expr, load.start, load.end)
    for selector in selectors(asked.expr):
        assert load.prometheus.series(selector.text, load.start + 5, load.end), f"nothing is {selector.text}"


def test_prometheus_finds_all_rules_in_health_and_all_recordings_recorded(load: Load) -> None:
    groups = load.prometheus.get("rules")["groups"]
    loaded = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in loaded} == {asked.where for asked in rule_queries()}
    assert {rule["health"] for rule in loaded} == {"ok"}
    for rule in loaded:
        if rule["type"] == "recording":
            assert load.prometheus.series(rule["name"], load.start + 5, load.end), rule["name"]


def test_prometheus_has_exactly_what_clients_saw(load: Load) -> None:
    def last(metric: str, labels: str = "") -> float:
        (sample,) = load.prometheus.get("query", query=f"sum({metric}{{{labels}}})")["result"]
        return float(sample["value"][1])

    assert load.requests > 50
    assert last("cutaway_requests_finished_total", 'reason="length"') == load.requests
    assert last("cutaway_prompt_tokens_total") == load.prompt_tokens
    assert last("cutaway_cached_tokens_total") == load.cached_tokens
    assert last("cutaway_generation_tokens_total") == load.generated
    assert last("cutaway_requests_failed_total", 'code="INVALID_ARGUMENT"') > 10
    assert last("cutaway_preemptions_total") > 0
    assert last("cutaway_kv_cache_evictions_total") > 0


def test_prometheus_has_exactly_the_rows_and_bytes_that_were_captured_and_sent(load: Load) -> None:
    def last(metric: str, label: str) -> dict[str, float]:
        """The values that are not 0, by a label."""
        found = load.prometheus.get("query", query=f"{metric} > 0")["result"]
        return {sample["metric"].get(label, ""): float(sample["value"][1]) for sample in found}

    seen = load.inspected
    assert last("cutaway_introspection_requests_total", "rpc") == +seen.begun
    assert last("cutaway_introspection_received_bytes_total", "rpc") == +seen.asked_bytes
    assert last("cutaway_introspection_sent_bytes_total", "rpc") == +seen.answered_bytes
    assert last("cutaway_introspection_request_seconds_count", "rpc") == +seen.begun
    assert last("cutaway_captured_rows_total", "engine") == {"0": seen.captured_rows}
    assert last("cutaway_captured_bytes_total", "engine") == {"0": seen.captured_bytes}
    assert last("cutaway_introspection_steps_total", "what").keys() == {"captures", "edits", "both"}
    assert last("cutaway_capture_memory_bytes", "state").keys() == {"free"}, "all is given back"


def test_the_variables_of_the_dashboards_offer_this_server(load: Load) -> None:
    for path in DASHBOARDS:
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                metric, label = variable["query"].removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
                series = load.prometheus.get(
                    "series", **{"match[]": metric.replace("$job", ".+").replace("$model", ".+")}
                )
                values = {found[label] for found in series}
                expected = {"job": "cutaway", "model": "org/tiny", "instance": load.live.server.metrics.address}
                assert values == {expected[variable["name"]]}


def test_a_model_picked_in_grafana_picks_its_series(load: Load) -> None:
    """Grafana puts values into queries as regular expressions, escaped."""
    picked = panel_queries(
        INTERVAL, model="org/tiny", instance=str(load.live.server.metrics.address).replace(".", "\\\\.")
    )
    other = panel_queries(INTERVAL, model="another")
    for here, there in zip(picked, other, strict=True):
        if "model_name" in here.expr and here.where not in EMPTY:
            assert load.prometheus.series(here.expr, load.start + 5, load.end), here.where
            assert not load.prometheus.series(there.expr, load.start + 5, load.end), there.where


def test_a_scrape_under_load_was_quick(load: Load) -> None:
    (sample,) = load.prometheus.get("query", query="quantile_over_time(0.5, scrape_duration_seconds[1m])")["result"]
    assert float(sample["value"][1]) < 0.1, "sixteen clients in the same process share its interpreter"
    assert scrape(load.live.server.metrics.address)("cutaway_requests_received_total") >= load.requests


def test_promtool_finds_nothing_wrong(load: Load, tmp_path: Path) -> None:
    where = DEPLOY / "prometheus"
    promtool("check", "config", str(where / "prometheus.yml"))
    promtool("test", "rules", *map(str, sorted((where / "tests").glob("*.yml"))))
    assert promtool("check", "metrics", input=fetch(load.live.server.metrics.address)) == ""
