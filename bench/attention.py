"""Paged attention alone, layer after layer as a step has them, against the time its keys and values take to read."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from cutaway_server.cache.pages import allocate_pages
from cutaway_server.kernels.build_native import build
from cutaway_server.kernels.cpu import CpuKernels
from cutaway_server.kernels.library import Library
from kernels import PAGE, SMOLLM2, batch, random_weights

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}


def bandwidth(threads: int) -> float:
    """Bytes a second that `threads` read from a tensor far larger than the caches: the best of several passes."""
    torch.set_num_threads(threads)
    data = torch.zeros(2**28, dtype=torch.float32)
    data.fill_(1.0)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def main() -> None:
    """Measure and print; with two libraries, A B B A."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, nargs="*", help="built libraries to compare, in turn A B B A")
    parser.add_argument("--variant")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--kv-dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 1000, 4000])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    paths = options.library or [found for found in [build()] if found]
    speed = bandwidth(options.threads)
    weights = random_weights(SMOLLM2, getattr(torch, options.dtype))
    kernels = [
        CpuKernels(SMOLLM2, weights, 8192, lib, options.variant or lib.supported()[0]) for lib in map(Library, paths)
    ]
    work = [(f"decode {n} rows at {c}", n, 1, c) for c in options.contexts for n in options.rows]
    work += [(f"prefill {n}", 1, n, 0) for n in options.prefill]
    records = []
    for name, sequences, rows, context in work:
        one = batch(sequences, rows, context)
        pages = allocate_pages(
            SMOLLM2, int(one.block_table.max()) + 1, PAGE, DTYPES[options.kv_dtype], torch.device("cpu")
        )
        fill(pages)
        q = torch.randn(sequences * rows, SMOLLM2.n_heads, SMOLLM2.d_head)
        times: list[list[float]] = [[] for _ in kernels]
        plans = [k.plan(one) for k in kernels]
        for turn in range(options.pairs + 1):
            order = list(range(len(kernels)))
            for which in order + order[::-1]:
                start = time.perf_counter()
                for layer in range(SMOLLM2.n_layers):
                    kernels[which].paged_attention(layer, q, plans[which], pages)
                if turn:
                    times[which].append((time.perf_counter() - start) * 1e3)
        read = sequences * (context + rows) * 2 * SMOLLM2.n_kv_heads * SMOLLM2.n_layers * vector_bytes(pages)
        flops = SMOLLM2.n_layers * SMOLLM2.n_heads * sequences * rows * (2 * context + rows + 1) * SMOLLM2.d_head * 2
        medians = [statistics.median(t) for t in times]
        records.append({"work": name, "ms": medians, "all": times, "read_ms": read / speed * 1e3, "flops": flops})
        if not options.json:
            show(records[-1])
    if options.json:
        print(json.dumps({"bandwidth": speed, "variant": kernels[0].name, "records": records}))
    else:
        print(f"{kernels[0].name}, {options.threads} threads, read at {speed / 1e9:.1f} GB/s")


def vector_bytes(pages) -> int:
    """Bytes of one stored key or value, its scale included."""
    d = pages.keys.shape[-1]
    return d * pages.keys.dtype.itemsize + (4 if pages.keys.dtype == torch.int8 else 0)


def fill(pages) -> None:
    """Random keys and values in every page."""
    if pages.keys.dtype == torch.int8:
        pages.keys.random_(-127, 128), pages.values.random_(-127, 128)
        pages.key_scales.fill_(0.01), pages.value_scales.fill_(0.01)
    else:
        pages.keys.normal_(), pages.values.normal_()


def show(r: dict) -> None:
    """One line of the table."""
    floor = r["read_ms"]
    parts = [f"{ms:8.1f} ms ({ms / floor:5.2f} x reading, {r['flops'] / ms / 1e6:6.0f} GFLOP/s)" for ms in r["ms"]]
    print(f"{r['work']:24} reading {floor:6.1f} ms" + "".join(parts), flush=True)


if __name__ == "__main__":
    main()
