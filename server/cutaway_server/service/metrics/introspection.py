"""Metrics of introspection: who looks inside how much, and what it costs the others."""

from __future__ import annotations

from collections.abc import Mapping

from cutaway_server.service.metrics.process import Service
from cutaway_server.service.metrics.sources import Sources
from cutaway_server.service.metrics.spec import Spec, counter, gauge, histogram


def _room(s: Service) -> Mapping[str, float]:
    held = s.capture_bytes()
    return {"held": held, "free": max(0, s.capture_memory - held)}


CALLS: tuple[Spec[Service], ...] = (
    counter(
        "cutaway_introspection_requests_total", "requests",
        "Calls of Introspection that have begun, those included that were then refused.",
        lambda s: s.calls.inspections.begun, "rpc",
    ),
    histogram(
        "cutaway_introspection_request_seconds", "seconds",
        "Of each such call that has ended: from its arrival to its end, however it ended. Watches last as long as "
        "their clients want.",
        lambda s: s.calls.inspections.seconds, "rpc",
    ),
    counter(
        "cutaway_introspection_received_bytes_total", "bytes", "Bytes of the messages that such calls sent us.",
        lambda s: s.calls.inspections.received, "rpc",
    ),
    counter(
        "cutaway_introspection_sent_bytes_total", "bytes",
        "Bytes of the messages that they were answered with, tensors and all.",
        lambda s: s.calls.inspections.sent, "rpc",
    ),
    counter(
        "cutaway_introspection_refused_total", "requests",
        "Calls of Introspection, and of Generate with captures or edits, that the server refused or ended: invalid "
        "(a field breaks a rule), budget (captures could be more bytes than the request or --max-capture-bytes "
        "allows), memory (more than --capture-memory or the tenant's limit would be held), busy (too many requests or "
        "calls), denied (no key, or not the scope), missing (no such request), unsupported, unavailable (loading or "
        "going down), unread (the client reads too slowly), deadline, internal.",
        lambda s: s.calls.inspections.refused, "reason",
    ),
    gauge(
        "cutaway_capture_memory_bytes", "bytes",
        "What --capture-memory allows: held for requests at work, as many bytes as their captures can be, and free.",
        _room, "state",
    ),
)  # fmt: skip

INSIDE: tuple[Spec[Sources], ...] = (
    counter(
        "cutaway_captured_rows_total", "rows",
        "Rows (positions of a sequence) that captures have read, whichever call asked; one that three captures read "
        "counts three times, all layers and heads of a capture once.",
        lambda s: s.observed.inside.rows,
    ),
    counter(
        "cutaway_captured_bytes_total", "bytes", "Bytes of the tensors made of them, without names and axes.",
        lambda s: s.observed.inside.bytes,
    ),
    counter(
        "cutaway_captured_seconds_total", "seconds",
        "Time that steps took to reduce captured values and bring them to the host (on a GPU it waits for forward); "
        "a part of the phase sample.",
        lambda s: s.observed.inside.handing,
    ),
    counter(
        "cutaway_introspection_steps_total", "steps",
        "Steps with rows that somebody looked into or changed: captures, edits, or both.",
        lambda s: s.observed.inside.steps, "what",
    ),
    counter(
        "cutaway_introspection_step_seconds_total", "seconds",
        "Time of those steps from schedule to sample. The other requests of the batch waited as long.",
        lambda s: s.observed.inside.seconds, "what",
    ),
    gauge(
        "cutaway_retained_requests", "requests", "Finished requests that are kept for ReadCache and ListRequests.",
        lambda s: len(s.engine.retained),
    ),
    gauge(
        "cutaway_retained_bytes", "bytes",
        "Bytes of cached blocks that are kept for them: evicted after all others.",
        lambda s: s.pool.retained * s.block_bytes,
    ),
)  # fmt: skip
