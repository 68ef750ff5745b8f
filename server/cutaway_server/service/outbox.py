"""What one request's reader has not read yet: it grows with what is unread, never past a bound, and blocks nobody.

Tokens of one completion join its last unread delta until that is big enough, so a slow reader gets fewer and larger
messages and a quick one gets each token at once. Used on the event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from cutaway.v1 import inference_pb2 as v1

from cutaway_server.service.status import Backlog

MESSAGE_BYTES = 2**20  # stock clients refuse messages over 4 MiB


@dataclass(slots=True)
class _Delta:
    """A delta that can still grow."""

    message: v1.GenerateResponse
    size: int


class Outbox:
    """Messages waiting to be read, in order."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._messages: list[v1.GenerateResponse] = []
        self._growing: dict[int, _Delta] = {}  # by index of the completion
        self._closed = False
        self._error: Exception | None = None
        self._news = asyncio.Event()

    @property
    def closed(self) -> bool:
        """Whether nothing more will come."""
        return self._closed

    def put(self, message: v1.GenerateResponse) -> None:
        """Add a message that nothing may join."""
        self._messages.append(message)
        self._account(message.ByteSize())

    def put_token(self, index: int, token: v1.Token) -> None:
        """Add a token of completion `index`."""
        size = token_size(token)
        delta = self._growing.get(index)
        if delta is None or delta.size + size > MESSAGE_BYTES:
            delta = self._start(index)
        delta.message.delta.tokens.append(token)
        delta.size += size
        self._account(size)

    def put_tail(self, index: int, text: str) -> None:
        """Add text that belongs to the last token of completion `index`, even if that is read already."""
        delta = self._growing.get(index) or self._start(index)
        if delta.message.delta.tokens:
            delta.message.delta.tokens[-1].text += text
        else:
            delta.message.delta.text = text
        self._account(len(text))

    def close(self, error: Exception | None = None) -> None:
        """Say that nothing more comes: the end, or, after what waits, `error`. The first call counts."""
        if not self._closed:
            self._closed, self._error = True, error
            self._news.set()

    def discard(self) -> None:
        """Forget everything: nobody reads any more."""
        self.close()
        self._messages, self._growing = [], {}

    async def take(self) -> Sequence[v1.GenerateResponse]:
        """Everything that waits, or the next that comes; empty at the end.

        Raises:
            Exception: what `close` was told, once everything is taken.
        """
        await self._news.wait()
        messages = self._messages
        if not messages and self._error is not None:
            raise self._error
        self._messages, self._growing, self._bytes = [], {}, 0
        if not self._closed:
            self._news.clear()
        for message in messages:
            if message.delta.tokens:
                message.delta.text = "".join(token.text for token in message.delta.tokens)
        return messages

    def _start(self, index: int) -> _Delta:
        delta = _Delta(v1.GenerateResponse(delta=v1.Delta(index=index)), 0)
        self._messages.append(delta.message)
        self._growing[index] = delta
        return delta

    def _account(self, size: int) -> None:
        self._bytes += size
        self._news.set()
        if self._bytes > self._max_bytes:
            self._messages, self._growing = [], {}
            rule = f"over {self._max_bytes} bytes of it are unread; read faster, or ask for less per token"
            self.close(Backlog(f"the stream is not read: {rule}"))


def token_size(token: v1.Token) -> int:
    """Bytes of a token in a message, roughly and at least: quick to tell, for bounds."""
    return 32 + 2 * len(token.text.encode()) + 16 * len(token.top_logprobs)
