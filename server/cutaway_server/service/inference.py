"""cutaway.v1.Inference: what each call does, in terms of the rooms below."""
# ruff: noqa: N802, ARG002  (the contract names the methods, and gRPC gives each both arguments)

from __future__ import annotations

from functools import partial

from cutaway.v1 import inference_pb2 as v1
from cutaway.v1.inference_pb2_grpc import InferenceServicer

from cutaway_server.config import Config
from cutaway_server.service.caller import current
from cutaway_server.service.describing import describe
from cutaway_server.service.desk import Desk
from cutaway_server.service.generation import Generation, Served
from cutaway_server.service.status import Context
from cutaway_server.service.texts import detokenize, tokenize
from cutaway_server.service.workers import Workers

MAX_NAME = 128  # characters of a request's name, for logs


class Inference(InferenceServicer):
    """The servicer, for `methods_of`. Until the model is ready calls are UNAVAILABLE."""

    def __init__(self, desk: Desk, workers: Workers, config: Config, generation: Generation) -> None:
        self._generation = generation
        self._desk = desk
        self._workers = workers
        self._config = config

    async def Generate(self, request: v1.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        """Stream one request's completions."""
        await self._generation.stream(request, context, lambda message: message)

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
        return await self._workers.run(
            partial(tokenize, request, text, self._config.max_prompt_bytes), request.ByteSize()
        )

    async def Detokenize(self, request: v1.DetokenizeRequest, context: Context) -> v1.DetokenizeResponse:
        """Turn tokens into text."""
        served = self._ready()
        work = partial(detokenize, request, served.text, served.facts.config.d_vocab)
        return await self._workers.run(work, request.ByteSize())

    async def GetModel(self, request: v1.GetModelRequest, context: Context) -> v1.GetModelResponse:
        """Tell what is served."""
        served = self._ready()
        return describe(self._config, served.facts, served.text, current().caller)

    def _ready(self) -> Served:
        return self._generation.ready()
