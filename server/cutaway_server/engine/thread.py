"""The engine's own thread: requests come in through a queue, events go out once a step."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from cutaway_server.engine.engine import Engine, Events
from cutaway_server.engine.looks import Look, Looks
from cutaway_server.errors import AlreadyExists, CutawayError, EngineFailed
from cutaway_server.request import Event, Request, RequestEnded, RequestFailed

log = logging.getLogger(__name__)

Seen = TypeVar("Seen")


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request, or one completion of it."""

    request_id: str
    index: int | None


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread."""


class EngineThread:
    """Runs an engine. `report` and `on_death` are called on the engine's thread and must return at once."""

    def __init__(
        self,
        engine: Engine,
        report: Callable[[Items[tuple[str, Event]]], None],
        on_death: Callable[[BaseException], None],
    ) -> None:
        self.engine = engine
        self._report = report
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[Request | Abort | Look[Any] | Stop] = queue.SimpleQueue()
        self._looks = Looks(engine)
        self._lock = threading.Lock()  # guards _names, _queued and _ended
        self._names: set[str] = set()  # requests submitted and not ended
        self._queued = 0  # requests in the inbox
        self._failure: BaseException | None = None
        self._ended = False
        self._untold: Events = []
        engine.before_layers = self._tell
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in, and wait for it; what still runs is not told."""
        self._inbox.put(Stop())
        self._thread.join()

    @property
    def queued(self) -> int:
        """Requests that the engine has not taken in yet."""
        return self._queued

    def idle(self) -> bool:
        """Whether every request submitted has ended."""
        return not self._names

    def submit(self, request: Request) -> None:
        """Queue a request, from any thread, at once.

        Raises:
            EngineFailed: the engine has died.
            AlreadyExists: a request of that name is queued or running.
            QueueFull: too many wait.
            InvalidField: the request can never fit the KV cache.
        """
        if self._failure is not None:
            raise EngineFailed("the engine has failed")
        with self._lock:
            if request.request_id in self._names:
                raise AlreadyExists(f"request_id: {request.request_id!r} is already running")
            self.engine.scheduler.refuse(request, arriving=self._queued)
            self._names.add(request.request_id)
            self._queued += 1
        self._inbox.put(request)

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """End a request or one completion of it within one step, from any thread; False if there is none."""
        if request_id not in self._names:
            return False
        self._inbox.put(Abort(request_id, index))
        return True

    def look(self, function: Callable[[Engine], Seen]) -> Future[Seen]:
        """Have `function` called with the engine on its thread, between two steps; what it gives or raises.

        It must be quick: everybody's tokens wait. From any thread, at once. EngineFailed if the engine has stopped.
        """
        look = Look(function)
        with self._lock:
            if not self._ended:
                self._inbox.put(look)
                return look.seen
        look.refuse()
        return look.seen

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            self._refuse_looks()

    def _refuse_looks(self) -> None:
        with self._lock:
            self._ended = True
        self._looks.refuse_all()
        while not self._inbox.empty():
            if isinstance(item := self._inbox.get(), Look):
                item.refuse()

    def _serve(self) -> None:
        try:
            while self._take_inbox():
                events = self.engine.step()  # empties _untold
                self._untold += events
                if self.engine.computing:
                    self._tell()
                self.engine.watched.over(events, self.engine.observed.reported())
        except BaseException as error:
            log.critical("the engine failed in step %d", self.engine.steps, exc_info=error)
            self._failure = error
            try:
                self._tell()
            finally:
                self._on_death(error)

    def _take_inbox(self) -> bool:
        """Take in what has come, waiting for it if there is nothing to do; False to stop."""
        self._looks.make()
        while not (self._inbox.empty() and self.engine.has_work):
            if not self.engine.has_work:
                self._tell()
            item = self._inbox.get()
            if isinstance(item, Stop):
                self._tell()
                return False
            if isinstance(item, Look):
                self._looks.add(item)
            else:
                self._untold += self._take(item)
            self._looks.make()
        return True

    def _take(self, item: Request | Abort) -> Events:
        if isinstance(item, Abort):
            if item.index is not None:  # whoever ends one completion of several has found a stop text in it
                self.engine.observed.stopped(item.request_id, item.index)
            return self.engine.abort(item.request_id, item.index)
        with self._lock:
            self._queued -= 1
        try:
            self.engine.add(item)
        except CutawayError as error:
            return [(item.request_id, RequestFailed(error))]
        except Exception:
            log.exception("request %s could not be queued", item.request_id)
            return [(item.request_id, RequestFailed(EngineFailed("the request could not be queued")))]
        return []

    def _tell(self) -> None:
        """Report what has happened: as a step is about to be computed, so that whoever is told can work meanwhile.

        The interpreter has one lock, and native code gives it up. Told at once, the event loop would take it from
        this thread while that prepares the next step.
        """
        self.engine.watched.flush()
        events, self._untold = self._untold, []
        if not events:
            return
        self.engine.observed.take(events)
        ended = {name for name, event in events if isinstance(event, RequestEnded | RequestFailed)}
        with self._lock:
            self._names -= ended
        self._report(events)
