"""The asynchronous client: the same calls as `Client`, awaited, on the running event loop."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

import grpc
import grpc.aio
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from cutaway import replies, requests
from cutaway.aio_inspecting import AsyncInspecting
from cutaway.channel import DEFAULT_ADDRESS, MAX_RETRIES, channel_options, check_address, seconds
from cutaway.client import HEALTH_CHECK
from cutaway.errors import Cancelled
from cutaway.keeping import AsyncKeeping
from cutaway.machine_aio import AsyncMachineCalls
from cutaway.options import GenerateOptions, TokenizeOptions
from cutaway.results import Answer, Detokenized, Health, Model, Token, Tokenized
from cutaway.security import File, security
from cutaway.status import error_of
from cutaway.sweeping import AsyncSweeping
from cutaway.transcript import Transcript
from cutaway.v1 import inference_pb2 as pb
from cutaway.v1.inference_pb2_grpc import InferenceStub
from cutaway.v1.introspection_pb2_grpc import IntrospectionStub
from cutaway.weighing import AsyncWeighing

if TYPE_CHECKING:
    from cutaway.transcript import Response
    from cutaway.v1.inference_pb2_grpc import InferenceAsyncStub
    from cutaway.v1.introspection_pb2_grpc import IntrospectionAsyncStub

    Asked = TypeVar("Asked")
    Told = TypeVar("Told")
    Streamed = TypeVar("Streamed", bound=Response)


class AsyncStream(Transcript):
    """The tokens of one request, as they are made: `async for token in stream`.

    Leaving the loop early, closing the stream, cancelling the task that reads it or dropping it cancels the request
    on the server. `await anext(stream)` takes one token and leaves the stream open.
    """

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[Asked, Streamed],
        request_id: str,
        address: str,
    ) -> None:
        super().__init__(request_id)
        self._call = call
        weakref.finalize(self, cancel_soon, asyncio.get_running_loop(), call).atexit = False
        self._messages = aiter(call)
        self._address = address

    async def __aiter__(self) -> AsyncIterator[Token]:
        """Every token from here to the end; cancels when it is left early."""
        try:
            while True:
                try:
                    token = await anext(self)
                except StopAsyncIteration:
                    return
                yield token
        finally:
            await self.close()

    async def __anext__(self) -> Token:
        """The next token.

        Raises:
            StopAsyncIteration: the last message was received.
            CutawayError: the request failed, or the stream was closed before its end.
        """
        while not self._pending:
            await self._receive()
        return self._pending.popleft()

    async def _receive(self) -> None:
        try:
            self._take(await anext(self._messages))
        except StopAsyncIteration:
            if self.completions is None:
                raise self._ended_early() from None
            raise
        except grpc.RpcError as error:
            raise error_of(error, self._address) from error
        except asyncio.CancelledError as error:
            raise_unless_cancelled(error)

    async def close(self) -> None:
        """Cancel the request, unless it has ended; what was received and not read is dropped."""
        self._closed = True
        self._pending.clear()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def cancel_soon(loop: asyncio.AbstractEventLoop, call: grpc.aio.RpcContext) -> None:
    """Cancel a call whose stream was dropped, in whichever thread the collector ran."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(call.cancel)


def raise_unless_cancelled(error: asyncio.CancelledError) -> None:
    """Raise `Cancelled`, but let the reader's own cancellation through: gRPC raises CancelledError for both."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise error
    raise Cancelled("the call was cancelled") from error


class AsyncCalls:
    """How the calls that look inside are made."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self.tokenize = client.tokenize
        self.detokenize = client.detokenize

    @property
    def introspection(self) -> IntrospectionAsyncStub:
        """The service's calls, on the client's channel."""
        return IntrospectionStub(self._client._open_channel())

    async def ask(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Asked, Told], request: Asked, timeout: float | None
    ) -> Told:
        """The answer to a call."""
        return await self._client._ask(method, request, timeout)

    async def send(
        self, method: grpc.aio.StreamUnaryMultiCallable[Asked, Told], messages: Iterator[Asked], timeout: float | None
    ) -> Told:
        """The answer to a stream of messages."""
        client = self._client
        try:
            return await method(messages, timeout=client._seconds(timeout), metadata=client._security.metadata)
        except grpc.RpcError as error:
            raise error_of(error, client.address) from error
        except asyncio.CancelledError as error:
            raise_unless_cancelled(error)
            raise

    async def each(
        self, method: grpc.aio.UnaryStreamMultiCallable[Asked, Told], request: Asked, timeout: float | None
    ) -> AsyncIterator[Told]:
        """The messages of a stream that is no request's."""
        client = self._client
        try:
            async for message in method(request, timeout=client._seconds(timeout), metadata=client._security.metadata):
                yield message
        except grpc.RpcError as error:
            raise error_of(error, client.address) from error
        except asyncio.CancelledError as error:
            raise_unless_cancelled(error)

    async def read(
        self, method: grpc.aio.UnaryStreamMultiCallable[Asked, Streamed], request: Asked, timeout: float | None
    ) -> AsyncStream:
        """Everything that a stream brings."""
        client = self._client
        call = method(request, timeout=client._seconds(timeout), metadata=client._security.metadata)
        async with AsyncStream(call, "", client.address) as stream:
            async for _ in stream:
                pass
        return stream


class AsyncClient(AsyncInspecting, AsyncKeeping, AsyncSweeping, AsyncWeighing, AsyncMachineCalls):
    """A connection to one server, for one event loop; `async with AsyncClient(...) as client`. See `Client`."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: bool | File | None = None,
        cert: tuple[File, File] | None = None,
        timeout: float | None = None,
        retries: int = MAX_RETRIES,
    ) -> None:
        self.address = check_address(address)
        self.timeout = timeout
        self._options = channel_options(address, retries, streams=True)
        self._security = security(address, api_key, tls, cert)
        self._channel: grpc.aio.Channel | None = None
        self._inference: InferenceAsyncStub | None = None
        self._closed = False
        self._calls = AsyncCalls(self)

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Stream the completions of a prompt, of `token_ids=` or of `messages=`; iterate with `async for`."""
        request = requests.generate_request(prompt, options)
        call = self._stub().Generate(
            request, timeout=self._seconds(options.get("timeout")), metadata=self._security.metadata
        )
        return AsyncStream(call, request.request_id, self.address)

    def fork(
        self, request_id: str, /, *, at: int | None = None, index: int = 0, **options: Unpack[GenerateOptions]
    ) -> AsyncStream:
        """Continue a completion that runs, or has ended and is kept, after the first `at` tokens (default: all)."""
        request = requests.fork_request(request_id, at, index, options)
        call = self._calls.introspection.Fork(
            request, timeout=self._seconds(options.get("timeout")), metadata=self._security.metadata
        )
        return AsyncStream(call, request.generate.request_id, self.address)

    async def complete(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Answer:
        """Wait for the completions of a prompt, of `token_ids=` or of `messages=`."""
        async with self.generate(prompt, **options) as stream:
            async for _ in stream:
                pass
        return stream.answer()

    async def tokenize(self, text: str | None = None, **options: Unpack[TokenizeOptions]) -> Tokenized:
        """Turn a text or `messages=` into tokens; `merges=True` also tells how byte-pair encoding got there."""
        request = requests.tokenize_request(text, options)
        return replies.tokenized(await self._ask(self._stub().Tokenize, request, options.get("timeout")), text)

    async def detokenize(
        self, ids: Iterable[int], *, skip_special_tokens: bool | None = None, timeout: float | None = None
    ) -> Detokenized:
        """Turn tokens into text and bytes."""
        request = requests.detokenize_request(ids, skip_special_tokens)
        return replies.detokenized(await self._ask(self._stub().Detokenize, request, timeout))

    async def model(self, *, timeout: float | None = None) -> Model:
        """Tell what is served: shape, limits, versions, special tokens, defaults."""
        return replies.model(await self._ask(self._stub().GetModel, pb.GetModelRequest(), timeout))

    async def abort(self, request_id: str, *, timeout: float | None = None) -> None:
        """End a queued or running request; its stream ends with finish reason "abort".

        Raises:
            NotFound: no such request.
        """
        await self._ask(self._stub().Abort, pb.AbortRequest(request_id=request_id), timeout)

    async def health(self, service: str = "", *, timeout: float | None = None) -> Health:
        """Ask the server whether it serves; it does once it has warmed up, until it drains."""
        # Wrappers have the same bytes as grpc.health.v1's messages: one text, one number, each field 1.
        check = self._open_channel().unary_unary(
            HEALTH_CHECK, request_serializer=StringValue.SerializeToString, response_deserializer=Int32Value.FromString
        )
        return Health((await self._ask(check, StringValue(value=service), timeout)).value)

    async def close(self) -> None:
        """Close the connection; running streams are cancelled."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Asked, Told], request: Asked, timeout: float | None
    ) -> Told:
        try:
            return await method(request, timeout=self._seconds(timeout), metadata=self._security.metadata)
        except grpc.RpcError as error:
            raise error_of(error, self.address) from error
        except asyncio.CancelledError as error:
            raise_unless_cancelled(error)
            raise

    @property
    def _proof(self) -> tuple[tuple[str, str], ...]:
        return self._security.metadata

    def _seconds(self, timeout: float | None) -> float | None:
        return seconds(timeout, self.timeout)

    def _stub(self) -> InferenceAsyncStub:
        if self._closed or self._inference is None:
            self._inference = InferenceStub(self._open_channel())
        return self._inference

    def _open_channel(self) -> grpc.aio.Channel:
        """The channel, opened by the first call: a channel belongs to the event loop that it is opened on."""
        if self._closed:
            raise RuntimeError("this client is closed")
        if self._channel is None:
            proof = self._security.channel
            if proof is None:
                self._channel = grpc.aio.insecure_channel(self.address, options=self._options)
            else:
                self._channel = grpc.aio.secure_channel(self.address, proof, options=self._options)
        return self._channel
