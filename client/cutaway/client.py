"""The synchronous client: one connection, safe to share between threads."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from cutaway import replies, requests
from cutaway.attempts import Attempts
from cutaway.channel import DEFAULT_ADDRESS, MAX_RETRIES, channel_options, check_address, seconds
from cutaway.inspecting import Inspecting
from cutaway.interrupt import cancelling
from cutaway.keeping import Keeping
from cutaway.machine_calls import MachineCalls
from cutaway.options import GenerateOptions, TokenizeOptions
from cutaway.results import Answer, Detokenized, Health, Model, Token, Tokenized
from cutaway.security import File, security
from cutaway.status import error_of
from cutaway.sweeping import Sweeping
from cutaway.transcript import Transcript
from cutaway.v1 import inference_pb2 as pb
from cutaway.v1.inference_pb2_grpc import InferenceStub
from cutaway.v1.introspection_pb2_grpc import IntrospectionStub
from cutaway.weighing import Weighing

if TYPE_CHECKING:
    from cutaway.attempts import Call
    from cutaway.transcript import Response

    Asked = TypeVar("Asked")
    Told = TypeVar("Told")
    Streamed = TypeVar("Streamed", bound=Response)

HEALTH_CHECK = "/grpc.health.v1.Health/Check"


class Stream(Transcript):
    """The tokens of one request, as they are made.

    Iterate over it once. Leaving the loop early, closing the stream or dropping it cancels the request on the
    server. `next(stream)` takes one token and leaves the stream open.
    """

    def __init__(self, attempts: Attempts, request_id: str, address: str) -> None:
        super().__init__(request_id)
        self._messages = attempts
        self._address = address
        self._cancel = weakref.finalize(self, attempts.cancel)

    def __iter__(self) -> Iterator[Token]:
        """Every token from here to the end; cancels when it is left early."""
        try:
            while True:
                try:
                    token = next(self)
                except StopIteration:
                    return
                yield token
        finally:
            self.close()

    def __next__(self) -> Token:
        """The next token.

        Raises:
            StopIteration: the last message was received.
            CutawayError: the request failed, or the stream was closed before its end.
        """
        while not self._pending:
            self._receive()
        return self._pending.popleft()

    def _receive(self) -> None:
        try:
            with cancelling(self._cancel):
                message = next(self._messages)
            self._take(message)
        except StopIteration:
            if self.completions is None:
                raise self._ended_early() from None
            raise
        except grpc.RpcError as error:
            if self._closed:  # perhaps in the pause after an attempt that failed
                raise self._ended_early() from error
            raise error_of(error, self._address) from error

    def close(self) -> None:
        """Cancel the request, unless it has ended; what was received and not read is dropped."""
        self._closed = True
        self._pending.clear()
        self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Calls:
    """How the calls that look inside are made."""

    def __init__(self, client: Client, channel: grpc.Channel) -> None:
        self._client = client
        self.introspection = IntrospectionStub(channel)
        self.ask = client._ask
        self.tokenize = client.tokenize
        self.detokenize = client.detokenize

    def send(
        self, method: grpc.StreamUnaryMultiCallable[Asked, Told], messages: Iterator[Asked], timeout: float | None
    ) -> Told:
        """The answer to a stream of messages."""
        client = self._client
        client._check_open()
        try:
            return method(messages, timeout=client._seconds(timeout), metadata=client._metadata)
        except grpc.RpcError as error:
            raise error_of(error, client.address) from error

    def each(
        self, method: grpc.UnaryStreamMultiCallable[Asked, Told], request: Asked, timeout: float | None
    ) -> Iterator[Told]:
        """The messages of a stream that is no request's."""
        client = self._client
        client._check_open()
        try:
            yield from method(request, timeout=client._seconds(timeout), metadata=client._metadata)
        except grpc.RpcError as error:
            raise error_of(error, client.address) from error

    def read(
        self, method: grpc.UnaryStreamMultiCallable[Asked, Streamed], request: Asked, timeout: float | None
    ) -> Transcript:
        """Everything that a stream brings."""
        client = self._client

        def begin(timeout: float | None) -> grpc.CallIterator[Streamed]:
            client._check_open()
            return method(request, timeout=timeout, metadata=client._metadata)

        stream = Stream(Attempts(begin, client._seconds(timeout), client._retries), "", client.address)
        with stream:
            for _ in stream:
                pass
        return stream


class Client(Inspecting, Keeping, Sweeping, Weighing, MachineCalls):
    """A connection to one server: `Client("127.0.0.1:50051")`. Close it, or use it in a `with` block.

    `api_key` says who you are; it is sent over TLS, or within this machine. `tls=True` speaks TLS and trusts the usual
    authorities, `tls="ca.pem"` only those in that file. `cert=("cert.pem", "key.pem")` is shown to servers that ask
    for one. `timeout` is in seconds and holds for each call that names none; None waits for ever. `retries` is how
    often a call is tried again while nobody answers at the address. The network is first used by the first call.

    Raises:
        ValueError: `address` has no port, or another argument cannot be used; the message names it.
        OSError: a file cannot be read.
    """

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
        self._retries = retries
        proof = security(address, api_key, tls, cert)
        self._metadata = proof.metadata
        options = channel_options(address, retries, streams=False)
        if proof.channel is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            self._channel = grpc.secure_channel(address, proof.channel, options=options)
        self._stub = InferenceStub(self._channel)
        self._closed = False
        self._calls = Calls(self, self._channel)

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Stream:
        """Stream the completions of a prompt, of `token_ids=` or of `messages=`; iterate over the tokens."""
        request = requests.generate_request(prompt, options)
        attempts = Attempts(partial(self._begin, request), self._seconds(options.get("timeout")), self._retries)
        return Stream(attempts, request.request_id, self.address)

    def fork(
        self, request_id: str, /, *, at: int | None = None, index: int = 0, **options: Unpack[GenerateOptions]
    ) -> Stream:
        """Continue a completion that runs, or has ended and is kept, after the first `at` tokens (default: all).

        The keyword `request_id` names the new request. Edits of the request forked go on, unless others are given.
        """
        request = requests.fork_request(request_id, at, index, options)

        def begin(timeout: float | None) -> Call:
            self._check_open()
            return self._calls.introspection.Fork(request, timeout=timeout, metadata=self._metadata)

        attempts = Attempts(begin, self._seconds(options.get("timeout")), self._retries)
        return Stream(attempts, request.generate.request_id, self.address)

    def complete(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Answer:
        """Wait for the completions of a prompt, of `token_ids=` or of `messages=`."""
        with self.generate(prompt, **options) as stream:
            for _ in stream:
                pass
        return stream.answer()

    def tokenize(self, text: str | None = None, **options: Unpack[TokenizeOptions]) -> Tokenized:
        """Turn a text or `messages=` into tokens; `merges=True` also tells how byte-pair encoding got there."""
        request = requests.tokenize_request(text, options)
        return replies.tokenized(self._ask(self._stub.Tokenize, request, options.get("timeout")), text)

    def detokenize(
        self, ids: Iterable[int], *, skip_special_tokens: bool | None = None, timeout: float | None = None
    ) -> Detokenized:
        """Turn tokens into text and bytes."""
        request = requests.detokenize_request(ids, skip_special_tokens)
        return replies.detokenized(self._ask(self._stub.Detokenize, request, timeout))

    def model(self, *, timeout: float | None = None) -> Model:
        """Tell what is served: shape, limits, versions, special tokens, defaults."""
        return replies.model(self._ask(self._stub.GetModel, pb.GetModelRequest(), timeout))

    def abort(self, request_id: str, *, timeout: float | None = None) -> None:
        """End a queued or running request; its stream ends with finish reason "abort".

        Raises:
            NotFound: no such request.
        """
        self._ask(self._stub.Abort, pb.AbortRequest(request_id=request_id), timeout)

    def health(self, service: str = "", *, timeout: float | None = None) -> Health:
        """Ask the server whether it serves; it does once it has warmed up, until it drains."""
        # Wrappers have the same bytes as grpc.health.v1's messages: one text, one number, each field 1.
        check = self._channel.unary_unary(
            HEALTH_CHECK, request_serializer=StringValue.SerializeToString, response_deserializer=Int32Value.FromString
        )
        return Health(self._ask(check, StringValue(value=service), timeout).value)

    def close(self) -> None:
        """Close the connection; running streams are cancelled."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, method: grpc.UnaryUnaryMultiCallable[Asked, Told], request: Asked, timeout: float | None) -> Told:
        self._check_open()
        try:
            return method(request, timeout=self._seconds(timeout), metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, self.address) from error

    def _begin(self, request: pb.GenerateRequest, timeout: float | None) -> Call:
        self._check_open()
        return self._stub.Generate(request, timeout=timeout, metadata=self._metadata)

    def _seconds(self, timeout: float | None) -> float | None:
        return seconds(timeout, self.timeout)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this client is closed")
