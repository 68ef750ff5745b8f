"""What the engine has done: plain counters and histograms, written by its thread, read by whoever shows them.

Nothing here knows who reads. A reader on another thread may see a step half counted; every number only grows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from cutaway_server.engine.inside import Inside
from cutaway_server.errors import DeadlineExceeded
from cutaway_server.histogram import Histogram, one_two_five
from cutaway_server.request import CompletionEnded, Event, FinishReason, Request, RequestEnded, RequestFailed, Sampled
from cutaway_server.scheduler import Schedule

PHASES = ("schedule", "prepare", "forward", "sample", "report")
SCHEDULE, PREPARE, FORWARD, SAMPLE, REPORT = range(len(PHASES))
REASONS = ("stop", "length", "abort", "deadline", "error")
LIFE = ("queued", "prefill", "decode")  # of a request, in order

# Supersets of vLLM's edges: what asks for those finds them, and fast models find some below.
TTFT_EDGES = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
TOKEN_EDGES = (
    0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4,
    0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_EDGES = (
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240,
    480, 960, 1920, 7680,
)  # fmt: skip
PHASE_EDGES = (
    0.00001, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1, 2,
    5,
)  # fmt: skip
STEP_TOKEN_EDGES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STEP_SEQUENCE_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
N_EDGES = (1, 2, 5, 10, 20, 50, 128)


@dataclass(slots=True)
class _Completion:
    """A completion's tokens so far."""

    last: float
    tokens: int = 1


@dataclass(slots=True)
class _Watched:
    """A request that has not ended. Times are seconds of time.monotonic()."""

    request: Request
    open: int  # completions that have not ended
    started: float | None = None
    first: float | None = None
    completions: dict[int, _Completion] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)  # completions whose abort means that a stop text was found
    reason: str = "abort"  # of the completion that ended last

    @property
    def phase(self) -> str:
        """How far it has come."""
        return LIFE[(self.started is not None) + (self.first is not None)]


class Observed:
    """Counts what happens in an engine whose sequences have at most `max_context` tokens."""

    def __init__(self, max_context: int) -> None:
        lengths = one_two_five(max_context)
        self.received = 0
        self.finished = dict.fromkeys(REASONS, 0)  # requests
        self.completions = dict.fromkeys(REASONS, 0)
        self.cancelled = dict.fromkeys(LIFE, 0)
        self.steps = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.computed_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.preemptions = 0
        self.n = Histogram(N_EDGES)
        self.max_tokens = Histogram(lengths)
        self.prompt_length = Histogram(lengths)
        self.generation_length = Histogram(lengths)  # of a completion
        self.longest_generation = Histogram(lengths)  # of a request's completions
        self.queue = Histogram(REQUEST_EDGES)
        self.prefill = Histogram(REQUEST_EDGES)
        self.decode = Histogram(REQUEST_EDGES)
        self.inference = Histogram(REQUEST_EDGES)
        self.duration = Histogram(REQUEST_EDGES)
        self.first_token = Histogram(TTFT_EDGES)
        self.inter_token = Histogram(TOKEN_EDGES)
        self.per_output_token = Histogram(TOKEN_EDGES)
        self.step_tokens = Histogram(STEP_TOKEN_EDGES)
        self.step_sequences = Histogram(STEP_SEQUENCE_EDGES)
        self.inside = Inside()
        self.phases = {phase: Histogram(PHASE_EDGES) for phase in PHASES}
        self._watched: dict[str, _Watched] = {}
        self._mark = 0.0
        self._spent = [0.0] * len(PHASES)
        self._unreported = False

    @property
    def watched(self) -> int:
        """Requests that have arrived and not ended."""
        return len(self._watched)

    def begin(self) -> None:
        """A step begins."""
        self._mark = time.perf_counter()

    def mark(self, phase: int) -> None:
        """What went on since the last mark of this step was `phase`."""
        now = time.perf_counter()
        self._spent[phase] += now - self._mark
        self._mark = now

    def step(self, schedule: Schedule) -> None:
        """The step that computed `schedule` is marked to its end, but for the report of its events."""
        tokens = sum(work.stop - work.start for work in schedule.work)
        self.steps += 1
        self.computed_tokens += tokens
        self.step_tokens.observe(tokens)
        self.step_sequences.observe(len(schedule.work))
        self._unreported = True

    def reported(self) -> list[float]:
        """The events of the last step are told: it is over. Its seconds by phase."""
        if self._unreported:
            self.mark(REPORT)
            for histogram, seconds in zip(self.phases.values(), self._spent, strict=True):
                histogram.observe(seconds)
            self._unreported = False
        spent, self._spent = self._spent, [0.0] * len(PHASES)
        return spent

    def arrived(self, request: Request) -> None:
        """A request is queued."""
        self.received += 1
        self.n.observe(request.sampling.n)
        self.max_tokens.observe(request.sampling.max_tokens)
        self._watched[request.request_id] = _Watched(request, request.sampling.n)

    def started(self, request: Request, cached_tokens: int, *, looked_up: bool) -> None:
        """A request is computed from now on; `looked_up`: its prompt was looked for in the prefix cache."""
        watched = self._watched[request.request_id]
        watched.started = time.monotonic()
        length = len(request.prompt)
        self.queue.observe(watched.started - request.arrival)
        self.prompt_length.observe(length)
        self.prompt_tokens += length
        self.cached_tokens += cached_tokens
        if looked_up:
            self.prefix_queries += length
            self.prefix_hits += cached_tokens

    def stopped(self, request_id: str, index: int) -> None:
        """Completion `index` is about to be aborted because a stop text was found in it."""
        watched = self._watched.get(request_id)
        if watched is not None:
            watched.stopped.add(index)

    def has_stopped(self, request_id: str, index: int) -> bool:
        """Whether a stop text was found in completion `index`, whose abort means just that."""
        watched = self._watched.get(request_id)
        return watched is not None and index in watched.stopped

    def take(self, events: Items[tuple[str, Event]]) -> None:
        """Count what has become of requests."""
        now = time.monotonic()
        for name, event in events:
            watched = self._watched.get(name)
            if watched is None:
                continue
            kind = type(event)
            if kind is Sampled:
                self._sampled(watched, event.index, now)  # type: ignore[union-attr, arg-type]  # the line above says which
            elif isinstance(event, CompletionEnded):
                self._completion_ended(watched, event)
            elif isinstance(event, RequestEnded):
                del self._watched[name]
                self._request_ended(watched, now)
            elif isinstance(event, RequestFailed):
                del self._watched[name]
                reason = "deadline" if isinstance(event.error, DeadlineExceeded) else "error"
                self.finished[reason] += 1
                self.completions[reason] += watched.open

    def _sampled(self, watched: _Watched, index: int, now: float) -> None:
        self.generation_tokens += 1
        completion = watched.completions.get(index)
        if completion is not None:
            self.inter_token.observe(now - completion.last)
            completion.last = now
            completion.tokens += 1
            return
        watched.completions[index] = _Completion(now)
        if watched.first is None:
            watched.first = now
            self.first_token.observe(now - watched.request.arrival)
            if watched.started is not None:
                self.prefill.observe(now - watched.started)

    def _completion_ended(self, watched: _Watched, event: CompletionEnded) -> None:
        stopped = event.reason is FinishReason.ABORT and event.index in watched.stopped
        watched.reason = "stop" if stopped else event.reason.value
        watched.open -= 1
        self.completions[watched.reason] += 1
        completion = watched.completions.get(event.index)
        self.generation_length.observe(0 if completion is None else completion.tokens)

    def _request_ended(self, watched: _Watched, now: float) -> None:
        self.finished[watched.reason] += 1
        if watched.reason == "abort":
            self.cancelled[watched.phase] += 1
            return
        self.duration.observe(now - watched.request.arrival)
        if watched.started is not None:
            self.inference.observe(now - watched.started)
        if watched.first is None:
            return
        longest = max(completion.tokens for completion in watched.completions.values())
        self.longest_generation.observe(longest)
        self.decode.observe(now - watched.first)
        if longest > 1:
            self.per_output_token.observe((now - watched.first) / (longest - 1))
