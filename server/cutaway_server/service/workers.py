"""A few threads for tokenising and templating, so that the event loop never waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from traceback import clear_frames
from typing import TypeVar

from cutaway_server.errors import QueueFull
from cutaway_server.kernels.memory import trim

R = TypeVar("R")

LARGE_BYTES = 2**18  # of a message that takes a hundred times as much memory while it is turned into tokens


class Workers:
    """Runs functions on threads, and takes at most `limit` at once, running or waiting.

    A text that is tokenised may be one that need not wait afterwards, so `limit` is what may run and wait together.
    """

    def __init__(self, threads: int, limit: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="text")
        self._limit = limit
        self._taken = 0

    async def run(self, function: Callable[[], R], size: int = 0) -> R:
        """The function's result. `size`: bytes of the message that it works on.

        Raises:
            QueueFull: too many wait already.
        """
        if self._taken >= self._limit:
            raise QueueFull(
                f"{self._taken} texts are being tokenised or wait for it, as many as may", retry_after_seconds=1.0
            )
        loop = asyncio.get_running_loop()
        self._taken += 1  # until it has run, even if nobody waits for it any more
        future = self._executor.submit(function if size < LARGE_BYTES else partial(_trimming, function))
        future.add_done_callback(lambda _: self._count_down(loop))
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """End the threads."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _count_down(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._done)

    def _done(self) -> None:
        self._taken -= 1


def _trimming(function: Callable[[], R]) -> R:
    """Run what takes much memory, which the allocator would keep afterwards."""
    try:
        return function()
    except BaseException as error:
        clear_frames(error.__traceback__)  # what the function was working on, until the garbage is next collected
        raise
    finally:
        trim()
