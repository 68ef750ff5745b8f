"""Looks at the engine between two steps, asked for from other threads: each gets the answer of a function of it.

Looks share what little time there is between steps: when those made since the last step have taken `LOOK_SECONDS`, the
others wait for the next step to be over.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from cutaway_server.engine.engine import Engine
from cutaway_server.errors import EngineFailed

LOOK_SECONDS = 0.002

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
        self._spent = 0.0

    def add(self, look: Look[object]) -> None:
        """Look soon."""
        self._waiting.append(look)

    def make(self) -> None:
        """Look for as long as there is time, and at least once between two steps; without limit while none is due."""
        while self._waiting and (self._spent < LOOK_SECONDS or not self._engine.has_work):
            begun = time.perf_counter()
            self._waiting.popleft().make(self._engine)
            self._spent += time.perf_counter() - begun

    def stepped(self) -> None:
        """A step is over."""
        self._spent = 0.0

    def refuse_all(self) -> None:
        """Answer all who wait that there is no engine any more."""
        while self._waiting:
            self._waiting.popleft().refuse()
