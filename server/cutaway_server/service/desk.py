"""Who waits for which request's events: the one place where the engine's thread and the event loop meet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol, TypeVar

from cutaway_server.engine.engine import Engine
from cutaway_server.errors import AlreadyExists, Draining, EngineFailed, NotFound
from cutaway_server.request import Event, Request, RequestEnded, RequestFailed
from cutaway_server.service.reply import Reply

log = logging.getLogger(__name__)

Seen = TypeVar("Seen")


class Backend(Protocol):
    """What computes; every request submitted ends with RequestEnded or RequestFailed."""

    def submit(self, request: Request) -> None:
        """Queue a request."""

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """End a request, or one completion of it."""

    def look(self, function: Callable[[Engine], Seen]) -> Future[Seen]:
        """Have `function` called with the engine between two steps."""


class Desk:
    """Routes events to replies. All but `report` belongs to the event loop.

    A request keeps its name until the engine has ended it, so that no late event reaches a later request. Names are
    a tenant's own: the engine knows a request by both, so that nobody meets another tenant's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._backend: Backend | None = None
        self._arriving: dict[str, bool] = {}  # not submitted yet; whether they are to be aborted then
        self._replies: dict[str, Reply] = {}  # until the engine has ended them
        self._streams: set[Reply] = set()  # until their readers have gone
        self._refusal: Exception | None = None  # told to new requests
        self._quiet = asyncio.Event()  # no stream is open
        self._quiet.set()

    def connect(self, backend: Backend) -> None:
        """Say what computes."""
        self._backend = backend

    def report(self, events: Sequence[tuple[str, Event]]) -> None:
        """Take one step's events, on the engine's thread."""
        self._loop.call_soon_threadsafe(self._deliver, events)

    @contextmanager
    def arriving(self, request_id: str, tenant: str) -> Iterator[None]:
        """Keep a name for a request that `stream` is to submit within the block, so that it can be aborted before.

        Raises:
            AlreadyExists: it has one of that name.
        """
        name = full_name(tenant, request_id)
        self._refuse_second(name, request_id)
        self._arriving[name] = False
        try:
            yield
        finally:
            self._arriving.pop(name, None)

    @contextmanager
    def stream(self, request: Request, make: Callable[[Callable[[int], None]], Reply]) -> Iterator[Reply]:
        """Submit a request for as long as the block lasts; leaving it early aborts the request.

        Args:
            request: what to compute.
            make: makes the reply, given what ends one of its completions early.

        Raises:
            Draining, EngineFailed, AlreadyExists, QueueFull, InvalidField: it is not taken.
        """
        name, sampling = full_name(request.tenant, request.request_id), request.sampling
        reply = self._open(name, request, make)
        log.info("request %s: %d prompt tokens, n=%d", name, len(request.prompt), sampling.n)
        try:
            yield reply
        finally:
            log.info("request %s: %s", name, reply.state)
            self._streams.discard(reply)
            if not self._streams:
                self._quiet.set()
            if self._replies.get(name) is reply:  # the engine has not ended it
                reply.leave()
                self._engine.abort(name)

    def _open(self, name: str, request: Request, make: Callable[[Callable[[int], None]], Reply]) -> Reply:
        self.admit()
        aborted = self._arriving.pop(name, False)
        self._refuse_second(name, request.request_id)
        reply = make(lambda index: self._abort_completion(name, index))
        self._engine.submit(
            replace(request, request_id=name)
        )  # its events come through the loop: not before this function is over
        self._replies[name] = reply
        self._streams.add(reply)
        self._quiet.clear()
        if aborted:
            self._engine.abort(name)
        return reply

    def _refuse_second(self, name: str, request_id: str) -> None:
        if name in self._replies or name in self._arriving:
            raise AlreadyExists(f"request_id: {request_id!r} is already running")

    def abort(self, request_id: str, tenant: str = "") -> None:
        """End a queued or running request of `tenant`, or one that is on its way as soon as it is queued.

        Raises:
            NotFound: it has none of that name.
        """
        name = full_name(tenant, request_id)
        if "/" not in request_id and name in self._arriving:
            self._arriving[name] = True
        elif "/" in request_id or name not in self._replies or not self._engine.abort(name):
            raise NotFound(f"request_id: no request {request_id!r} is queued or running")

    def admit(self) -> None:
        """Check that new requests are taken.

        Raises:
            Draining, EngineFailed: they are not.
        """
        if self._refusal is not None:
            raise self._refusal

    def refuse(self, error: Exception) -> None:
        """Take no new requests; tell `error` instead."""
        self._refusal = error

    def end_all(self, error: Draining | EngineFailed) -> None:
        """End every stream with an error."""
        for name, reply in self._replies.items():
            reply.fail(error)
            self._engine.abort(name)

    @property
    def names(self) -> frozenset[str]:
        """The requests that the engine has not ended."""
        return frozenset(self._replies)

    async def quiet(self) -> None:
        """Wait until no stream is open."""
        await self._quiet.wait()

    @property
    def _engine(self) -> Backend:
        assert self._backend is not None, "connect() comes first"
        return self._backend

    def _abort_completion(self, name: str, index: int) -> None:
        self._engine.abort(name, index)

    def _deliver(self, events: Sequence[tuple[str, Event]]) -> None:
        for name, event in events:
            reply = self._replies.get(name)
            if reply is None:
                continue
            if isinstance(event, RequestEnded | RequestFailed):
                del self._replies[name]
            self._hand_over(name, reply, event)

    def _hand_over(self, name: str, reply: Reply, event: Event) -> None:
        if reply.failed:
            return
        try:
            reply.add(event)
        except Exception:
            log.exception("request %s: its %s could not be told", name, type(event).__name__)
            reply.fail(EngineFailed("this request's events could not be put into messages"))
        if reply.failed and name in self._replies:  # what nobody will read need not be computed
            self._engine.abort(name)


def full_name(tenant: str, request_id: str) -> str:
    """The name by which the engine knows a tenant's request."""
    return f"{tenant}/{request_id}" if tenant else request_id  # neither has a slash
