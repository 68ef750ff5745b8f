"""One way to compute a request and stream its answer, whichever call asked for it."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from cutaway.v1 import inference_pb2 as v1
from google.protobuf.message import Message

from cutaway_server.config import Config
from cutaway_server.engine.build import EngineFacts
from cutaway_server.errors import InvalidField, QueueFull
from cutaway_server.service.asking import Limits, ask, name_of
from cutaway_server.service.caller import Caller, Scope, current
from cutaway_server.service.describing import started
from cutaway_server.service.desk import Desk
from cutaway_server.service.gathering import Gathered
from cutaway_server.service.quotas import Quotas
from cutaway_server.service.reply import Asked, Reply
from cutaway_server.service.shelf import Shelf
from cutaway_server.service.status import Context, Loading, PermissionDenied
from cutaway_server.service.workers import Workers
from cutaway_server.text.tokenizer import TextModel

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1.0
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Served:
    """The model served, once it is loaded."""

    facts: EngineFacts
    text: TextModel


class Generation:
    """Computes requests. `served` is set when the model is ready; until then calls are UNAVAILABLE."""

    def __init__(self, desk: Desk, workers: Workers, config: Config, quotas: Quotas, shelf: Shelf) -> None:
        self.shelf = shelf
        self.served: Served | None = None
        self._desk = desk
        self._workers = workers
        self._config = config
        self._quotas = quotas
        self.held = 0  # bytes that captures of requests at work may come to

    def ready(self) -> Served:
        """The model served.

        Raises:
            Loading: it is not ready yet.
        """
        if self.served is None:
            raise Loading("the model is still being loaded")
        return self.served

    def limits(self) -> Limits:
        """What requests must stay within."""
        config = self._config
        facts = self.ready().facts
        return Limits(facts, config.max_prompt_bytes, config.max_backlog, config.max_capture_bytes, self.shelf)

    async def ask(
        self, request: v1.GenerateRequest, deadline: float | None = None, *, limits: Limits | None = None
    ) -> Asked:
        """Check and tokenise a request, on a worker thread; `limits` are the server's unless others are given.

        Raises:
            CutawayError: it is refused.
        """
        served, call = self.ready(), current()
        check_scopes(request, call.caller)
        work = partial(ask, request, served.text, limits or self.limits(), time.monotonic(), deadline, call.caller)
        return await self._workers.run(work, request.ByteSize())

    async def work(self, function: Callable[[], R]) -> R:
        """Call a function on a worker thread."""
        return await self._workers.run(function, 0)

    # Writing to the context, rather than yielding, lets a cancelled call clean up at once.
    async def stream(
        self, request: v1.GenerateRequest, context: Context, wrap: Callable[[v1.GenerateResponse], Message],
        alter: Callable[[Asked], Asked] | None = None,
    ) -> None:  # fmt: skip
        """Stream one request's events, each as the message that `wrap` makes of it; `alter` changes what is asked."""
        async with self._answering(request, context, alter=alter) as reply:
            while messages := await reply.take():
                for message in messages:
                    await context.write(wrap(message))

    async def distil(
        self, request: v1.GenerateRequest, context: Context, wrap: Callable[[v1.GenerateResponse], Message],
        make: Callable[[Gathered], Iterable[v1.GenerateResponse]],
    ) -> None:  # fmt: skip
        """Stream one request's events, and in place of its tensors what `make`, on a worker thread, makes of them."""
        gathered, last = Gathered(), None
        async with self._answering(request, context) as reply:
            while messages := await reply.take():
                for message in messages:
                    match message.WhichOneof("event"):
                        case "tensor" | "chunk":
                            gathered.take(message)
                        case "finished":
                            last = message
                        case _:
                            await context.write(wrap(message))
            for made in await self.work(lambda: list(make(gathered))):
                await context.write(wrap(made))
        if last is not None:
            await context.write(wrap(last))

    async def gather(self, request: v1.GenerateRequest, context: Context) -> Gathered:
        """What a request captures, once it is computed."""
        gathered = Gathered()
        async with self._answering(request, context) as reply:
            while messages := await reply.take():
                for message in messages:
                    if message.WhichOneof("event") in ("tensor", "chunk"):
                        gathered.take(message)
        return gathered

    async def run(
        self, request: v1.GenerateRequest, context: Context, take: Callable[[v1.GenerateResponse], None], *,
        most_tokens: int,
    ) -> None:  # fmt: skip
        """Compute a request of at most so many prompt tokens for the server's own use: hand each event to `take`.

        Raises:
            InvalidField: the prompt is longer, or has less than two tokens.
        """
        async with self._answering(request, context, most_tokens) as reply:
            while messages := await reply.take():
                for message in messages:
                    take(message)

    @asynccontextmanager
    async def _answering(
        self, request: v1.GenerateRequest, context: Context, most_tokens: int | None = None,
        alter: Callable[[Asked], Asked] | None = None,
    ) -> AsyncIterator[Reply]:  # fmt: skip
        """The reply to a request, for as long as the block lasts."""
        call = current()
        call.looks_inside = bool(request.captures or request.edits)
        served = self.ready()
        self._desk.admit()
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        request.request_id = name_of(request)
        with self._desk.arriving(request.request_id, call.caller.tenant):
            asked = await self.ask(request, deadline)
            asked = asked if alter is None else alter(asked)
            call.request_id = request.request_id
            length = len(asked.request.prompt)
            if most_tokens is not None and not 2 <= length <= most_tokens:
                raise InvalidField("generate.prompt", f"{length} tokens", f"must have 2 to {most_tokens}")
            if self._config.log_prompts:
                log.info("request %s: prompt %r", call.request_id, served.text.decode(asked.request.prompt))
            make = partial(Reply, asked, started(served.facts), self._config.max_backlog)
            with self.holding(asked.capture_bytes), self._desk.stream(asked.request, make) as reply:
                yield reply

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Hold bytes of captures, of the caller's and of everybody's, for as long as the block lasts.

        Raises:
            QueueFull: there is no room for them now.
        """
        with self._quotas.captures(current().caller, size), self._holding(size):
            yield

    @contextmanager
    def _holding(self, size: int) -> Iterator[None]:
        """Keep room for captured values that may wait for their reader."""
        if size and self.held + size > self._config.capture_memory:
            rule = f"requests at work may hold {self.held} bytes of captures, of {self._config.capture_memory}"
            raise QueueFull(f"captures: {size} bytes more are too many: {rule}", RETRY_AFTER_SECONDS, "captures")
        self.held += size
        try:
            yield
        finally:
            self.held -= size


def check_scopes(request: v1.GenerateRequest, caller: Caller) -> None:
    """Let only those look inside, or change what is there, who may.

    Raises:
        PermissionDenied: the caller lacks the scope.
    """
    has = ", ".join(sorted(caller.scopes))
    for field, asked, scope in (
        ("captures", request.captures, Scope.INTROSPECT), ("edits", request.edits, Scope.EDIT),
    ):  # fmt: skip
        if asked and scope not in caller.scopes:
            raise PermissionDenied(f"{field}: asks for scope {scope}, and {caller.name!r} has {has}")
