"""The part of cutaway.v1.Introspection that tells of the machine: its cache, its requests, its steps."""
# ruff: noqa: N802, ARG002  (the contract names the methods, and gRPC gives each both arguments)

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from cutaway.v1 import machine_pb2 as v1
from cutaway.v1 import replay_pb2

from cutaway_server.config import Config
from cutaway_server.engine.engine import Engine
from cutaway_server.engine.machine import cache_state, cached_prefix, ledger, requests_state
from cutaway_server.engine.replay import find_written, replay
from cutaway_server.engine.stored import find_stored, read_stored
from cutaway_server.errors import NotFound
from cutaway_server.scheduler.prefix import digests_of
from cutaway_server.service.cache_reading import Reading, reading_of
from cutaway_server.service.caller import current
from cutaway_server.service.desk import full_name
from cutaway_server.service.generation import Generation, Served
from cutaway_server.service.inference import MAX_NAME
from cutaway_server.service.machine_wire import (
    blocks_messages,
    events_of,
    requests_message,
    stats_of,
    steps_of,
)  # fmt: skip
from cutaway_server.service.replaying import replay_plans, replay_response, replay_wanted
from cutaway_server.service.status import Context, Loading
from cutaway_server.service.watching import Looking, Watchers
from cutaway_server.service.workers import Workers

Seen = TypeVar("Seen")


class Machine:
    """The methods, for `methods_of`. Until `connect` is called they are UNAVAILABLE."""

    def __init__(self, generation: Generation, workers: Workers, config: Config) -> None:
        self._generation = generation
        self._workers = workers
        self._config = config
        self._looking: Looking | None = None
        self.watchers = Watchers(tokens=config.inspect_text)

    def connect(self, looking: Looking) -> None:
        """Say what is looked at."""
        self._looking = looking

    async def GetCacheStats(self, request: v1.GetCacheStatsRequest, context: Context) -> v1.GetCacheStatsResponse:
        """Count the blocks."""
        _, served = self._ready()
        return stats_of(await self._look(partial(cache_state, tenant=_tenant())), served.facts.dtype)

    async def GetBlocks(self, request: v1.GetBlocksRequest, context: Context) -> None:
        """Stream the blocks."""
        _, served = self._ready()
        taken = await self._look(partial(ledger, tenant=_tenant(), tokens=self._config.inspect_text))
        dtype = served.facts.dtype

        def messages() -> list[v1.GetBlocksResponse]:
            return list(blocks_messages(taken, dtype, request.request_id, self._spell))

        for message in await self._workers.run(messages):
            await context.write(message)

    async def ReadCache(self, request: v1.ReadCacheRequest, context: Context) -> None:
        """Stream keys and values."""
        _, served = self._ready()
        name = _own(request.request_id)
        stored = await self._look(partial(find_stored, name=name, index=request.index))
        reading = reading_of(request, stored, served.facts, self._config.max_capture_bytes)
        await context.write(v1.ReadCacheResponse(read=_read(reading, served)))
        for told in reading.headers():
            await context.write(v1.ReadCacheResponse(tensor=told))
        for layer, positions, offset in reading.parts():
            read = partial(read_stored, of=stored, layer=layer, positions=positions, heads=reading.heads)
            for number, data in enumerate(await self._look(read)):
                await context.write(v1.ReadCacheResponse(chunk=reading.chunk(number, offset, data)))

    async def ReplaySample(
        self, request: replay_pb2.ReplaySampleRequest, context: Context
    ) -> replay_pb2.ReplaySampleResponse:
        """Sample a token again."""
        _, served = self._ready()
        name = _own(request.request_id)
        wanted = replay_wanted(request, served.facts)
        find = partial(find_written, name=name, index=request.index, position=request.position)
        written = await self._look(find)
        plans = await self._workers.run(partial(replay_plans, wanted, written, served), request.ByteSize())
        followed = await self._look(partial(replay, written=written, plans=plans))
        return await self._workers.run(partial(replay_response, wanted, written, plans, followed, served))

    async def WatchCache(self, request: v1.WatchCacheRequest, context: Context) -> None:
        """Stream what happens to blocks."""
        looking, served = self._ready()
        async with self.watchers.blocks(looking, _tenant()) as watcher:
            began = stats_of(await watcher.began, served.facts.dtype)
            await context.write(v1.WatchCacheResponse(stats=began))
            while True:
                await context.write(events_of(await watcher.take(), watcher.tenant))

    async def WatchSteps(self, request: v1.WatchStepsRequest, context: Context) -> None:
        """Stream steps."""
        looking, served = self._ready()
        tokens = self._config.inspect_text
        async with self.watchers.steps(looking, _tenant()) as watcher:
            began = stats_of(await watcher.began, served.facts.dtype)
            await context.write(v1.WatchStepsResponse(stats=began))
            while True:
                await context.write(steps_of(await watcher.take(), watcher.tenant, self._spell, tokens=tokens))

    async def ListRequests(self, request: v1.ListRequestsRequest, context: Context) -> v1.ListRequestsResponse:
        """List the requests."""
        state = await self._look(partial(requests_state, tenant=_tenant(), tokens=self._config.inspect_text))
        return await self._workers.run(partial(requests_message, state, self._spell))

    async def PredictCacheHit(self, request: v1.PredictCacheHitRequest, context: Context) -> v1.PredictCacheHitResponse:
        """Look for a prompt in the prefix cache."""
        asked = (await self._generation.ask(request.generate)).request
        pool = await self._look(lambda engine: engine.scheduler.pool)
        hashing = partial(digests_of, pool, asked)
        digests = await self._workers.run(hashing) if asked.prefix_caching else []
        found = await self._look(cached_prefix(digests))
        n_tokens, size = len(asked.prompt), pool.page_size
        return v1.PredictCacheHitResponse(
            prompt_tokens=n_tokens, cached_tokens=found * size, page_size=size, new_blocks=-(-n_tokens // size) - found
        )

    def _spell(self, tokens: Sequence[int]) -> str:
        """The text of tokens, where it may be told."""
        _, served = self._ready()
        return served.text.decode(tokens) if tokens and self._config.inspect_text else ""

    async def _look(self, function: Callable[[Engine], Seen]) -> Seen:
        looking, _ = self._ready()
        return await asyncio.wrap_future(looking.look(function))

    def _ready(self) -> tuple[Looking, Served]:
        if self._looking is None:
            raise Loading("the model is still being loaded")
        return self._looking, self._generation.ready()


def _tenant() -> str:
    return current().caller.tenant


def _own(request_id: str) -> str:
    """The name by which the engine knows a request of the caller's tenant.

    Raises:
        NotFound: no request can have that name.
    """
    current().request_id = request_id[:MAX_NAME]
    if "/" in request_id or not request_id:
        raise NotFound(f"request_id: no request {request_id!r} is running, or has ended and is kept")
    return full_name(_tenant(), request_id)


def _read(reading: Reading, served: Served) -> v1.CacheRead:
    stored, facts = reading.stored, served.facts
    return v1.CacheRead(
        prompt_tokens=len(stored.request.prompt),
        tokens=stored.tokens,
        stored=stored.stored,
        running=stored.live,
        stored_dtype=facts.dtype,
        model_hash=facts.model_hash,
        quantization=facts.quantization,
    )
