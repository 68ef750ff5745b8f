"""Metrics of throughput and latency: tokens, steps, and how long each took."""

from __future__ import annotations

from cutaway_server.service.metrics.sources import Sources
from cutaway_server.service.metrics.spec import Spec, counter, histogram

THROUGHPUT: tuple[Spec[Sources], ...] = (
    counter(
        "cutaway_prompt_tokens_total", "tokens",
        "Prompt tokens of the requests that were started, those found in the prefix cache included.",
        lambda s: s.observed.prompt_tokens,
    ),
    counter(
        "cutaway_cached_tokens_total", "tokens", "Prompt tokens that were found in the prefix cache.",
        lambda s: s.observed.cached_tokens,
    ),
    counter(
        "cutaway_generation_tokens_total", "tokens",
        "Tokens sampled; a step's worth more than clients get where a stop text ends a completion.",
        lambda s: s.observed.generation_tokens,
    ),
    counter(
        "cutaway_computed_tokens_total", "tokens",
        "Rows computed: prompt tokens not cached, generated tokens, and what is computed again after a preemption.",
        lambda s: s.observed.computed_tokens,
    ),
    counter("cutaway_steps_total", "steps", "Steps that computed something.", lambda s: s.observed.steps),
    histogram("cutaway_step_tokens", "tokens", "Rows in a step.", lambda s: s.observed.step_tokens),
    histogram(
        "cutaway_step_sequences", "sequences", "Sequences in a step: the batch size.",
        lambda s: s.observed.step_sequences,
    ),
    histogram(
        "cutaway_step_duration_seconds", "seconds",
        "Time of a step by phase: schedule, prepare (the batch as tensors), forward (on a GPU: to launch it), sample "
        "(logits and tokens; on a GPU it waits for forward), report (handing events to the streams).",
        lambda s: s.observed.phases, "phase",
    ),
)  # fmt: skip

LATENCY: tuple[Spec[Sources], ...] = (
    histogram(
        "cutaway_time_to_first_token_seconds", "seconds", "From a request's arrival to its first token.",
        lambda s: s.observed.first_token,
    ),
    histogram(
        "cutaway_inter_token_seconds", "seconds", "Between two tokens of one completion.",
        lambda s: s.observed.inter_token,
    ),
    histogram(
        "cutaway_time_per_output_token_seconds", "seconds",
        "Of each request that has ended: time from its first token to its end, by the tokens of its longest "
        "completion but the first.",
        lambda s: s.observed.per_output_token,
    ),
    histogram(
        "cutaway_request_duration_seconds", "seconds", "From a request's arrival to its end.",
        lambda s: s.observed.duration,
    ),
    histogram(
        "cutaway_request_prefill_seconds", "seconds", "From a request's first step to its first token.",
        lambda s: s.observed.prefill,
    ),
    histogram(
        "cutaway_request_decode_seconds", "seconds", "From a request's first token to its end.",
        lambda s: s.observed.decode,
    ),
    histogram(
        "cutaway_request_inference_seconds", "seconds", "From a request's first step to its end.",
        lambda s: s.observed.inference,
    ),
)  # fmt: skip
