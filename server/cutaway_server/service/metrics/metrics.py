"""All metrics of one server: its registry, what they are read from, and the listener they are served on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import cast
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, make_wsgi_app

from cutaway_server.config import Config
from cutaway_server.engine.build import EngineFacts
from cutaway_server.engine.thread import EngineThread
from cutaway_server.service.metrics.catalog import ENGINE, SERVICE
from cutaway_server.service.metrics.collector import SpecCollector
from cutaway_server.service.metrics.lag import LoopLag
from cutaway_server.service.metrics.listener import HttpListener
from cutaway_server.service.metrics.process import Service
from cutaway_server.service.metrics.rpcs import CountedCalls
from cutaway_server.service.metrics.sources import Sources
from cutaway_server.service.metrics.vllm import VLLM

log = logging.getLogger(__name__)


def _plain(registry: CollectorRegistry) -> WSGIApplication:
    """The registry in Prometheus's text format, whatever is preferred: OpenMetrics says no more, in twice the time."""
    application = make_wsgi_app(registry, disable_compression=True)

    def plain(environ: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        return cast(Iterable[bytes], application({**environ, "HTTP_ACCEPT": "text/plain"}, respond))

    return plain


class Metrics:
    """Counts calls from the start, and shows an engine once there is one. Belongs to the event loop it is made on."""

    def __init__(self, config: Config, capture_bytes: Callable[[], int]) -> None:
        """`capture_bytes` tells how many bytes of captures are held for requests at work."""
        self._config = config
        self._sources: Sources | None = None
        self._listener: HttpListener | None = None
        self.calls = CountedCalls()
        self.service = Service(self.calls, LoopLag(), capture_bytes, config.capture_memory)
        self.registry = self._registry()

    @property
    def address(self) -> str | None:
        """Where they are served, with the port that was picked; None if nowhere."""
        return None if self._listener is None else self._listener.address

    def listen(self, beside: Mapping[str, WSGIApplication]) -> None:
        """Serve them on `--metrics-listen`, unless that is none, and the paths of `beside` with them.

        Raises:
            OSError: the address is taken or not ours.
        """
        if self._config.metrics_listen is None:
            return
        host, _, port = self._config.metrics_listen.rpartition(":")
        self._listener = HttpListener(host, int(port), {"/metrics": _plain(self.registry), **beside})
        log.info("metrics on http://%s/metrics", self._listener.address)

    def watch(self, thread: EngineThread, facts: EngineFacts) -> None:
        """Show this engine from now on."""
        self._sources = Sources.of(self._config, facts, thread)

    async def stop(self) -> None:
        """Close the listener and ask the loop for nothing more."""
        self.service.lag.stop()
        if self._listener is not None:
            await asyncio.to_thread(self._listener.stop)

    def _registry(self) -> CollectorRegistry:
        registry = CollectorRegistry()
        labels = {"model_name": self._config.name, "engine": "0"}
        specs = (*ENGINE, *VLLM) if self._config.metrics_compat == "vllm" else ENGINE
        registry.register(SpecCollector(specs, lambda: self._sources, labels))
        registry.register(SpecCollector(SERVICE, lambda: self.service, labels))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        return registry
