"""What each step is looked at for: captures and edits of its requests, resolved to rows of its batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch

from cutaway_server.captures import Pool
from cutaway_server.engine.requests import LiveRequest
from cutaway_server.kernels.interface import OpenKernels
from cutaway_server.model.probed import Probe
from cutaway_server.probe.editor import Editor, Marked
from cutaway_server.probe.looks import Look, Pooled
from cutaway_server.probe.recorder import Recorder
from cutaway_server.scheduler import Schedule, Work


def probe_of(
    schedule: Schedule, live: dict[str, LiveRequest], kernels: OpenKernels, device: torch.device, step: int
) -> Probe | None:
    """What looks into a step and changes it, made before it is computed; None: nobody does."""
    if not any(work.sequence.request.probed for work in schedule.work):
        return None
    looks, marked = looks_of(schedule, live), marked_of(schedule)
    if not looks and not marked:
        return None
    return Probe(Recorder(kernels, looks, device, step), Editor(marked, device))


def marked_of(schedule: Schedule) -> list[Marked]:
    """The rows of a step that are edited: again after a preemption, or when they are revisited."""
    marked, start = [], 0
    for place, work in enumerate(schedule.work):
        for edit in work.sequence.request.edits.each:
            if positions := edit.rows.within(work.start, work.stop):
                rows = tuple(start + position - work.start for position in positions)
                marked.append(Marked(edit, place, rows, tuple(positions)))
        start += work.stop - work.start
    return marked


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
