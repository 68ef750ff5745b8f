"""A gRPC server from start to end: it listens while the model loads, serves, drains, and stops."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from cutaway.v1 import inference_pb2 as v1
from cutaway.v1 import introspection_pb2
from grpc_health.v1 import health_pb2

from cutaway_server.config import Config
from cutaway_server.engine.build import EngineFacts
from cutaway_server.errors import Draining, EngineFailed
from cutaway_server.service import bounds
from cutaway_server.service.access import Gate
from cutaway_server.service.audit import AuditLog
from cutaway_server.service.credentials import CredentialStore
from cutaway_server.service.desk import Backend, Desk
from cutaway_server.service.files import load_files
from cutaway_server.service.forking import Forking
from cutaway_server.service.generation import Generation, Served
from cutaway_server.service.health import Health, first_of
from cutaway_server.service.inference import Inference
from cutaway_server.service.introspection import Introspection
from cutaway_server.service.machine import Machine
from cutaway_server.service.methods import methods_of
from cutaway_server.service.metrics import Metrics
from cutaway_server.service.probes import probes
from cutaway_server.service.putting_aside import PuttingAside
from cutaway_server.service.quotas import Quotas
from cutaway_server.service.reflection import V1, V1ALPHA, Reflection
from cutaway_server.service.shelf import Shelf
from cutaway_server.service.sweeping import Sweeping
from cutaway_server.service.tls import Certificates
from cutaway_server.service.weighing import Weighing
from cutaway_server.service.workers import Workers
from cutaway_server.text.tokenizer import TextModel

log = logging.getLogger(__name__)

INFERENCE = v1.DESCRIPTOR.services_by_name["Inference"]
INTROSPECTION = introspection_pb2.DESCRIPTOR.services_by_name["Introspection"]
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
FAREWELL_SECONDS = 2.0  # for the last messages of streams that are over


class ListenError(Exception):
    """The address cannot be listened on."""


class Server:
    """The service's parts, put together. Belongs to the event loop it is made on."""

    def __init__(self, config: Config) -> None:
        """Read the credentials, certificates, and the operator's vectors.

        Raises:
            CredentialsError, CertificateError, AuditError, ModelError: a file is missing or wrong.
        """
        self._config = config
        self._workers = Workers(config.tokenizer_threads, config.max_running + config.max_queued)
        self.desk = Desk(asyncio.get_running_loop())
        self.quotas = Quotas()
        shelf = Shelf(config.stored_bytes, load_files(Path(config.vectors)) if config.vectors is not None else ())
        self._generation = Generation(self.desk, self._workers, config, self.quotas, shelf)
        self._forking = Forking(self._generation)
        self._machine = Machine(self._generation, self._workers, config)
        self._health = Health(("", INFERENCE.full_name, INTROSPECTION.full_name))
        self.metrics = Metrics(config, lambda: self._generation.held)
        self._credentials = CredentialStore(config.api_keys) if config.api_keys is not None else None
        self._tls = _tls(config)
        self._audit = AuditLog(config.audit_log) if config.audit_log is not None else None
        self._grpc = grpc.aio.server(
            interceptors=[self.metrics.calls, Gate(self._credentials, self._audit, self.quotas)],
            options=bounds.options(config),
            maximum_concurrent_rpcs=bounds.most_calls(config),
        )
        reflection = Reflection([INFERENCE.full_name, INTROSPECTION.full_name, HEALTH.full_name])
        parts = [
            methods_of(INFERENCE, Inference(self.desk, self._workers, config, self._generation)),
            methods_of(
                INTROSPECTION,
                Introspection(self._generation),
                self._machine,
                PuttingAside(shelf, self._workers, self._generation),
                Weighing(self._generation, config),
                Sweeping(self._generation),
                self._forking,
            ),
            methods_of(HEALTH, self._health),
            methods_of(V1ALPHA, reflection),
            methods_of(V1ALPHA, reflection, name=V1),
        ]
        self._grpc.add_generic_rpc_handlers(parts)
        self._probed: grpc.aio.Server | None = None
        self.health_address: str | None = None  # of --health-listen, with the port that was picked

    async def listen(self) -> str:
        """Take the port and answer, NOT_SERVING for now. The address, with the port that was picked.

        Raises:
            ListenError: the address is taken or not ours.
        """
        host, _, port = self._config.listen.rpartition(":")
        with _listening("--listen", self._config.listen):
            _try(host, int(port))
            if self._tls is None:
                bound = self._grpc.add_insecure_port(self._config.listen)
            else:
                bound = self._grpc.add_secure_port(self._config.listen, self._tls.credentials())
        with _listening("--metrics-listen", self._config.metrics_listen):
            self.metrics.listen(probes(asyncio.get_running_loop(), lambda: self.metrics.service.ready))
        await self._health.tell(serving=False)
        await self._listen_for_probes()
        await self._grpc.start()
        return f"{host}:{bound}"

    def reload(self) -> None:
        """Read the credentials again; calls in progress go on."""
        if self._credentials is not None:
            self._credentials.reload()

    async def serve(self, backend: Backend, facts: EngineFacts, text: TextModel) -> None:
        """Take requests from now on."""
        self.desk.connect(backend)
        self._generation.served = Served(facts, text)
        self._machine.connect(backend)
        self._forking.connect(backend)
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
        self._machine.watchers.end(error)
        await self._tell(serving=False)

    async def stop(self) -> None:
        """Close: calls that are over get a moment to say so."""
        self._health.end_watches()
        self._machine.watchers.end(Draining("the server is going down"))
        await self._grpc.stop(FAREWELL_SECONDS)
        if self._probed is not None:
            await self._probed.stop(0)
        self._workers.stop()
        await self.metrics.stop()
        if self._audit is not None:
            await asyncio.to_thread(self._audit.stop)

    async def _listen_for_probes(self) -> None:
        """Serve health, and nothing else, on --health-listen."""
        address = self._config.health_listen
        if address is None:
            return
        host, _, port = address.rpartition(":")
        self._probed = grpc.aio.server(options=bounds.health_options(), maximum_concurrent_rpcs=bounds.HEALTH_CALLS)
        self._probed.add_generic_rpc_handlers([methods_of(HEALTH, self._health)])
        with _listening("--health-listen", address):
            _try(host, int(port))
            self.health_address = f"{host}:{self._probed.add_insecure_port(address)}"
        await self._probed.start()

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


def _tls(config: Config) -> Certificates | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    return Certificates(config.tls_cert, config.tls_key, config.tls_client_ca)
