"""A gRPC server from start to end: it listens while the model loads, serves, drains, and stops."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from cutaway.v1 import inference_pb2 as v1
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from cutaway_server.config import Config
from cutaway_server.engine.build import EngineFacts
from cutaway_server.errors import Draining, EngineFailed
from cutaway_server.service.desk import Backend, Desk
from cutaway_server.service.health import Health, first_of
from cutaway_server.service.inference import Inference, Served
from cutaway_server.service.methods import methods_of
from cutaway_server.service.metrics import Metrics
from cutaway_server.service.reflection import Reflection
from cutaway_server.service.workers import Workers
from cutaway_server.text.tokenizer import TextModel

log = logging.getLogger(__name__)

INFERENCE = v1.DESCRIPTOR.services_by_name["Inference"]
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
FAREWELL_SECONDS = 2.0  # for the last messages of streams that are over


class ListenError(Exception):
    """The address cannot be listened on."""


class Server:
    """The service's parts, put together. Belongs to the event loop it is made on."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._workers = Workers(config.tokenizer_threads, config.max_running + config.max_queued)
        self.desk = Desk(asyncio.get_running_loop())
        self._inference = Inference(self.desk, self._workers, config)
        self._health = Health(("", INFERENCE.full_name))
        self.metrics = Metrics(config)
        self._grpc = grpc.aio.server(interceptors=[self.metrics.calls], options=_options(config))
        reflection = Reflection(service.full_name for service in (INFERENCE, HEALTH, REFLECTION))
        parts = ((INFERENCE, self._inference), (HEALTH, self._health), (REFLECTION, reflection))
        self._grpc.add_generic_rpc_handlers([methods_of(service, part) for service, part in parts])

    async def listen(self) -> str:
        """Take the port and answer, NOT_SERVING for now. The address, with the port that was picked.

        Raises:
            ListenError: the address is taken or not ours.
        """
        host, _, port = self._config.listen.rpartition(":")
        with _listening("--listen", self._config.listen):
            _try(host, int(port))
            bound = self._grpc.add_insecure_port(self._config.listen)
        with _listening("--metrics-listen", self._config.metrics_listen):
            self.metrics.listen()
        await self._health.tell(serving=False)
        await self._grpc.start()
        return f"{host}:{bound}"

    async def serve(self, backend: Backend, facts: EngineFacts, text: TextModel) -> None:
        """Take requests from now on."""
        self.desk.connect(backend)
        self._inference.served = Served(self._config.name, facts, text)
        await self._tell(serving=True)

    async def drain(self, *cuts: asyncio.Event) -> None:
        """Take no more requests; let those that run finish, until the drain timeout or one of `cuts`."""
        await self._tell(serving=False)
        self.desk.refuse(Draining("the server is going down"))
        await first_of(self.desk.quiet(), *(cut.wait() for cut in cuts), timeout=self._config.drain_timeout)

    async def end(self, error: Draining | EngineFailed) -> None:
        """End what still runs, and whatever comes, with `error`."""
        self.desk.refuse(error)
        self.desk.end_all(error)
        await self._tell(serving=False)

    async def stop(self) -> None:
        """Close: calls that are over get a moment to say so."""
        self._health.end_watches()
        await self._grpc.stop(FAREWELL_SECONDS)
        self._workers.stop()
        await self.metrics.stop()

    async def _tell(self, *, serving: bool) -> None:
        self.metrics.service.ready = serving
        await self._health.tell(serving=serving)


@contextmanager
def _listening(option: str, address: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ListenError(f"{option}: {address!r} cannot be listened on: {why}") from None


def _try(host: str, port: int) -> None:
    """Bind the address for a moment: gRPC does not tell why it cannot.

    Raises:
        OSError: it cannot be bound.
    """
    family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are no hindrance
        probe.bind(address)


def _options(config: Config) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # two servers on one port would share its calls, silently
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", 30_000),  # finds clients whose machines are gone
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]
