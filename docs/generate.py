"""Write metrics.md and options.md from the server's own code, or with --check tell whether they are up to date."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cutaway_server.service.metrics import CATALOG
from cutaway_server.service.metrics.spec import ALWAYS, Spec
from options import options_page

HERE = Path(__file__).parent
HEAD = """\
# Metrics

<!-- Written by docs/generate.py from the server's catalogue of metrics: change that, and run it. -->

`cutaway-server` serves them at `http://127.0.0.1:9464/metrics` (`--metrics-listen HOST:PORT`; `none` serves none) in
Prometheus's text format. They are the engine's own counters, read when Prometheus asks. Until the model is loaded there
are only those under "Server", of the process, and of calls of introspection.

Every metric has the labels `model_name` (as clients are told it) and `engine` (`0`: a server has one); the column
"labels" has what comes beside them. Counters start at 0 with the server. Counters and histograms exist from the start,
with every label value they can have, so that a rate never misses the first event.

`deploy/prometheus` has a scrape config with recording and alert rules, `deploy/grafana` the dashboards.
"""
PROCESS = """
## Process

From `prometheus_client`, without our labels: `process_resident_memory_bytes`, `process_virtual_memory_bytes`,
`process_cpu_seconds_total`, `process_open_fds`, `process_max_fds`, `process_start_time_seconds` (on Linux),
`python_info`, and by `generation` `python_gc_collections_total`, `python_gc_objects_collected_total` and
`python_gc_objects_uncollectable_total`.
"""
VLLM = """
With `--metrics-compat vllm` these are there too, so that dashboards, alerts and gateways made for vLLM work. Where
the two mean something else: a deadline that passes is an `abort` there; `time_per_output_token_seconds` is the older
name of `inter_token_latency_seconds`, and `gpu_...` are the older names of the cache's metrics. What Cutaway has no
counterpart of (LoRA, speculative decoding, sleep, transfers of KV) is left out, as vLLM does where it is off.
"""


def metrics_page() -> str:
    """The whole page of metrics."""
    parts = [HEAD]
    for heading, specs in CATALOG.items():
        ours = specs[0].name.startswith("cutaway_")
        parts += [f"\n## {heading}\n", "" if ours else VLLM, "\n", *table(specs)]
        if heading == "Server":
            parts.append(PROCESS)
    return "".join(parts)


def table(specs: tuple[Spec[Any], ...]) -> Iterator[str]:
    """One metric a line."""
    yield "| name | type | unit | labels | meaning |\n|---|---|---|---|---|\n"
    for spec in specs:
        labels = f"`{spec.label}`" if spec.label else "its facts" if spec.facts else ""
        yield f"| `{spec.name}` | {spec.kind} | {spec.unit} | {labels} | {spec.meaning} |\n"


def main() -> int:
    """The exit code: 1 if --check finds a difference."""
    assert ALWAYS == ("model_name", "engine"), "HEAD tells them"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not up to date")
    check = parser.parse_args().check
    stale = 0
    for name, text in (("metrics.md", metrics_page()), ("options.md", options_page())):
        page = HERE / name
        if not check:
            page.write_text(text)
        elif not page.exists() or page.read_text() != text:
            print(f"{page} is not up to date: run {Path(__file__).name}", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
