"""Metrics of memory: what the model, its cache and its work take, and what is left."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping

import torch

from cutaway_server.engine.memory import available_bytes
from cutaway_server.service.metrics.sources import Sources
from cutaway_server.service.metrics.spec import Spec, gauge

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def _on_gpu(s: Sources) -> bool:
    return s.facts.device == "cuda"


def _gpu(s: Sources) -> Mapping[str, float] | None:
    if not _on_gpu(s):
        return None
    free, total = torch.cuda.mem_get_info()
    return {"used": total - free, "free": free}


def _activations(s: Sources) -> float | None:
    if not _on_gpu(s):
        return None
    return max(0, torch.cuda.max_memory_allocated() - s.weights_bytes - s.pool_bytes)


def _peak_rss(_: Sources) -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


MEMORY: tuple[Spec[Sources], ...] = (
    gauge(
        "cutaway_weights_bytes", "bytes", "The weights as the kernels hold them, padding and tables included.",
        lambda s: s.weights_bytes,
    ),
    gauge(
        "cutaway_kv_pool_bytes", "bytes",
        "The KV cache's pages. On a CPU the system commits them when they are first written.",
        lambda s: s.pool_bytes,
    ),
    gauge(
        "cutaway_memory_available_bytes", "bytes",
        "What can still be allocated where the model computes: the least that the machine and its containers allow.",
        lambda s: available_bytes(torch.device(s.facts.device)),
    ),
    gauge(
        "cutaway_process_resident_peak_bytes", "bytes", "The most memory that the process has had at once.", _peak_rss
    ),
    gauge(
        "cutaway_torch_allocated_bytes", "bytes", "What torch's tensors take on the GPU. On a GPU only.",
        lambda s: torch.cuda.memory_allocated() if _on_gpu(s) else None,
    ),
    gauge(
        "cutaway_torch_reserved_bytes", "bytes", "What torch has taken from the GPU. On a GPU only.",
        lambda s: torch.cuda.memory_reserved() if _on_gpu(s) else None,
    ),
    gauge(
        "cutaway_activations_peak_bytes", "bytes",
        "The most that torch's tensors took on the GPU, less weights and KV cache. On a GPU only.",
        _activations,
    ),
    gauge("cutaway_gpu_memory_bytes", "bytes", "The GPU's memory, whoever uses it. On a GPU only.", _gpu, "state"),
)  # fmt: skip
