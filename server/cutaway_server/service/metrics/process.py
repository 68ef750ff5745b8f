"""Metrics of the server itself: calls, the event loop, what was built."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version

import torch

from cutaway_server.service.metrics.lag import LoopLag
from cutaway_server.service.metrics.rpcs import CountedCalls
from cutaway_server.service.metrics.sources import Sources
from cutaway_server.service.metrics.spec import Spec, counter, gauge, histogram, info


@dataclass(slots=True)
class Service:
    """What is known of the server before and beside any engine. `ready`: it serves requests."""

    calls: CountedCalls
    lag: LoopLag
    capture_bytes: Callable[[], int]  # held for requests at work
    capture_memory: int  # the most that may be
    ready: bool = False


def _build(s: Sources) -> Mapping[str, str]:
    return {
        "version": version("cutaway"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": s.facts.kernels,
        "dtype": s.facts.dtype,
        "device": s.facts.device,
        "model_hash": s.facts.model_hash[:16],
    }


BUILD: tuple[Spec[Sources], ...] = (info("cutaway_build_info", "What serves, and how it computes.", _build),)

SERVER: tuple[Spec[Service], ...] = (
    gauge(
        "cutaway_ready", "", "1 while the server takes requests; 0 while it loads or drains, or has failed.",
        lambda s: int(s.ready),
    ),
    counter(
        "cutaway_requests_failed_total", "requests",
        "Generate calls that ended in an error, by gRPC code; those that clients cancelled are not failures.",
        lambda s: s.calls.failed, "code",
    ),
    gauge("cutaway_grpc_streams_open", "streams", "Streams in progress.", lambda s: s.calls.open, "method"),
    histogram(
        "cutaway_event_loop_lag_seconds", "seconds", "How late the event loop was, asked four times a second.",
        lambda s: s.lag.late,
    ),
)  # fmt: skip
