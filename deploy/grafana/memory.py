"""Memory: what the model and its cache take, what the process has, and what is left."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders
from panels import CHOSEN, PROCESS, Query, board, facts, graph, number, total

GIB = float(2**30)
ORANGE, RED = "orange", "red"


def memory() -> builders.Dashboard:
    """The dashboard."""
    rows = {"Now": _now(), "Host": _host(), "GPU": _gpu(), "What serves": _build()}
    return board("cutaway-memory", "Cutaway: memory", "Weights, KV cache, process and GPU.", rows)


def _now() -> list[object]:
    lowest = f"min(cutaway_memory_available_bytes{{{CHOSEN}}})"
    return [
        number("Weights", "bytes", "As the kernels hold them, over all instances.", total("cutaway_weights_bytes")),
        number("KV pool", "bytes", "The cache's pages, over all instances.", total("cutaway_kv_pool_bytes")),
        number(
            "Available", "bytes",
            "The tightest instance: what can still be allocated where the model computes. Low: lower "
            "--memory-utilization or --kv-cache-memory before the system ends the process.",
            f"{lowest}", (0, RED), (GIB / 4, ORANGE), (GIB, "green"),
        ),
        number(
            "Resident", "bytes", "The largest process.", f"max(process_resident_memory_bytes{{{PROCESS}}})"
        ),
    ]  # fmt: skip


def _host() -> list[object]:
    return [
        graph(
            "Process", "bytes",
            "Resident grows to weights and KV pool as pages are first written; beyond that it should not grow.",
            Query(f"process_resident_memory_bytes{{{PROCESS}}}", "resident {{instance}}"),
            Query(f"cutaway_process_resident_peak_bytes{{{CHOSEN}}}", "peak {{instance}}"),
        ),
        graph(
            "Weights and KV pool", "bytes", "What the process needs at least.",
            Query(f"cutaway_weights_bytes{{{CHOSEN}}}", "weights {{instance}}"),
            Query(f"cutaway_kv_pool_bytes{{{CHOSEN}}}", "KV pool {{instance}}"),
        ),
        graph(
            "Available", "bytes",
            "The least that the machine and its containers leave. Below the line: lower --memory-utilization.",
            Query(f"cutaway_memory_available_bytes{{{CHOSEN}}}", "{{instance}}"), steps=((GIB / 4, RED),),
        ),
        graph(
            "Open files", "short", "Sockets and files. Near the limit: raise it, or find who leaves streams open.",
            Query(f"process_open_fds{{{PROCESS}}}", "open {{instance}}"),
            Query(f"process_max_fds{{{PROCESS}}}", "limit {{instance}}"),
        ),
        graph(
            "Threads' memory: virtual", "bytes", "Address space; large is normal, growth without end is not.",
            Query(f"process_virtual_memory_bytes{{{PROCESS}}}", "{{instance}}"),
        ),
        graph(
            "Objects that the garbage collector could not free", "short", "Should stay 0.",
            Query(f"sum by (instance) (python_gc_objects_uncollectable_total{{{PROCESS}}})", "{{instance}}"),
        ),
    ]  # fmt: skip


def _gpu() -> list[object]:
    return [
        graph(
            "GPU", "bytes", "Whoever uses it. Empty without a GPU.",
            Query(f"cutaway_gpu_memory_bytes{{{CHOSEN}}}", "{{state}} {{instance}}"), stacked=True,
        ),
        graph(
            "torch", "bytes",
            "Reserved far above allocated is fragmentation: lower --memory-utilization. Empty without a GPU.",
            Query(f"cutaway_torch_allocated_bytes{{{CHOSEN}}}", "allocated {{instance}}"),
            Query(f"cutaway_torch_reserved_bytes{{{CHOSEN}}}", "reserved {{instance}}"),
        ),
        graph(
            "Activations, peak", "bytes",
            "The most beyond weights and pool. Grows with --max-batch-tokens. Empty without a GPU.",
            Query(f"cutaway_activations_peak_bytes{{{CHOSEN}}}", "{{instance}}"),
        ),
    ]  # fmt: skip


def _build() -> list[object]:
    return [facts("What serves", "Version, model and kernels of each instance.", "cutaway_build_info")]
