"""Looks at the engine between two steps, asked for from other threads: each gets the answer of a function of it.

While there is work, looks may take a tenth of the time, saved up to `MOST_SAVED`: who asks for many, or for long ones,
waits longer, and nobody's tokens do.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from cutaway_server.engine.engine import Engine
from cutaway_server.errors import EngineFailed

SHARE = 0.1
MOST_SAVED = 0.002  # seconds
MOST_OWED = 0.2

Seen = TypeVar("Seen")


class Look(Generic[Seen]):
    """One look, and its answer to come."""

    def __init__(self, function: Callable[[Engine], Seen]) -> None:
        self._function = function
        self.seen: Future[Seen] = Future()

    def make(self, engine: Engine) -> None:
        """Look, unless nobody waits for the answer any more. What the function raises is its answer."""
        if not self.seen.set_running_or_notify_cancel():
            return
        try:
            seen = self._function(engine)
        except Exception as error:
            self.seen.set_exception(error)
        else:
            self.seen.set_result(seen)

    def refuse(self) -> None:
        """Answer that there is no engine any more."""
        if self.seen.set_running_or_notify_cancel():
            self.seen.set_exception(EngineFailed("the engine has stopped"))


class Looks:
    """The looks that wait, first come first served. Belongs to the engine's thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[Look[object]] = deque()
        self._left = MOST_SAVED  # seconds that looks may take now; below 0 after a long one
        self._counted = 0.0  # when that was last brought up to date

    def add(self, look: Look[object]) -> None:
        """Look soon."""
        self._waiting.append(look)

    def make(self) -> None:
        """Look for as long as there is time; without limit while no step is due."""
        if not self._waiting:
            return
        now = time.perf_counter()
        self._left = min(MOST_SAVED, self._left + SHARE * (now - self._counted))
        while self._waiting and (self._left > 0 or not self._engine.has_work):
            self._waiting.popleft().make(self._engine)
            begun, now = now, time.perf_counter()
            if self._engine.has_work:
                self._left = max(self._left - (now - begun), -MOST_OWED)
        self._counted = now

    def refuse_all(self) -> None:
        """Answer all who wait that there is no engine any more."""
        while self._waiting:
            self._waiting.popleft().refuse()
