"""The same values under vLLM's names, so that its dashboards, its alerts and gateways that know it work.

Where the two differ in meaning: a deadline is an abort there; time per output token is of a request. What Cutaway has
no counterpart of (LoRA, speculative decoding, sleep, transfers of KV) is left out, as vLLM does where it is off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cutaway_server.service.metrics.sources import Sources
from cutaway_server.service.metrics.spec import Spec, Value, counter, gauge, histogram, info

Reader = Callable[[Sources], Value | None]


def _finished(s: Sources) -> Mapping[str, float]:
    ended = dict(s.observed.completions)
    ended["abort"] += ended.pop("deadline")
    return ended


def _waiting_by_reason(s: Sources) -> Mapping[str, float]:
    return {"capacity": sum(s.waiting().values()), "deferred": 0}


def _prompt_by_source(s: Sources) -> Mapping[str, float]:
    cached, all_of_them = s.observed.cached_tokens, s.observed.prompt_tokens
    return {"local_compute": all_of_them - cached, "local_cache_hit": cached, "external_kv_transfer": 0}


def _cache_config(s: Sources) -> Mapping[str, str]:
    return {
        "block_size": str(s.pool.page_size),
        "num_gpu_blocks": str(s.pool.capacity),  # whatever the device
        "cache_dtype": str(s.engine.pages.keys.dtype).removeprefix("torch."),
        "enable_prefix_caching": str(s.config.prefix_caching),
        "gpu_memory_utilization": str(s.config.memory_utilization),
    }


GAUGES: tuple[tuple[str, str, str, Reader, str | None], ...] = (
    ("num_requests_running", "requests", "cutaway_requests_running", lambda s: s.running(), None),
    ("num_requests_waiting", "requests", "cutaway_requests_waiting", lambda s: sum(s.waiting().values()), None),
    ("num_requests_waiting_by_reason", "requests", "cutaway_requests_waiting", _waiting_by_reason, "reason"),
    ("kv_cache_usage_perc", "ratio", "cutaway_kv_cache_usage_ratio", lambda s: s.usage(), None),
    ("gpu_cache_usage_perc", "ratio", "cutaway_kv_cache_usage_ratio", lambda s: s.usage(), None),
)

COUNTERS: tuple[tuple[str, str, str, Reader, str | None], ...] = (
    ("prompt_tokens", "tokens", "cutaway_prompt_tokens", lambda s: s.observed.prompt_tokens, None),
    ("prompt_tokens_cached", "tokens", "cutaway_cached_tokens", lambda s: s.observed.cached_tokens, None),
    ("prompt_tokens_by_source", "tokens", "cutaway_prompt_tokens", _prompt_by_source, "source"),
    ("generation_tokens", "tokens", "cutaway_generation_tokens", lambda s: s.observed.generation_tokens, None),
    ("request_success", "completions", "cutaway_completions_finished", _finished, "finished_reason"),
    ("num_preemptions", "preemptions", "cutaway_preemptions", lambda s: s.observed.preemptions, None),
    ("prefix_cache_queries", "tokens", "cutaway_prefix_cache_queries", lambda s: s.observed.prefix_queries, None),
    ("prefix_cache_hits", "tokens", "cutaway_prefix_cache_hits", lambda s: s.observed.prefix_hits, None),
    ("gpu_prefix_cache_queries", "tokens", "cutaway_prefix_cache_queries", lambda s: s.observed.prefix_queries, None),
    ("gpu_prefix_cache_hits", "tokens", "cutaway_prefix_cache_hits", lambda s: s.observed.prefix_hits, None),
)

HISTOGRAMS: tuple[tuple[str, str, str, Reader], ...] = (
    ("time_to_first_token_seconds", "seconds", "time_to_first_token_seconds", lambda s: s.observed.first_token),
    ("inter_token_latency_seconds", "seconds", "inter_token_seconds", lambda s: s.observed.inter_token),
    ("time_per_output_token_seconds", "seconds", "inter_token_seconds", lambda s: s.observed.inter_token),
    (
        "request_time_per_output_token_seconds", "seconds", "time_per_output_token_seconds",
        lambda s: s.observed.per_output_token,
    ),
    ("e2e_request_latency_seconds", "seconds", "request_duration_seconds", lambda s: s.observed.duration),
    ("request_queue_time_seconds", "seconds", "request_queue_seconds", lambda s: s.observed.queue),
    ("request_inference_time_seconds", "seconds", "request_inference_seconds", lambda s: s.observed.inference),
    ("request_prefill_time_seconds", "seconds", "request_prefill_seconds", lambda s: s.observed.prefill),
    ("request_decode_time_seconds", "seconds", "request_decode_seconds", lambda s: s.observed.decode),
    ("request_prompt_tokens", "tokens", "request_prompt_tokens", lambda s: s.observed.prompt_length),
    ("request_generation_tokens", "tokens", "request_generation_tokens", lambda s: s.observed.generation_length),
    (
        "request_max_num_generation_tokens", "tokens", "request_max_generation_tokens",
        lambda s: s.observed.longest_generation,
    ),
    ("request_params_n", "completions", "request_n", lambda s: s.observed.n),
    ("request_params_max_tokens", "tokens", "request_max_tokens", lambda s: s.observed.max_tokens),
    ("iteration_tokens_total", "tokens", "step_tokens", lambda s: s.observed.step_tokens),
    ("kv_block_lifetime_seconds", "seconds", "kv_block_lifetime_seconds", lambda s: s.pool.statistics.lifetime),
    (
        "kv_block_idle_before_evict_seconds", "seconds", "kv_block_idle_before_eviction_seconds",
        lambda s: s.pool.statistics.idle,
    ),
    ("kv_block_reuse_gap_seconds", "seconds", "kv_block_reuse_gap_seconds", lambda s: s.pool.statistics.reuse_gap),
)  # fmt: skip

VLLM: tuple[Spec[Sources], ...] = (
    *(
        gauge(f"vllm:{name}", unit, f"{same}, as vLLM names it.", read, label)
        for name, unit, same, read, label in GAUGES
    ),
    *(
        counter(f"vllm:{name}_total", unit, f"{same}_total, as vLLM names it.", read, label)
        for name, unit, same, read, label in COUNTERS
    ),
    *(
        histogram(f"vllm:{name}", unit, f"cutaway_{same}, as vLLM names it.", read)
        for name, unit, same, read in HISTOGRAMS
    ),
    info("vllm:cache_config_info", "cutaway_cache_config_info, as vLLM names it.", _cache_config),
)
