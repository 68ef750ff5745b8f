"""Engines on small random networks, and what came out of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from cutaway_server.architecture import ModelConfig
from cutaway_server.cache.blocks import BlockPool
from cutaway_server.cache.pages import allocate_pages
from cutaway_server.engine.batch import BatchBuilder
from cutaway_server.engine.engine import Engine
from cutaway_server.errors import CutawayError
from cutaway_server.kernels.reference import ReferenceKernels
from cutaway_server.kernels.weights import Weights
from cutaway_server.model.transformer import Transformer
from cutaway_server.request import (
    CompletionEnded,
    Event,
    FinishReason,
    Logprobs,
    PromptScored,
    Request,
    RequestEnded,
    RequestFailed,
    Sampled,
    SamplingParams,
    Started,
)  # fmt: skip
from cutaway_server.scheduler import Scheduler
from networks import PLAIN, random_weights

CONTEXT = 400


def make_engine(
    config: ModelConfig = PLAIN, weights: Weights | None = None, *, blocks: int = 200, page_size: int = 16,
    max_batch_tokens: int = 512, max_running: int = 16, prefix_caching: bool = True, dtype: torch.dtype = torch.float32,
) -> Engine:  # fmt: skip
    """An engine whose pool has `blocks` blocks to give out, all of them full of NaN."""
    device = torch.device("cpu")
    weights = weights or random_weights(config, dtype=dtype)
    pages = allocate_pages(config, blocks + 1, page_size, dtype, device)
    pages.keys[:, 1:], pages.values[:, 1:] = torch.nan, torch.nan
    scheduler = Scheduler(
        BlockPool(blocks + 1, page_size, b"key"), max_batch_tokens=max_batch_tokens, max_running=max_running,
        max_queued=1000, max_context=CONTEXT, prefix_caching=prefix_caching,
    )  # fmt: skip
    builder = BatchBuilder(
        max_rows=max_batch_tokens, max_sequences=max_running, max_blocks=-(-CONTEXT // page_size), page_size=page_size,
        device=device,
    )  # fmt: skip
    return Engine(Transformer(ReferenceKernels(config, weights, CONTEXT)), pages, scheduler, builder)


def ask(name: str, prompt: tuple[int, ...], **sampling: object) -> Request:
    """A request for 8 greedy tokens with log-probabilities, unless told otherwise."""
    chosen = {"seed": 7, "max_tokens": 8, "temperature": 0.0, "logprobs": 3, **sampling}
    deadline = chosen.pop("deadline", None)
    return Request(name, prompt, SamplingParams(**chosen), time.monotonic(), deadline=deadline)  # type: ignore[arg-type]


@dataclass(slots=True)
class Answer:
    """Everything told about one request."""

    cached_tokens: int | None = None
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[Logprobs | None]] = field(default_factory=dict)
    prompt: dict[int, Logprobs] = field(default_factory=dict)  # by position
    ended: dict[int, CompletionEnded] = field(default_factory=dict)
    done: RequestEnded | None = None
    error: CutawayError | None = None

    def take(self, event: Event) -> None:
        """Note an event; none may come after the last."""
        assert self.done is None, "an event after the last"
        assert self.error is None, "an event after the last"
        if isinstance(event, Started):
            self.cached_tokens = event.cached_tokens
        elif isinstance(event, PromptScored):
            for i, logprobs in enumerate(event.logprobs):
                assert event.position + i not in self.prompt, "a prompt token was scored twice"
                self.prompt[event.position + i] = logprobs
        elif isinstance(event, Sampled):
            assert event.index not in self.ended
            self.tokens.setdefault(event.index, []).append(event.token)
            self.logprobs.setdefault(event.index, []).append(event.logprobs)
        elif isinstance(event, CompletionEnded):
            assert event.index not in self.ended
            self.ended[event.index] = event
        elif isinstance(event, RequestEnded):
            self.done = event
        else:
            assert isinstance(event, RequestFailed)
            self.error = event.error

    @property
    def said(self) -> object:
        """All that must not depend on anything but the request: tokens, every number, reasons."""
        return self.tokens, self.logprobs, self.prompt, {i: (e.reason, e.stop_token) for i, e in self.ended.items()}


def run(
    engine: Engine, *requests: Request, between: Callable[[int, dict[str, Answer]], None] | None = None
) -> dict[str, Answer]:
    """Run requests to their end, checking every invariant after every step."""
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        engine.add(request)
    for step in range(5000):
        if not engine.has_work:
            break
        if between is not None:
            between(step, answers)
        for name, event in engine.step():
            answers[name].take(event)
        engine.scheduler.check()
    assert not engine.has_work, "the engine never finished"
    assert engine.scheduler.pool.used == 0, "blocks were not given back"
    return answers


_ALONE: dict[object, Answer] = {}


def alone(request: Request, **engine: object) -> Answer:
    """The answer of an engine that has nothing else to do; computed once a session for the same question."""
    key = (request.request_id, request.prompt, request.sampling, tuple(sorted(engine.items(), key=lambda e: e[0])))
    if key not in _ALONE:
        _ALONE[key] = run(make_engine(**engine), request)[request.request_id]  # type: ignore[arg-type]
    return _ALONE[key]


ABORTED = FinishReason.ABORT
