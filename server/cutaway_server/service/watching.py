"""Who watches the engine at work: what each has not read yet, within a bound, so that one who is slow hinders nobody.

The engine writes steps and changes of blocks down while anybody watches them, and tells them at its own pace, once a
step. All watchers share what is told; what is not their tenant's is taken out when it is sent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Generic, Protocol, TypeVar

from cutaway_server.cache.events import BlockEvent
from cutaway_server.engine.engine import Engine
from cutaway_server.engine.machine import CacheState, cache_state
from cutaway_server.engine.watched import StepReport, Told
from cutaway_server.service.status import Backlog

MOST_UNREAD = 65_536  # rows of steps, or changes of blocks
MOST_AT_ONCE = 4096  # in one message

Seen = TypeVar("Seen")
Item = TypeVar("Item", StepReport, BlockEvent)


class Looking(Protocol):
    """Where the engine can be looked at between two steps."""

    def look(self, function: Callable[[Engine], Seen]) -> Future[Seen]:
        """Have `function` called with the engine."""


class Watcher(Generic[Item]):
    """What one watcher has not read yet. Used on the event loop."""

    def __init__(self, tenant: str, weigh: Callable[[Item], int], what: str) -> None:
        self.tenant = tenant
        self.began: asyncio.Future[CacheState] = asyncio.get_running_loop().create_future()
        self._weigh: Callable[[Item], int] = weigh
        self._what = what
        self._unread: deque[Item] = deque()
        self._weight = 0
        self._error: Exception | None = None
        self._news = asyncio.Event()

    @property
    def failed(self) -> bool:
        """Whether it gets nothing more."""
        return self._error is not None

    def begin(self, state: CacheState) -> None:
        """What is put from now on came after `state`."""
        if not self.began.done():
            self.began.set_result(state)

    def put(self, item: Item) -> None:
        """Add what has happened, or, if too much is unread already, drop it all and fail."""
        if self.failed or not self.began.done():
            return
        self._unread.append(item)
        self._weight += self._weigh(item)
        if self._weight > MOST_UNREAD:
            lost = len(self._unread)
            self.fail(Backlog(f"the watch is not read: {lost} {self._what} were dropped unread; watch anew"))
            self._unread.clear()
        self._news.set()

    def fail(self, error: Exception) -> None:
        """Tell `error` after what is unread. The first call counts."""
        if self._error is None:
            self._error = error
            if not self.began.done():
                self.began.set_exception(error)
        self._news.set()

    async def take(self) -> list[Item]:
        """What is unread, or the next that comes: at least one, and not more than fits a message.

        Raises:
            Exception: what `fail` was told, once everything is taken.
        """
        await self._news.wait()
        if not self._unread:
            assert self._error is not None, "news are items or an error"
            raise self._error
        taken: list[Item] = []
        weight = 0
        while self._unread and (not taken or weight + self._weigh(self._unread[0]) <= MOST_AT_ONCE):
            taken.append(self._unread.popleft())
            weight += self._weigh(taken[-1])
        self._weight -= weight
        if not self._unread and self._error is None:
            self._news.clear()
        return taken


class Watchers:
    """All watchers, on the event loop; the engine writes down what at least one of them watches."""

    def __init__(self, *, tokens: bool) -> None:
        """`tokens`: which tokens rows of steps have may be told."""
        self._tokens = tokens
        self._steps: set[Watcher[StepReport]] = set()
        self._blocks: set[Watcher[BlockEvent]] = set()

    @asynccontextmanager
    async def steps(self, looking: Looking, tenant: str) -> AsyncIterator[Watcher[StepReport]]:
        """Watch steps for as long as the block lasts."""
        watcher = Watcher[StepReport](tenant, lambda step: 1 + len(step.rows) + len(step.sampled), "steps")
        async with self._watching(looking, self._steps, watcher):
            yield watcher

    @asynccontextmanager
    async def blocks(self, looking: Looking, tenant: str) -> AsyncIterator[Watcher[BlockEvent]]:
        """Watch what happens to blocks for as long as the block lasts."""
        watcher = Watcher[BlockEvent](tenant, lambda _: 1, "events")
        async with self._watching(looking, self._blocks, watcher):
            yield watcher

    def end(self, error: Exception) -> None:
        """End every watch."""
        for steps_watcher in self._steps:
            steps_watcher.fail(error)
        for blocks_watcher in self._blocks:
            blocks_watcher.fail(error)

    @asynccontextmanager
    async def _watching(
        self, looking: Looking, watchers: set[Watcher[Item]], watcher: Watcher[Item]
    ) -> AsyncIterator[None]:
        watchers.add(watcher)
        try:
            await asyncio.wrap_future(looking.look(self._write_down(watcher)))
            yield
        finally:
            watchers.discard(watcher)
            looking.look(self._write_down(None))

    def _write_down(self, watcher: Watcher[Item] | None) -> Callable[[Engine], None]:
        """Let the engine write down what is watched now, and let `watcher` begin there."""
        loop, tokens = asyncio.get_running_loop(), self._tokens
        steps, blocks = bool(self._steps), bool(self._blocks)

        def tell(told: Told) -> None:
            loop.call_soon_threadsafe(self._deliver, told)

        def begin(engine: Engine) -> None:
            engine.watched.flush()  # what happened before is for those who watched before
            engine.watched.watch(tell, steps=steps, blocks=blocks, tokens=tokens)
            if watcher is not None:
                loop.call_soon_threadsafe(watcher.begin, cache_state(engine, watcher.tenant))

        return begin

    def _deliver(self, told: Told) -> None:
        for step in told.steps:
            for steps_watcher in self._steps:
                steps_watcher.put(step)
        for event in told.blocks:
            for blocks_watcher in self._blocks:
                blocks_watcher.put(event)
