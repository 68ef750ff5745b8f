"""A gRPC server from start to end: it listens while the model loads, serves, drains, and stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine

import grpc
from cutaway.v1 import inference_pb2 as v1
from cutaway.v1 import inference_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]  # the stubs lack it
from grpc_reflection.v1alpha import reflection

from cutaway_server.config import Config
from cutaway_server.engine.build import EngineFacts
from cutaway_server.errors import Draining, EngineFailed
from cutaway_server.service.desk import Backend, Desk
from cutaway_server.service.inference import Inference, Served
from cutaway_server.service.workers import Workers
from cutaway_server.text.tokenizer import TextModel

log = logging.getLogger(__name__)

INFERENCE = v1.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
FAREWELL_SECONDS = 2.0  # for the last messages of streams that are over


class ListenError(Exception):
    """The address cannot be listened on."""


class Server:
    """The service's parts, put together. Belongs to the event loop it is made on."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._workers = Workers(config.tokenizer_threads, config.max_queued)
        self.desk = Desk(asyncio.get_running_loop())
        self._inference = Inference(self.desk, self._workers, config)
        self._health = health.HealthServicer()
        self._grpc = grpc.aio.server(options=_options(config))
        inference_pb2_grpc.add_InferenceServicer_to_server(self._inference, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (INFERENCE, HEALTH, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)

    async def listen(self) -> str:
        """Take the port and answer, NOT_SERVING for now. The address, with the port that was picked.

        Raises:
            ListenError: the address is taken or not ours.
        """
        host, _, _ = self._config.listen.rpartition(":")
        try:
            port = self._grpc.add_insecure_port(self._config.listen)
        except RuntimeError as error:
            raise ListenError(f"--listen: {self._config.listen!r} cannot be listened on: {error}") from None
        await self._tell_health(serving=False)
        await self._grpc.start()
        return f"{host}:{port}"

    async def serve(self, backend: Backend, facts: EngineFacts, text: TextModel) -> None:
        """Take requests from now on."""
        self.desk.connect(backend)
        self._inference.served = Served(self._config.name, facts, text)
        await self._tell_health(serving=True)

    async def drain(self, *cuts: asyncio.Event) -> None:
        """Take no more requests; let those that run finish, until the drain timeout or one of `cuts`."""
        await self._tell_health(serving=False)
        self.desk.refuse(Draining("the server is going down"))
        await first_of(self.desk.quiet(), *(cut.wait() for cut in cuts), timeout=self._config.drain_timeout)

    async def end(self, error: Draining | EngineFailed) -> None:
        """End what still runs, and whatever comes, with `error`."""
        self.desk.refuse(error)
        self.desk.end_all(error)
        await self._tell_health(serving=False)

    async def stop(self) -> None:
        """Close: streams that are over get a moment to say so."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.desk.quiet(), FAREWELL_SECONDS)
        await self._grpc.stop(None)
        self._workers.stop()

    async def _tell_health(self, *, serving: bool) -> None:
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", INFERENCE):
            await self._health.set(name, state)


def _options(config: Config) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # two servers on one port would share its calls, silently
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", 30_000),  # finds clients whose machines are gone
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]


async def first_of(*waits: Coroutine[object, object, object], timeout: float | None = None) -> None:
    """Wait until one of `waits` is over, at most `timeout` seconds."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
