"""What one request's reader has not read yet: it grows with what is unread, never past a bound, and blocks nobody.

Tokens of one completion join its last unread delta until that is big enough, so a slow reader gets fewer and larger
messages and a quick one gets each token at once. Used on the event loop only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from cutaway.v1 import inference_pb2 as v1
from cutaway.v1 import tensor_pb2
from numpy.typing import NDArray

from cutaway_server.service.status import Backlog
from cutaway_server.service.tensors import CHUNK_BYTES, chunks

MESSAGE_BYTES = 2**20  # stock clients refuse messages over 4 MiB


@dataclass(frozen=True, slots=True)
class Shared:
    """A delta that several completions send alike. `size`: its bytes, roughly and at least."""

    delta: v1.Delta
    size: int


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A message that waits."""

    message: v1.GenerateResponse
    size: int


@dataclass(slots=True)
class _WaitingTokens:
    """A delta that may still grow, and is made when it is sent."""

    index: int
    tokens: list[v1.Token] = field(default_factory=list)
    size: int = 0

    @property
    def message(self) -> v1.GenerateResponse:
        text = "".join([token.text for token in self.tokens])
        return v1.GenerateResponse(delta=v1.Delta(index=self.index, text=text, tokens=self.tokens))


@dataclass(frozen=True, slots=True)
class _WaitingCopy:
    """A delta that is made only when it is sent: `tail` joins its last token."""

    shared: v1.Delta
    size: int
    index: int
    tail: str

    @property
    def message(self) -> v1.GenerateResponse:
        message = v1.GenerateResponse(delta=self.shared)
        message.delta.index = self.index
        message.delta.tokens[-1].text += self.tail
        message.delta.text = "".join([token.text for token in message.delta.tokens])
        return message


class _WaitingTensor:
    """A tensor whose bytes are put into messages only as they are sent."""

    def __init__(self, header: tensor_pb2.TensorHeader, data: NDArray[np.generic]) -> None:
        self.size = header.bytes + header.ByteSize()
        self._header: tensor_pb2.TensorHeader | None = header
        self._chunks = chunks(header.id, data)
        self._left = header.bytes

    @property
    def next_size(self) -> int:
        """Bytes of the next message, roughly."""
        return min(self._left, CHUNK_BYTES) if self._header is None else self._header.ByteSize()

    @property
    def done(self) -> bool:
        """Whether everything was taken."""
        return self._header is None and not self._left

    def take(self) -> v1.GenerateResponse:
        """The next message."""
        if self._header is not None:
            header, self._header = self._header, None
            return v1.GenerateResponse(tensor=header)
        chunk = next(self._chunks)
        self._left -= len(chunk.data)
        return v1.GenerateResponse(chunk=chunk)


class Outbox:
    """Messages waiting to be read, in order."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._waiting: deque[_Waiting | _WaitingTokens | _WaitingCopy | _WaitingTensor] = deque()
        self._growing: dict[int, _WaitingTokens] = {}  # by index of the completion
        self._closed = False
        self._error: Exception | None = None
        self._news = asyncio.Event()

    @property
    def closed(self) -> bool:
        """Whether nothing more will come."""
        return self._closed

    def put(self, message: v1.GenerateResponse) -> None:
        """Add a message that nothing may join."""
        self._add(_Waiting(message, message.ByteSize()))

    def put_shared(self, index: int, shared: Shared, tail: str = "") -> None:
        """Add a delta for completion `index` that nothing may join, with `tail` after its last token's text."""
        self._add(_WaitingCopy(shared.delta, shared.size + len(tail), index, tail))

    def put_token(self, index: int, token: v1.Token) -> None:
        """Add a token of completion `index`."""
        size = token_size(token)
        delta = self._growing.get(index)
        if delta is None or delta.size + size > MESSAGE_BYTES:
            delta = self._growing[index] = _WaitingTokens(index)
            self._waiting.append(delta)
        delta.tokens.append(token)
        delta.size += size
        self._account(size)

    def put_tensor(self, header: tensor_pb2.TensorHeader, data: NDArray[np.generic]) -> None:
        """Add a tensor. Tokens that come later are not sent before it."""
        self._growing.clear()
        self._add(_WaitingTensor(header, data))

    def close(self, error: Exception | None = None) -> None:
        """Say that nothing more comes: the end, or, after what waits, `error`. The first call counts."""
        if not self._closed:
            self._closed, self._error = True, error
            self._news.set()

    def discard(self) -> None:
        """Forget everything: nobody reads any more."""
        self.close()
        self._forget()

    async def take(self) -> Sequence[v1.GenerateResponse]:
        """What waits, up to about `MESSAGE_BYTES` at once, or the next that comes; empty at the end.

        Raises:
            Exception: what `close` was told, once everything is taken.
        """
        await self._news.wait()
        if not self._waiting and self._error is not None:
            raise self._error
        messages: list[v1.GenerateResponse] = []
        size = 0
        while self._waiting and (size == 0 or size + _next_size(self._waiting[0]) <= MESSAGE_BYTES):
            taken = self._waiting[0]
            size += _next_size(taken)
            if isinstance(taken, _WaitingTensor):
                messages.append(taken.take())
                if taken.done:
                    self._waiting.popleft()
                continue
            self._waiting.popleft()
            if isinstance(taken, _WaitingTokens) and self._growing.get(taken.index) is taken:
                del self._growing[taken.index]
            messages.append(taken.message)
        self._bytes -= size
        if not self._waiting and not self._closed:
            self._news.clear()
        return messages

    def _add(self, waiting: _Waiting | _WaitingCopy | _WaitingTensor) -> None:
        self._waiting.append(waiting)
        self._account(waiting.size)

    def _account(self, size: int) -> None:
        self._bytes += size
        self._news.set()
        if self._bytes > self._max_bytes:
            self._forget()
            rule = f"over {self._max_bytes} bytes of it are unread; read faster, or ask for less per token"
            self.close(Backlog(f"the stream is not read: {rule}"))

    def _forget(self) -> None:
        self._waiting.clear()
        self._growing.clear()


def _next_size(waiting: _Waiting | _WaitingTokens | _WaitingCopy | _WaitingTensor) -> int:
    return waiting.next_size if isinstance(waiting, _WaitingTensor) else waiting.size


def token_size(token: v1.Token) -> int:
    """Bytes of a token in a message, roughly and at least: quick to tell, for bounds."""
    return 32 + 2 * len(token.text.encode()) + 16 * len(token.top_logprobs)


def parts(tokens: Iterable[v1.Token]) -> Iterator[list[v1.Token]]:
    """Runs of tokens that each fit a message."""
    part: list[v1.Token] = []
    size = 0
    for token in tokens:
        size += token_size(token)
        if part and size > MESSAGE_BYTES:
            yield part
            part, size = [], token_size(token)
        part.append(token)
    if part:
        yield part
