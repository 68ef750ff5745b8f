"""How late the event loop is: what it runs between two messages makes every stream wait."""

from __future__ import annotations

import asyncio

from cutaway_server.histogram import Histogram

PERIOD = 0.25  # seconds
EDGES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class LoopLag:
    """Asks the running loop to be woken four times a second, and notes how much later it was."""

    def __init__(self) -> None:
        self.late = Histogram(EDGES)
        self._task = asyncio.ensure_future(self._watch())

    def stop(self) -> None:
        """Stop asking."""
        self._task.cancel()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + PERIOD
            await asyncio.sleep(PERIOD)
            self.late.observe(max(0.0, loop.time() - due))
