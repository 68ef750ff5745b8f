"""The KV cache: who holds it, what is found again, and what had to go."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders
from panels import CHOSEN, Query, average, board, facts, graph, heat, number, quantiles, rate, total

ORANGE, RED = "orange", "red"
HIT_RATE = f"{rate('cutaway_prefix_cache_hits_total')} / {rate('cutaway_prefix_cache_queries_total')}"
SIZING = "give the cache more memory (--kv-cache-memory), run fewer requests (--max-running), or add instances"


def cache() -> builders.Dashboard:
    """The dashboard."""
    rows = {"Now": _now(), "The pool": _pool(), "Prefix cache": _prefix(), "Blocks": _blocks(), "Layout": _layout()}
    return board("cutaway-cache", "Cutaway: KV cache", "Pool, prefix cache, evictions and preemptions.", rows)


def _now() -> list[object]:
    return [
        number(
            "In use", "percentunit", f"The fullest instance: blocks that requests hold. Near 100 %: {SIZING}.",
            f"max(cutaway_kv_cache_usage_ratio{{{CHOSEN}}})", (0.85, ORANGE), (0.95, RED),
        ),
        number(
            "Kept for reuse", "bytes", "Blocks that nobody holds but that prompts can find.",
            total("cutaway_kv_cache_bytes", state="cached"),
        ),
        number("Free", "bytes", "Blocks that hold nothing.", total("cutaway_kv_cache_bytes", state="free")),
        number(
            "Found", "percentunit", "Share of prompt tokens that were found in the cache.", HIT_RATE, decimals=1,
        ),
        number("Evictions", "short", "Blocks a second.", rate("cutaway_kv_cache_evictions_total"), decimals=1),
        number(
            "Preemptions", "short", f"A second. Each is work done twice: {SIZING}.", rate("cutaway_preemptions_total"),
            (0.1, ORANGE), (1, RED), decimals=2,
        ),
        number(
            "Fragmentation", "percentunit",
            "Share of the positions in used blocks that hold nothing. High with short sequences: lower --page-size.",
            f"avg(cutaway_kv_cache_fragmentation_ratio{{{CHOSEN}}})", (0.3, ORANGE), (0.6, RED),
        ),
        number(
            "Preempted, waiting", "short", "Requests that gave their blocks back and wait to go on.",
            total("cutaway_requests_waiting", reason="preempted"), (1, ORANGE), (10, RED),
        ),
    ]  # fmt: skip


def _pool() -> list[object]:
    return [
        graph(
            "Who holds the pool", "bytes",
            f"Used: by requests. Cached: kept for reuse, given up when room is needed. Used near the top: {SIZING}.",
            Query(total("cutaway_kv_cache_bytes", "state"), "{{state}}"), stacked=True, width=12,
        ),
        graph(
            "In use, by instance", "percentunit", "Blocks that requests hold; cached ones do not count.",
            Query(f"cutaway_kv_cache_usage_ratio{{{CHOSEN}}}", "{{instance}}"), steps=((0.95, RED),), most=1, width=12,
        ),
        graph(
            "Preemptions a second", "short", f"Not 0 for long: {SIZING}.",
            Query(rate("cutaway_preemptions_total", "instance"), "{{instance}}"),
        ),
        graph(
            "Rows computed for each token asked", "short",
            "Computed rows over (prompt - cached + generated). Above 1: computed again after preemptions.",
            Query(
                f"{rate('cutaway_computed_tokens_total')} / ({rate('cutaway_prompt_tokens_total')} "
                f"- {rate('cutaway_cached_tokens_total')} + {rate('cutaway_generation_tokens_total')})", "ratio",
            ),
        ),
        graph(
            "Fragmentation", "percentunit", "Share of the positions in used blocks that hold nothing (yet).",
            Query(f"cutaway_kv_cache_fragmentation_ratio{{{CHOSEN}}}", "{{instance}}"), most=1,
        ),
    ]  # fmt: skip


def _prefix() -> list[object]:
    return [
        graph(
            "Found in the cache", "percentunit",
            "Share of prompt tokens. Low although prompts begin alike: blocks are evicted before they are wanted "
            "again (compare idle and reuse below), or requests are spread over instances.",
            Query(HIT_RATE, "found"), most=1,
        ),
        graph(
            "Prompt tokens a second", "short", "Looked for, and found.",
            Query(rate("cutaway_prefix_cache_queries_total"), "looked for"),
            Query(rate("cutaway_prefix_cache_hits_total"), "found"),
        ),
        graph(
            "Evictions a second", "short", "Blocks whose contents gave way. Little is found: the cache is small.",
            Query(rate("cutaway_kv_cache_evictions_total", "instance"), "{{instance}}"),
        ),
    ]  # fmt: skip


def _blocks() -> list[object]:
    lifetime, idle, gap = (
        f"cutaway_kv_block_{name}_seconds" for name in ("lifetime", "idle_before_eviction", "reuse_gap")
    )
    return [
        graph("Lifetime", "s", "Of evicted blocks, from being given out.", *quantiles(lifetime)),
        graph(
            "Idle before eviction", "s",
            "How long the cache keeps what nobody holds. Shorter than the reuse gap of your traffic: nothing is found.",
            *quantiles(idle),
        ),
        graph("Reuse gap", "s", "How long blocks lay idle that were then found.", *quantiles(gap)),
        heat("Idle before eviction, heat map", "s", "When what lay idle was given up.", idle),
        heat("Reuse gap, heat map", "s", "When what lay idle was wanted again.", gap),
        graph(
            "Means", "s", "The three above, as means.", Query(average(lifetime), "lifetime"),
            Query(average(idle), "idle before eviction"), Query(average(gap), "reuse gap"), width=24,
        ),
    ]  # fmt: skip


def _layout() -> list[object]:
    return [facts("Layout", "How each instance's cache is laid out.", "cutaway_cache_config_info")]
