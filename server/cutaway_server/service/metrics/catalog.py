"""Every metric, in the order and under the headings of docs/metrics.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cutaway_server.service.metrics.cache import CACHE
from cutaway_server.service.metrics.introspection import CALLS, INSIDE
from cutaway_server.service.metrics.memory import MEMORY
from cutaway_server.service.metrics.process import BUILD, SERVER, Service
from cutaway_server.service.metrics.requests import REQUESTS
from cutaway_server.service.metrics.sources import Sources
from cutaway_server.service.metrics.spec import Spec
from cutaway_server.service.metrics.tokens import LATENCY, THROUGHPUT
from cutaway_server.service.metrics.vllm import VLLM

ENGINE: tuple[Spec[Sources], ...] = (*REQUESTS, *THROUGHPUT, *LATENCY, *CACHE, *MEMORY, *INSIDE, *BUILD)
SERVICE: tuple[Spec[Service], ...] = (*SERVER, *CALLS)

CATALOG: Mapping[str, tuple[Spec[Any], ...]] = {
    "Requests": REQUESTS,
    "Throughput": THROUGHPUT,
    "Latency": LATENCY,
    "KV cache": CACHE,
    "Memory": MEMORY,
    "Introspection": (*CALLS, *INSIDE),
    "Server": (*SERVER, *BUILD),
    "vLLM's names": VLLM,
}
