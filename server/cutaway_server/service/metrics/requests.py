"""Metrics of requests: how many there are, how they end, how long they wait, and what they ask for."""

from __future__ import annotations

from cutaway_server.service.metrics.sources import Sources
from cutaway_server.service.metrics.spec import Spec, counter, gauge, histogram

REQUESTS: tuple[Spec[Sources], ...] = (
    counter(
        "cutaway_requests_received_total", "requests", "Requests that the engine has queued.",
        lambda s: s.observed.received,
    ),
    gauge("cutaway_requests_running", "requests", "Requests that hold blocks of the KV cache.", lambda s: s.running()),
    gauge(
        "cutaway_requests_waiting", "requests",
        "Requests that do not run: for want of a place or of blocks (capacity), or because they had to give theirs "
        "back (preempted).",
        lambda s: s.waiting(), "reason",
    ),
    counter(
        "cutaway_requests_finished_total", "requests",
        "Requests that have left the engine, by how their last completion ended: stop (a stop or end token, or a "
        "stop text), length, abort (by Abort, or because the client left), deadline, error.",
        lambda s: s.observed.finished, "reason",
    ),
    counter(
        "cutaway_completions_finished_total", "completions",
        "Completions that have ended, by how; a request for n of them has n.",
        lambda s: s.observed.completions, "reason",
    ),
    counter(
        "cutaway_requests_cancelled_total", "requests",
        "Requests that were aborted or whose client left, by how far they had come: queued, prefill, decode.",
        lambda s: s.observed.cancelled, "phase",
    ),
    histogram(
        "cutaway_request_queue_seconds", "seconds", "From a request's arrival to its first step.",
        lambda s: s.observed.queue,
    ),
    histogram(
        "cutaway_request_prompt_tokens", "tokens", "Prompt lengths of the requests that were started.",
        lambda s: s.observed.prompt_length,
    ),
    histogram(
        "cutaway_request_generation_tokens", "tokens", "Tokens of the completions that have ended.",
        lambda s: s.observed.generation_length,
    ),
    histogram(
        "cutaway_request_max_generation_tokens", "tokens",
        "Tokens of the longest completion of each request that has ended.",
        lambda s: s.observed.longest_generation,
    ),
    histogram("cutaway_request_n", "completions", "Completions asked for by a request.", lambda s: s.observed.n),
    histogram(
        "cutaway_request_max_tokens", "tokens",
        "Tokens that a request allows each completion; what is left of the context if it sets none.",
        lambda s: s.observed.max_tokens,
    ),
)  # fmt: skip
