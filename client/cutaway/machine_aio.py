"""The asynchronous client's calls about the machine: as `machine_calls`, awaited."""

from __future__ import annotations

import asyncio
import weakref
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Self, TypeVar, Unpack

import grpc
import grpc.aio

from cutaway import machine_wire as wire
from cutaway.errors import Cancelled
from cutaway.machine import BlockEvent, Blocks, CacheContents, CacheHit, CacheStats, Requests, Step
from cutaway.machine_calls import Item, Message, block_events, steps
from cutaway.machine_wire import ReadOptions
from cutaway.options import GenerateOptions
from cutaway.replay import SampleReplay
from cutaway.replay_wire import ReplayOptions, replay_request, sample_replay
from cutaway.status import error_of
from cutaway.v1 import machine_pb2 as pb

if TYPE_CHECKING:
    from cutaway.aio import AsyncCalls
    from cutaway.v1.introspection_pb2_grpc import IntrospectionAsyncStub

    Asked = TypeVar("Asked")
    Told = TypeVar("Told")


def cancel_soon(loop: asyncio.AbstractEventLoop, call: grpc.aio.RpcContext) -> None:
    """Cancel a call whose watch was dropped, in whichever thread the collector ran."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(call.cancel)


class AsyncWatch(Generic[Message, Item]):
    """What happens on the server, as it happens: `async for item in watch`. See `Watch`.

    It has begun once `async with` is entered or `begin()` was awaited.
    """

    def __init__(
        self, call: grpc.aio.UnaryStreamCall[Asked, Message], items: Callable[[Message], list[Item]], address: str
    ) -> None:
        self._call: grpc.aio.RpcContext = call
        weakref.finalize(self, cancel_soon, asyncio.get_running_loop(), call).atexit = False
        self._messages: AsyncIterator[Message] = aiter(call)
        self._items: Callable[[Message], list[Item]] = items
        self._address = address
        self._closed = False
        self._pending: list[Item] = []  # the next is last
        self._stats: CacheStats | None = None
        self.other_events = 0

    @property
    def stats(self) -> CacheStats:
        """The cache when the watch began.

        Raises:
            RuntimeError: it has not yet.
        """
        if self._stats is None:
            raise RuntimeError("the watch has not begun: await begin()")
        return self._stats

    async def begin(self) -> Self:
        """Wait until the watch has begun."""
        if self._stats is None:
            self._stats = wire.stats((await self._receive()).stats)
        return self

    async def __aiter__(self) -> AsyncIterator[Item]:
        """Everything from here on; ends the watch when it is left."""
        try:
            while True:
                try:
                    item = await anext(self)
                except StopAsyncIteration:
                    return
                yield item
        finally:
            await self.close()

    async def __anext__(self) -> Item:
        """The next.

        Raises:
            StopAsyncIteration: the watch was closed.
            CutawayError: the server ended it.
        """
        await self.begin()
        while not self._pending:
            message = await self._receive()
            self.other_events += message.other_events if isinstance(message, pb.WatchCacheResponse) else 0
            self._pending = self._items(message)[::-1]
        return self._pending.pop()

    async def _receive(self) -> Message:
        if self._closed:
            raise StopAsyncIteration
        try:
            return await anext(self._messages)
        except grpc.RpcError as error:
            raise error_of(error, self._address) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            if self._closed:
                raise StopAsyncIteration from error
            raise Cancelled("the watch was cancelled") from error

    async def close(self) -> None:
        """End the watch; what was received and not read is dropped."""
        self._closed = True
        self._pending.clear()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return await self.begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncMachineCalls:
    """The calls; `AsyncClient` has them. `MachineCalls` says what each does."""

    address: str
    _calls: AsyncCalls

    @abstractmethod
    async def _ask(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Asked, Told], request: Asked, timeout: float | None
    ) -> Told:
        """The answer to a request."""

    @abstractmethod
    def _seconds(self, timeout: float | None) -> float | None:
        """The timeout that holds."""

    @property
    @abstractmethod
    def _proof(self) -> tuple[tuple[str, str], ...]:
        """The metadata that says who asks."""

    def _machine(self) -> IntrospectionAsyncStub:
        return self._calls.introspection

    async def cache_stats(self, *, timeout: float | None = None) -> CacheStats:
        """The KV cache in numbers: `blocks_total`, `blocks_used`, `blocks_cached`, `blocks_free`, hits, evictions."""
        return wire.stats(await self._ask(self._machine().GetCacheStats, pb.GetCacheStatsRequest(), timeout))

    async def blocks(self, request_id: str = "", *, timeout: float | None = None) -> Blocks:
        """Each block of your tenant that is not free: what it holds, and for whom; or those of one request."""
        call = self._begin(self._machine().GetBlocks, pb.GetBlocksRequest(request_id=request_id), timeout)
        return wire.blocks([part async for part in self._messages(call)])

    async def read_cache(self, request_id: str, **options: Unpack[ReadOptions]) -> CacheContents:
        """Keys and values [layer, pos, kv_head, d_head] of a request that runs, or has ended and is kept."""
        reader = wire.CacheReader()
        request = wire.read_request(request_id, options)
        async for message in self._messages(self._begin(self._machine().ReadCache, request, options.get("timeout"))):
            reader.take(message)
        return reader.contents()

    async def replay_sample(self, request_id: str, position: int, **options: Unpack[ReplayOptions]) -> SampleReplay:
        """How the token at `position` was picked, of a request that runs, or has ended and is kept."""
        request = replay_request(request_id, position, options)
        return sample_replay(await self._ask(self._machine().ReplaySample, request, options.get("timeout")))

    def watch_cache(self, *, timeout: float | None = None) -> AsyncWatch[pb.WatchCacheResponse, BlockEvent]:
        """What happens to your tenant's blocks: taken, copied, shared, released, published, evicted."""
        call = self._begin(self._machine().WatchCache, pb.WatchCacheRequest(), timeout)
        return AsyncWatch(call, block_events, self.address)

    def watch_steps(self, *, timeout: float | None = None) -> AsyncWatch[pb.WatchStepsResponse, Step]:
        """Every step of the engine: who was in it, with which positions, how long each phase took."""
        call = self._begin(self._machine().WatchSteps, pb.WatchStepsRequest(), timeout)
        return AsyncWatch(call, steps, self.address)

    async def requests(self, *, timeout: float | None = None) -> Requests:
        """Your tenant's requests that wait, run, or have ended and are kept."""
        return wire.requests(await self._ask(self._machine().ListRequests, pb.ListRequestsRequest(), timeout))

    async def predict_cache_hit(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> CacheHit:
        """How much of a prompt, of `token_ids=` or of `messages=` the prefix cache has. Nothing is computed."""
        request = wire.predict_request(prompt, options)
        return wire.hit(await self._ask(self._machine().PredictCacheHit, request, options.get("timeout")))

    def _begin(
        self, method: grpc.aio.UnaryStreamMultiCallable[Asked, Told], request: Asked, timeout: float | None
    ) -> grpc.aio.UnaryStreamCall[Asked, Told]:
        return method(request, timeout=self._seconds(timeout), metadata=self._proof)

    async def _messages(self, call: grpc.aio.UnaryStreamCall[Asked, Told]) -> AsyncIterator[Told]:
        try:
            async for message in call:
                yield message
        except grpc.RpcError as error:
            raise error_of(error, self.address) from error
        finally:
            call.cancel()
