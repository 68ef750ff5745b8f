"""The synchronous client's calls about the machine: its cache, its requests, its steps."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Self, TypeVar, Unpack

import grpc

from cutaway import machine_wire as wire
from cutaway.interrupt import cancelling
from cutaway.machine import BlockEvent, Blocks, CacheContents, CacheHit, CacheStats, Requests, Step
from cutaway.machine_wire import ReadOptions
from cutaway.options import GenerateOptions
from cutaway.replay import SampleReplay
from cutaway.replay_wire import ReplayOptions, replay_request, sample_replay
from cutaway.status import error_of
from cutaway.v1 import machine_pb2 as pb

if TYPE_CHECKING:
    from cutaway.client import Calls
    from cutaway.v1.introspection_pb2_grpc import IntrospectionStub

    Asked = TypeVar("Asked")
    Told = TypeVar("Told")

Message = TypeVar("Message", pb.WatchCacheResponse, pb.WatchStepsResponse)
Item = TypeVar("Item", BlockEvent, Step)


class Watch(Generic[Message, Item]):
    """What happens on the server, as it happens: iterate over it. It goes on until it is closed.

    It has begun when it is returned; `stats` is the cache at that moment. Leaving the loop early, closing it or
    dropping it ends it; `next(watch)` takes one and leaves it open. Who reads too slowly gets ResourceExhausted, with
    how much was missed. `other_events` counts what happened to other tenants' blocks.
    """

    def __init__(self, call: grpc.CallIterator[Message], items: Callable[[Message], list[Item]], address: str) -> None:
        self._messages: Iterator[Message] = iter(call)
        self._items: Callable[[Message], list[Item]] = items
        self._address = address
        self._closed = False
        self._pending: list[Item] = []  # the next is last
        self._cancel: Callable[[], object] = weakref.finalize(self, call.cancel)
        self.other_events = 0
        self.stats = wire.stats(self._receive().stats)

    def __iter__(self) -> Iterator[Item]:
        """Everything from here on; ends the watch when it is left."""
        try:
            while True:
                try:
                    item = next(self)
                except StopIteration:
                    return
                yield item
        finally:
            self.close()

    def __next__(self) -> Item:
        """The next.

        Raises:
            StopIteration: the watch was closed.
            CutawayError: the server ended it.
        """
        while not self._pending:
            if self._closed:
                raise StopIteration
            message = self._receive()
            self.other_events += message.other_events if isinstance(message, pb.WatchCacheResponse) else 0
            self._pending = self._items(message)[::-1]
        return self._pending.pop()

    def _receive(self) -> Message:
        try:
            with cancelling(self._cancel):
                return next(self._messages)
        except grpc.RpcError as error:
            if self._closed:
                raise StopIteration from error
            raise error_of(error, self._address) from error

    def close(self) -> None:
        """End the watch; what was received and not read is dropped."""
        self._closed = True
        self._pending.clear()
        self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def block_events(message: pb.WatchCacheResponse) -> list[BlockEvent]:
    """What happened to the caller's tenant's blocks."""
    return [wire.event(event) for event in message.events]


def steps(message: pb.WatchStepsResponse) -> list[Step]:
    """The steps."""
    return [wire.step(step) for step in message.steps]


class MachineCalls:
    """The calls; `Client` has them. See each for the scope that it asks for."""

    address: str
    _calls: Calls
    _metadata: tuple[tuple[str, str], ...]

    @abstractmethod
    def _ask(self, method: grpc.UnaryUnaryMultiCallable[Asked, Told], request: Asked, timeout: float | None) -> Told:
        """The answer to a request."""

    @abstractmethod
    def _seconds(self, timeout: float | None) -> float | None:
        """The timeout that holds."""

    @abstractmethod
    def _check_open(self) -> None:
        """Raise RuntimeError if the client is closed."""

    @property
    def _machine(self) -> IntrospectionStub:
        return self._calls.introspection

    def cache_stats(self, *, timeout: float | None = None) -> CacheStats:
        """The KV cache in numbers: `blocks_total`, `blocks_used`, `blocks_cached`, `blocks_free`, hits, evictions.

        Asks for the scope `observe`.
        """
        return wire.stats(self._ask(self._machine.GetCacheStats, pb.GetCacheStatsRequest(), timeout))

    def blocks(self, request_id: str = "", *, timeout: float | None = None) -> Blocks:
        """Each block of your tenant that is not free: what it holds, and for whom; or those of one request.

        Asks for the scope `observe`.
        """
        request = pb.GetBlocksRequest(request_id=request_id)
        return wire.blocks(self._stream(self._machine.GetBlocks, request, timeout))

    def read_cache(self, request_id: str, **options: Unpack[ReadOptions]) -> CacheContents:
        """Keys and values [layer, pos, kv_head, d_head] of a request that runs, or has ended and is kept.

        `index` is the completion; `layers`, `heads` and `positions` ("all", "prompt", "generated", [5, -1], ...)
        select; `dtype` is "F32", "F16", "BF16" or, unset, as stored. Asks for the scope `introspect`.

        Raises:
            NotFound: no such request or completion.
            FailedPrecondition: others needed the room of its blocks, or it was preempted while it was read.
            InvalidArgument: the selection is impossible.
            ResourceExhausted: it is over `max_bytes`, or the server's limit.
        """
        reader = wire.CacheReader()
        request = wire.read_request(request_id, options)
        for message in self._stream(self._machine.ReadCache, request, options.get("timeout")):
            reader.take(message)
        return reader.contents()

    def replay_sample(self, request_id: str, position: int, **options: Unpack[ReplayOptions]) -> SampleReplay:
        """How the token at `position` was picked, of a request that runs, or has ended and is kept; print it.

        Positions count from the prompt's start, or, below 0, from the end. With `temperature`, `top_p` or others of
        `Changes` it also tells what the same random number would have picked. `count` of the likeliest tokens are told,
        and `tokens`; `index` is the completion. Asks for the scope `introspect`.

        Raises:
            NotFound: no such request or completion.
            InvalidArgument: no token was generated there, or a value breaks its rule.
            FailedPrecondition: others needed the room of its blocks, it was preempted, or no token can be drawn so.
        """
        request = replay_request(request_id, position, options)
        return sample_replay(self._ask(self._machine.ReplaySample, request, options.get("timeout")))

    def watch_cache(self, *, timeout: float | None = None) -> Watch[pb.WatchCacheResponse, BlockEvent]:
        """What happens to your tenant's blocks from now on: taken, copied, shared, released, published, evicted.

        Asks for the scope `observe`.
        """
        self._check_open()
        call = self._machine.WatchCache(
            pb.WatchCacheRequest(), timeout=self._seconds(timeout), metadata=self._metadata
        )  # fmt: skip
        return Watch(call, block_events, self.address)

    def watch_steps(self, *, timeout: float | None = None) -> Watch[pb.WatchStepsResponse, Step]:
        """Every step of the engine from now on: who was in it, with which positions, how long each phase took.

        Asks for the scope `observe`.
        """
        self._check_open()
        call = self._machine.WatchSteps(
            pb.WatchStepsRequest(), timeout=self._seconds(timeout), metadata=self._metadata
        )  # fmt: skip
        return Watch(call, steps, self.address)

    def requests(self, *, timeout: float | None = None) -> Requests:
        """Your tenant's requests that wait, run, or have ended and are kept. Asks for the scope `observe`."""
        return wire.requests(self._ask(self._machine.ListRequests, pb.ListRequestsRequest(), timeout))

    def predict_cache_hit(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> CacheHit:
        """How much of a prompt, of `token_ids=` or of `messages=` the prefix cache has. Nothing is computed.

        Asks for the scope `observe` or `generate`.
        """
        request = wire.predict_request(prompt, options)
        return wire.hit(self._ask(self._machine.PredictCacheHit, request, options.get("timeout")))

    def _stream(
        self, method: grpc.UnaryStreamMultiCallable[Asked, Told], request: Asked, timeout: float | None
    ) -> Iterator[Told]:
        self._check_open()
        call = method(request, timeout=self._seconds(timeout), metadata=self._metadata)
        try:
            with cancelling(call.cancel):
                yield from call
        except grpc.RpcError as error:
            raise error_of(error, self.address) from error
