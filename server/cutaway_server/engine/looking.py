"""What each step is looked at for: the captures of its requests, resolved to rows of its batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from cutaway_server.captures import Pool
from cutaway_server.engine.requests import LiveRequest
from cutaway_server.probe.looks import Look, Pooled
from cutaway_server.scheduler import Schedule, Work


def looks_of(schedule: Schedule, live: dict[str, LiveRequest]) -> list[Look]:
    """The looks of a step, made before it is computed. Rows that were told before a preemption are left out."""
    counts = [work.stop - work.start for work in schedule.work]
    starts = [0, *accumulate(counts)]
    return [
        look
        for sequence, (work, start) in enumerate(zip(schedule.work, starts, strict=False))
        if work.sequence.request.captures
        for look in _looks_at(work, sequence, start, live[work.sequence.request.request_id])
    ]


def _looks_at(work: Work, place: int, start: int, live: LiveRequest) -> Iterator[Look]:
    sequence = work.sequence
    first, prompt = max(work.start, sequence.told), sequence.prompt_length
    parts: list[tuple[int, int, int | None]]
    for number, capture in enumerate(sequence.request.captures):
        parts = [(first, min(work.stop, prompt), None)]
        if not isinstance(capture.reduction, Pool):  # a picture is of the prompt
            parts.append((max(first, prompt), work.stop, sequence.index))
        for begin, end, index in parts:
            positions = capture.rows.within(begin, end) if begin < end else []
            if positions:
                pooled = live.pooled.setdefault(number, Pooled()) if isinstance(capture.reduction, Pool) else None
                yield Look(
                    sequence.request.request_id, number, capture, index, place,
                    tuple(start + position - work.start for position in positions), tuple(positions),
                    sum(position < work.stored for position in positions), sequence.tokens, prompt, pooled,
                )  # fmt: skip
