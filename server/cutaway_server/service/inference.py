"""cutaway.v1.Inference: what each call does, in terms of the rooms below."""
# ruff: noqa: N802, ARG002  (the contract names the methods, and gRPC gives each both arguments)

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from cutaway.v1 import inference_pb2 as v1
from cutaway.v1.inference_pb2_grpc import InferenceServicer
from google.protobuf.message import Message

from cutaway_server.config import Config
from cutaway_server.engine.build import EngineFacts
from cutaway_server.service.asking import Limits, ask, name_of
from cutaway_server.service.caller import current
from cutaway_server.service.describing import describe, started
from cutaway_server.service.desk import Desk
from cutaway_server.service.reply import Reply
from cutaway_server.service.status import Context, Loading
from cutaway_server.service.texts import detokenize, tokenize
from cutaway_server.service.workers import Workers
from cutaway_server.text.tokenizer import TextModel

log = logging.getLogger(__name__)
R = TypeVar("R")

MAX_NAME = 128  # characters of a request's name, for logs


@dataclass(frozen=True, slots=True)
class Served:
    """The model served, once it is loaded."""

    facts: EngineFacts
    text: TextModel


class Inference(InferenceServicer):
    """The servicer, for `methods_of`. `served` is set when the model is ready; until then calls are UNAVAILABLE."""

    def __init__(self, desk: Desk, workers: Workers, config: Config) -> None:
        self.served: Served | None = None
        self._desk = desk
        self._workers = workers
        self._config = config

    # Writing to the context, rather than yielding, lets a cancelled call clean up at once.
    async def Generate(self, request: v1.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        """Stream one request's completions."""
        served = self._ready()
        self._desk.admit()
        arrival, remaining = time.monotonic(), context.time_remaining()
        deadline = None if remaining is None else arrival + remaining
        limits = Limits(served.facts, self._config.max_prompt_bytes, self._config.max_backlog)
        call = current()
        request.request_id = name_of(request)
        with self._desk.arriving(request.request_id, call.caller.tenant):
            asked = await self._worked(
                request, partial(ask, request, served.text, limits, arrival, deadline, call.caller)
            )
            call.request_id = request.request_id
            if self._config.log_prompts:
                log.info("request %s: prompt %r", call.request_id, served.text.decode(asked.request.prompt))
            make = partial(Reply, asked, started(served.facts), self._config.max_backlog)
            with self._desk.stream(asked.request, make) as reply:
                while messages := await reply.take():
                    for message in messages:
                        await context.write(message)

    async def Abort(self, request: v1.AbortRequest, context: Context) -> v1.AbortResponse:
        """End a queued or running request."""
        self._ready()
        call = current()
        call.request_id = request.request_id[:MAX_NAME]
        self._desk.abort(request.request_id, call.caller.tenant)
        return v1.AbortResponse()

    async def Tokenize(self, request: v1.TokenizeRequest, context: Context) -> v1.TokenizeResponse:
        """Turn text into tokens."""
        text = self._ready().text
        return await self._worked(request, partial(tokenize, request, text, self._config.max_prompt_bytes))

    async def Detokenize(self, request: v1.DetokenizeRequest, context: Context) -> v1.DetokenizeResponse:
        """Turn tokens into text."""
        served = self._ready()
        return await self._worked(request, partial(detokenize, request, served.text, served.facts.config.d_vocab))

    async def GetModel(self, request: v1.GetModelRequest, context: Context) -> v1.GetModelResponse:
        """Tell what is served."""
        served = self._ready()
        return describe(self._config, served.facts, served.text, current().caller)

    async def _worked(self, request: Message, work: Callable[[], R]) -> R:
        """What `work` on `request` gives, done on a worker's thread in its tenant's turn."""
        return await self._workers.run(work, request.ByteSize(), current().caller.tenant)

    def _ready(self) -> Served:
        if self.served is None:
            raise Loading("the model is still being loaded")
        return self.served
