"""Metrics of the KV cache: who holds it, what is found in it, and what is thrown out."""

from __future__ import annotations

from collections.abc import Mapping

from cutaway_server.service.metrics.sources import Sources
from cutaway_server.service.metrics.spec import Spec, counter, gauge, histogram, info


def _bytes(s: Sources) -> Mapping[str, float]:
    return {state: blocks * s.block_bytes for state, blocks in s.blocks().items()}


def _config(s: Sources) -> Mapping[str, str]:
    return {
        "block_size": str(s.pool.page_size),
        "num_blocks": str(s.pool.capacity),
        "block_bytes": str(s.block_bytes),
        "cache_dtype": str(s.engine.pages.keys.dtype).removeprefix("torch."),
        "prefix_caching": str(s.config.prefix_caching).lower(),
    }


CACHE: tuple[Spec[Sources], ...] = (
    gauge(
        "cutaway_kv_cache_blocks", "blocks",
        "Blocks of the KV cache: held by requests (used), kept for prompts that begin alike and evicted when room is "
        "needed (cached), or empty (free).",
        lambda s: s.blocks(), "state",
    ),
    gauge("cutaway_kv_cache_bytes", "bytes", "The same in bytes.", _bytes, "state"),
    gauge(
        "cutaway_kv_cache_usage_ratio", "ratio", "Share of the blocks that requests hold; cached blocks do not count.",
        lambda s: s.usage(),
    ),
    gauge(
        "cutaway_kv_cache_fragmentation_ratio", "ratio",
        "Share of the positions in used blocks that nothing is stored in: ends of blocks, and prompts being read.",
        lambda s: s.fragmentation(),
    ),
    counter(
        "cutaway_prefix_cache_queries_total", "tokens", "Prompt tokens that were looked for in the prefix cache.",
        lambda s: s.observed.prefix_queries,
    ),
    counter(
        "cutaway_prefix_cache_hits_total", "tokens", "Prompt tokens that were found there.",
        lambda s: s.observed.prefix_hits,
    ),
    counter(
        "cutaway_kv_cache_evictions_total", "blocks", "Cached blocks whose contents gave way to others.",
        lambda s: s.pool.evictions,
    ),
    counter(
        "cutaway_preemptions_total", "preemptions",
        "Sequences that gave their blocks back to others, to be computed again.",
        lambda s: s.observed.preemptions,
    ),
    histogram(
        "cutaway_kv_block_lifetime_seconds", "seconds", "Of evicted blocks: from being given out to eviction.",
        lambda s: s.pool.statistics.lifetime,
    ),
    histogram(
        "cutaway_kv_block_idle_before_eviction_seconds", "seconds",
        "Of evicted blocks: from the last request that held them to eviction.",
        lambda s: s.pool.statistics.idle,
    ),
    histogram(
        "cutaway_kv_block_reuse_gap_seconds", "seconds",
        "Of cached blocks that were found: from the last request that held them to the next.",
        lambda s: s.pool.statistics.reuse_gap,
    ),
    info("cutaway_cache_config_info", "How the KV cache is laid out.", _config),
)  # fmt: skip
