"""The requests that the engine works on: which completions are open, and when what happened."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from cutaway_server.engine.retained import Ended
from cutaway_server.probe.looks import Pooled
from cutaway_server.request import Request, Timings
from cutaway_server.sampler import SamplerState
from cutaway_server.scheduler import Sequence


@dataclass(slots=True)
class Completion:
    """One completion at work: its place in the schedule, and its sampler's memory."""

    sequence: Sequence
    sampler: SamplerState


@dataclass(slots=True)
class LiveRequest:
    """A request with completions that have not ended. Times are seconds of time.monotonic().

    One sequence computes the prompt; then the open completions are forked off it and `prompt` is None.
    """

    request: Request
    prompt: Completion | None
    open: set[int]
    completions: dict[int, Completion] = field(default_factory=dict)
    ended: list[Ended] = field(default_factory=list)  # those that are kept
    cached_tokens: int = 0  # of the prompt, when it was first admitted
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    preemptions: int = 0
    pooled: dict[int, Pooled] = field(default_factory=dict)  # by number of the capture

    def timings(self) -> Timings:
        """What took how long, up to now."""
        now = time.monotonic()
        started = now if self.started is None else self.started
        first = now if self.first_token is None else self.first_token
        last = first if self.last_token is None else self.last_token
        return Timings(started - self.request.arrival, first - started, last - first, self.preemptions)
