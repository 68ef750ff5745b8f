"""A few threads for tokenising and templating, so that the event loop never waits for them."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from traceback import clear_frames
from typing import Any, TypeVar

from cutaway_server.errors import QueueFull
from cutaway_server.kernels.memory import trim
from cutaway_server.service.caller import current

R = TypeVar("R")
Task = tuple[Callable[[], Any], "Future[Any]"]
RETRY_AFTER_SECONDS = 1.0
LARGE_BYTES = 2**18  # of a message that takes a hundred times as much memory while it is turned into tokens


class Workers:
    """Runs functions on threads, those of tenants in turn, and takes at most `limit` at once, running or waiting.

    A text that is tokenised may be one that need not wait afterwards, so `limit` is what may run and wait together.
    A tenant has at most as many of these places as are then left to others.
    """

    def __init__(self, threads: int, limit: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="text")
        self._limit = limit
        self._taken: Counter[str] = Counter()  # by tenant
        self._lock = threading.Lock()  # guards _waiting
        self._waiting: OrderedDict[str, deque[Task]] = OrderedDict()  # by tenant: the first has the next turn

    async def run(self, function: Callable[[], R], size: int = 0) -> R:
        """The function's result, for the tenant whose call this is. `size`: bytes of the message that it works on.

        Raises:
            QueueFull: too many wait already.
        """
        tenant = current().caller.tenant
        self._refuse(tenant)
        loop = asyncio.get_running_loop()
        self._taken[tenant] += 1  # until it has run, even if nobody waits for it any more
        future: Future[R] = Future()
        future.add_done_callback(lambda _: self._count_down(loop, tenant))
        with self._lock:
            task = function if size < LARGE_BYTES else partial(_trimming, function)
            self._waiting.setdefault(tenant, deque()).append((task, future))
        self._executor.submit(self._run_next)
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """End the threads."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            waiting, self._waiting = self._waiting, OrderedDict()
        for tasks in waiting.values():
            for _, future in tasks:
                future.cancel()

    def _refuse(self, tenant: str) -> None:
        taken = self._taken.total()
        if taken >= self._limit:
            rule = f"{taken} texts are being tokenised or wait for it, as many as may"
            raise QueueFull(rule, RETRY_AFTER_SECONDS)
        if tenant and self._taken[tenant] >= self._limit - taken:
            rule = f"{self._taken[tenant]} of your texts are being tokenised or wait for it; what is left is for others"
            raise QueueFull(rule, RETRY_AFTER_SECONDS)

    def _run_next(self) -> None:
        """Run one function of the tenant whose turn it is."""
        with self._lock:
            if not self._waiting:
                return
            tenant, tasks = self._waiting.popitem(last=False)
            function, future = tasks.popleft()
            if tasks:
                self._waiting[tenant] = tasks
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    def _count_down(self, loop: asyncio.AbstractEventLoop, tenant: str) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._done, tenant)

    def _done(self, tenant: str) -> None:
        self._taken[tenant] -= 1
        if not self._taken[tenant]:
            del self._taken[tenant]


def _trimming(function: Callable[[], R]) -> R:
    """Run what takes much memory, which the allocator would keep afterwards."""
    try:
        return function()
    except BaseException as error:
        clear_frames(error.__traceback__)  # what the function was working on, until the garbage is next collected
        raise
    finally:
        trim()
