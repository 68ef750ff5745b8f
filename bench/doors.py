"""Ways into servers: our gRPC, and the HTTP of vLLM (OpenAI's completions)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from cutaway.v1 import inference_pb2 as pb
from replay import Arrivals, RequestError
from workload import Ask

# One connection for all requests, that no other door shares, and no proxy between.
CHANNEL = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
GENERATE = "/cutaway.v1.Inference/Generate"


@dataclass(slots=True)
class GrpcDoor:
    """Our own server. Messages are kept as bytes while the clock runs; `AsyncClient` takes about 1.5 x the CPU time."""

    address: str
    prefix_caching: bool = False
    _channel: grpc.aio.Channel | None = None

    async def open(self) -> None:
        """Connect."""
        self._channel = grpc.aio.insecure_channel(self.address, options=CHANNEL)
        await self._channel.channel_ready()

    def written(self, ask: Ask) -> bytes:
        """A greedy GenerateRequest that goes on past end tokens."""
        sampling = pb.SamplingParams(temperature=0, max_tokens=ask.output, ignore_eos=True)
        return pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=ask.prompt), sampling=sampling, prefix_caching=self.prefix_caching
        ).SerializeToString()

    async def send(self, request: bytes, arrivals: Arrivals) -> None:
        """Generate."""
        assert self._channel is not None
        try:
            async for message in self._channel.unary_stream(GENERATE, bytes, bytes)(request):
                arrivals.append((time.perf_counter(), message))
        except grpc.aio.AioRpcError as error:
            raise RequestError(f"{error.code().name}: {error.details()}") from None

    def read(self, arrivals: Arrivals) -> tuple[list[float], int]:
        """The deltas."""
        times, tokens = [], 0
        for at, message in arrivals:
            count = len(pb.GenerateResponse.FromString(message).delta.tokens)
            if count:
                times.append(at)
                tokens += count
        return times, tokens

    async def close(self) -> None:
        """Disconnect."""
        if self._channel is not None:
            await self._channel.close(None)


@dataclass(slots=True)
class HttpDoor:
    """A server that streams JSON as server-sent events over HTTP/1.1; a connection for each request."""

    host: str
    port: int
    path: str = field(init=False, default="/")

    async def open(self) -> None:
        """Nothing: each request connects."""

    async def close(self) -> None:
        """Nothing: each request disconnects."""

    def fields(self, ask: Ask) -> dict[str, object]:
        """The request's JSON."""
        raise NotImplementedError

    def written(self, ask: Ask) -> bytes:
        """Head and body."""
        body = json.dumps(self.fields(ask)).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body

    async def send(self, request: bytes, arrivals: Arrivals) -> None:
        """Post, and take the chunks of the answer."""
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            try:
                writer.write(request)
                async for chunk in _chunks(reader):
                    arrivals.append((time.perf_counter(), chunk))
            finally:
                writer.close()
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise RequestError(f"{type(error).__name__}: {error}") from None


class OpenAiDoor(HttpDoor):
    """vLLM's server; the model is served under the name "m"."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self.path = "/v1/completions"

    def fields(self, ask: Ask) -> dict[str, object]:
        """A greedy completion that goes on past end tokens."""
        fields = {"model": "m", "prompt": ask.prompt, "max_tokens": ask.output, "temperature": 0, "stream": True}
        return {**fields, "ignore_eos": True, "stream_options": {"include_usage": True}}

    def read(self, arrivals: Arrivals) -> tuple[list[float], int]:
        """Events with choices bring tokens; the last tells how many there were."""
        times, tokens = [], 0
        for at, event in _events(arrivals):
            if event.get("choices"):
                times.append(at)
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        return times, tokens


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The body of a chunked HTTP answer, as it comes; ValueError for another answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    if not head.startswith("HTTP/1.1 200") or "chunked" not in head.lower():
        raise ValueError(head.splitlines()[0] + ": " + (await reader.read(300)).decode(errors="replace"))
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]


def _events(arrivals: Arrivals) -> Iterator[tuple[float, dict[str, Any]]]:
    """The events in these chunks, each with the time at which its end came."""
    rest = b""
    for at, chunk in arrivals:
        *whole, rest = (rest + chunk).split(b"\n\n")
        for event in whole:
            data = event.removeprefix(b"data:").strip()
            if data.startswith(b"{"):
                found = json.loads(data)
                if "error" in found:
                    raise RequestError(str(found["error"])[:200])
                yield at, found
