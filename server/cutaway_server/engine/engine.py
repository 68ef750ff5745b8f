"""One step after another: schedule, compute, sample, report. Single-threaded; `thread.py` gives it a thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch

from cutaway_server.cache.pages import Pages
from cutaway_server.engine.batch import BatchBuilder
from cutaway_server.engine.looking import probe_of
from cutaway_server.engine.observed import FORWARD, PREPARE, REPORT, SAMPLE, SCHEDULE, Observed
from cutaway_server.engine.requests import Completion, LiveRequest
from cutaway_server.engine.retained import Retained, Run
from cutaway_server.engine.scoring import score
from cutaway_server.engine.watched import Watched
from cutaway_server.errors import CutawayError, DeadlineExceeded, EngineFailed
from cutaway_server.model.probed import Probe
from cutaway_server.model.transformer import Transformer
from cutaway_server.request import (
    CompletionEnded,
    Event,
    FinishReason,
    Logprobs,
    Request,
    RequestEnded,
    RequestFailed,
    Sampled,
    SamplingParams,
    Started,
)  # fmt: skip
from cutaway_server.sampler import BatchMaker, SampledBatch, SamplerState, masks, sample
from cutaway_server.scheduler import Schedule, Scheduler, Work

log = logging.getLogger(__name__)

Events = list[tuple[str, Event]]


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to be drawn: for which completion, from which row of the last residuals."""

    live: LiveRequest
    completion: Completion
    row: int
    step: int

    @property
    def forced(self) -> int | None:
        """The token that the request wants in place of the one sampled."""
        overrides, sequence = self.live.request.edits.overrides, self.completion.sequence
        return dict(overrides).get(len(sequence.tokens) - sequence.prompt_length) if overrides else None


class Engine:
    """Computes the completions of all requests together, a step at a time."""

    def __init__(self, model: Transformer, pages: Pages, scheduler: Scheduler, builder: BatchBuilder) -> None:
        self.model = model
        self.pages = pages
        self.scheduler = scheduler
        self.builder = builder
        self._batches = BatchMaker(model.config.d_vocab, pages.keys.device)
        self.before_layers: Callable[[], None] = lambda: None  # called when a step's long computation begins
        self.live: dict[str, LiveRequest] = {}
        self.steps = 0
        self.observed = Observed(scheduler.max_context)
        self.retained = Retained(scheduler.pool)
        self.watched = Watched(scheduler)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self.live)

    @property
    def computing(self) -> bool:
        """Whether a step is being computed between two calls of `step`, so that there is time to tell of the last."""
        return False

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            QueueFull, InvalidField: as the scheduler finds.
        """
        sequence = self.scheduler.add(request)
        sampler = SamplerState(request.sampling, request.prompt, self.model.config.d_vocab)
        self.live[request.request_id] = LiveRequest(
            request, Completion(sequence, sampler), set(range(request.sampling.n))
        )
        self.observed.arrived(request)

    def abort(self, request_id: str, index: int | None = None) -> Events:
        """End a whole request, or completion `index` of it; its blocks are free when this returns."""
        live = self.live.get(request_id)
        if live is None:
            return []
        indices = range(live.request.sampling.n) if index is None else [index]
        return [event for i in indices for event in self._end(live, i, FinishReason.ABORT)]

    def step(self) -> Events:
        """Compute one step and tell what came of it."""
        self.observed.begin()
        begun = time.monotonic()
        return self._run(self.scheduler.schedule(begun), begun)

    def _run(self, schedule: Schedule, begun: float) -> Events:
        events = [*self._refused(schedule), *self._started(schedule)]
        if not schedule.work:
            return events
        self.steps += 1
        wanted = [_wanted(work) for work in schedule.work]
        self.observed.mark(SCHEDULE)
        probe = probe_of(schedule, self.live, self.model.kernels, self.pages.keys.device, self.steps)
        residual = self._compute(schedule, wanted, probe)
        if probe is not None:
            events += self._captured(probe)
        self.scheduler.complete(schedule)
        draws: list[Draw] = []
        for work, count, end in zip(schedule.work, wanted, accumulate(wanted), strict=True):
            try:
                if work.start < work.sequence.prompt_length:
                    events += self._prompt_done(work, residual[end - count : end])
                draws += self._draws(work, end - 1)
            except Exception as error:
                events += self.fail(work.sequence.request.request_id, error)
        events += self._sample(draws, residual)
        seconds = time.monotonic() - begun
        self.scheduler.pace.note(schedule.decodes, schedule.prompt_rows, seconds)
        self.observed.mark(SAMPLE)
        self.observed.step(schedule)
        if probe is not None:
            self.observed.inside.step(probe, seconds)
        self.watched.computed(schedule, self.steps)
        return events

    def _compute(self, schedule: Schedule, wanted: list[int], probe: Probe | None) -> torch.Tensor:
        """The last residuals of the wanted rows, so many at the end of each work, one after the other."""
        self._copy(schedule)
        batch = self.builder.build(schedule.work, wanted)
        residual = self.model.forward(batch, self.pages, self._prepared, probe)
        self.observed.mark(FORWARD)
        return residual

    def _captured(self, probe: Probe) -> Events:
        """What was seen in a step; a request for which that failed ends."""
        events: Events = []
        inside, begun = self.observed.inside, time.perf_counter()
        for request_id, found in probe.recorder.pieces():
            if isinstance(found, Exception):
                events += self.fail(request_id, found)
            elif request_id in self.live:
                events.append((request_id, found))
                inside.handed(found)
        inside.handing += time.perf_counter() - begun
        return events

    def _prepared(self) -> None:
        self.observed.mark(PREPARE)
        self.before_layers()
        self.observed.mark(REPORT)

    def _copy(self, schedule: Schedule) -> None:
        if schedule.copies:
            source, target = torch.tensor(schedule.copies, device=self.pages.keys.device).unbind(1)
            self.pages.copy(source, target)

    def _refused(self, schedule: Schedule) -> Iterator[tuple[str, Event]]:
        for sequence in schedule.expired:
            yield from self.fail(sequence.request.request_id, DeadlineExceeded("the request's deadline has passed"))
        for sequence in schedule.exhausted:
            yield from self._end(self.live[sequence.request.request_id], sequence.index, FinishReason.LENGTH)

    def _started(self, schedule: Schedule) -> Iterator[tuple[str, Event]]:
        for sequence, cached_tokens in schedule.started:
            live = self.live[sequence.request.request_id]
            live.started = time.monotonic()
            live.cached_tokens = cached_tokens
            self.observed.started(live.request, cached_tokens, looked_up=self.scheduler.looks_up(live.request))
            yield live.request.request_id, Started(cached_tokens)
        for sequence in schedule.preempted:
            self.live[sequence.request.request_id].preemptions += 1
            self.observed.preemptions += 1

    def _prompt_done(self, work: Work, residual: torch.Tensor) -> Iterator[tuple[str, Event]]:
        """Score the prompt where that is asked, and end requests that want nothing else."""
        sequence = work.sequence
        live = self.live.get(sequence.request.request_id)
        if live is None:
            return
        if sequence.request.sampling.prompt_logprobs is not None:
            for scored in score(self.model, sequence, np.arange(work.stop - len(residual), work.stop), residual):
                yield sequence.request.request_id, scored
        if sequence.request.sampling.max_tokens == 0 and work.stop == sequence.prompt_length:
            for index in sorted(live.open):
                yield from self._end(live, index, FinishReason.LENGTH)

    def _draws(self, work: Work, row: int) -> list[Draw]:
        """The tokens to draw from a work's last row; the first time, one for each completion of the prompt."""
        live = self.live.get(work.sequence.request.request_id)
        if live is None or not work.samples or work.sequence.finished:
            return []
        if live.prompt is None:
            return [Draw(live, live.completions[work.sequence.index], row, self.steps)]
        self._fork(live, live.prompt)
        return [Draw(live, completion, row, self.steps) for completion in live.completions.values()]

    def _fork(self, live: LiveRequest, prompt: Completion) -> None:
        """Turn a computed prompt into the completions that are still wanted."""
        if 0 in live.open:
            live.completions[0] = prompt
        for index in sorted(live.open - {0}):
            forked = self.scheduler.fork(prompt.sequence, index)
            live.completions[index] = Completion(forked, prompt.sampler.fork(index))
        prompt.sequence.slots = 1  # places kept for completions that were aborted meanwhile are free again
        if 0 not in live.open:
            self.scheduler.finish(prompt.sequence)
        live.prompt = None

    def _sample(self, draws: Items[Draw], residual: torch.Tensor) -> Events:
        """Draw tokens and take them in. What goes wrong for one request is found by drawing for each alone."""
        draws = [draw for draw in draws if draw.live.request.request_id in self.live]
        if not draws:
            return []
        try:
            drawn = self._draw(draws, residual)
        except Exception as error:
            if len(draws) == 1:
                return self.fail(draws[0].live.request.request_id, error)
            return [event for draw in draws for event in self._sample([draw], residual)]
        return self._take(draws, drawn)

    def _take(self, draws: Items[Draw], drawn: Items[tuple[int, bool, Logprobs | None]]) -> Events:
        """Take in a token for each draw, whether it is valid, and its log-probabilities."""
        events: Events = []
        for draw, (token, valid, logprobs) in zip(draws, drawn, strict=True):
            try:
                if not valid:
                    raise EngineFailed("no token can be drawn: all are banned, or the model's logits are not finite")
                events += self._advance(draw, token, _limit(logprobs, draw.live.request.sampling))
            except Exception as error:
                events += self.fail(draw.live.request.request_id, error)
        return events

    def _draw(self, draws: Items[Draw], residual: torch.Tensor) -> list[tuple[int, bool, Logprobs | None]]:
        """A token for each draw, whether it is valid, and its log-probabilities."""
        rows = [draw.row for draw in draws]
        if rows != list(range(len(residual))):
            residual = residual[torch.tensor(rows, device=residual.device)]
        states = [draw.completion.sampler for draw in draws]
        positions = [len(draw.completion.sequence.tokens) for draw in draws]
        batch = self._batches.make(states, positions)
        if (forced := self._forced(draws)) is not None:
            batch = replace(batch, mask=forced)
        return list(_to_host(sample(self.model.logits(residual), batch)))

    def _forced(self, draws: Items[Draw]) -> torch.Tensor | None:
        """A mask that leaves one token where a request overrides what is sampled; None: nowhere."""
        forced = [draw.forced for draw in draws]
        if all(token is None for token in forced):
            return None
        return masks(forced, self.model.config.d_vocab).to(self.pages.keys.device)

    def _advance(self, draw: Draw, token: int, logprobs: Logprobs | None) -> Iterator[tuple[str, Event]]:
        """Take a drawn token into its completion, and end that if it is the last."""
        live, sequence = draw.live, draw.completion.sequence
        sampling = live.request.sampling
        if live.request.request_id not in self.live:
            return  # another completion of the same request failed in this step
        self.scheduler.append(sequence, token)
        draw.completion.sampler.append(token)
        live.last_token = time.monotonic()
        live.first_token = live.first_token or live.last_token
        yield live.request.request_id, Sampled(sequence.index, token, draw.step, logprobs)
        if token in sampling.eos_token_ids or token in sampling.stop_token_ids:
            stop = None if token in sampling.eos_token_ids else token
            yield from self._end(live, sequence.index, FinishReason.STOP, stop)
        elif len(sequence.tokens) - sequence.prompt_length >= sampling.max_tokens:
            yield from self._end(live, sequence.index, FinishReason.LENGTH)

    def _end(self, live: LiveRequest, index: int, reason: FinishReason, stop: int | None = None) -> Events:
        """End one completion, and the request with its last one. Blocks go back here."""
        if index not in live.open:
            return []
        live.open.discard(index)
        request_id = live.request.request_id
        events: Events = [(request_id, CompletionEnded(index, reason, stop))]
        if (completion := live.completions.pop(index, None)) is not None:
            stopped = reason is FinishReason.ABORT and self.observed.has_stopped(request_id, index)
            ended = self.retained.end(completion.sequence, FinishReason.STOP if stopped else reason)
            if ended is not None:
                live.ended.append(ended)
            self.scheduler.finish(completion.sequence)
        if not live.open:
            self._release(live)
            timings = live.timings()
            if live.ended:
                kept = tuple(sorted(live.ended, key=lambda completion: completion.index))
                self.retained.add(Run(live.request, kept, live.cached_tokens, timings, time.monotonic()))
            events.append((request_id, RequestEnded(timings)))
        return events

    def fail(self, request_id: str, error: Exception) -> Events:
        """End a request with an error; what is no error of ours is told as our bug."""
        live = self.live.get(request_id)
        if live is None:
            return []
        if not isinstance(error, DeadlineExceeded):
            log.error("request %s failed in step %d", request_id, self.steps, exc_info=error)
        self._release(live)
        for completion in live.ended:
            self.retained.let_go(completion)
        told = error if isinstance(error, CutawayError) else EngineFailed("the computation of this request failed")
        return [(request_id, RequestFailed(told))]

    def _release(self, live: LiveRequest) -> None:
        del self.live[live.request.request_id]
        if live.prompt is not None:
            self.scheduler.finish(live.prompt.sequence)
        for completion in live.completions.values():
            self.scheduler.finish(completion.sequence)


def _wanted(work: Work) -> int:
    """How many rows at the end of a work have a last residual that is needed."""
    sequence = work.sequence
    if sequence.request.sampling.prompt_logprobs is not None:
        first = max(work.start, sequence.scored)  # what was scored before a preemption is not told again
        if first < min(work.stop, sequence.prompt_length - 1):
            return work.stop - first
    return 1 if work.samples else 0


def _to_host(sampled: SampledBatch) -> Iterator[tuple[int, bool, Logprobs | None]]:
    """Each row's token, whether it is valid, and its log-probabilities."""
    tokens, valid = sampled.tokens.tolist(), sampled.valid.tolist()
    if sampled.logprobs is None or sampled.top_tokens is None or sampled.top_logprobs is None:
        yield from ((token, ok, None) for token, ok in zip(tokens, valid, strict=True))
        return
    tops = zip(sampled.top_tokens.tolist(), sampled.top_logprobs.tolist(), strict=True)
    for token, ok, logprob, (ids, values) in zip(tokens, valid, sampled.logprobs.tolist(), tops, strict=True):
        yield token, ok, Logprobs(logprob, tuple(zip(ids, values, strict=True)))


def _limit(logprobs: Logprobs | None, sampling: SamplingParams) -> Logprobs | None:
    """What this request asked for, of what the batch computed."""
    if logprobs is None or sampling.logprobs is None:
        return None
    return Logprobs(logprobs.logprob, logprobs.top[: sampling.logprobs])
