"""One step of a SmolLM2-135M-shaped model through the reference kernels and through the CPU's, in turn (A B B A)."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from cutaway_server.architecture import LayerConfig, ModelConfig, Rope
from cutaway_server.cache.pages import Pages, allocate_pages
from cutaway_server.kernels.batch import Batch
from cutaway_server.kernels.cpu import CpuKernels
from cutaway_server.kernels.library import load_library
from cutaway_server.kernels.reference import ReferenceKernels
from cutaway_server.kernels.rounding import NO_ROUNDING, ROUNDINGS
from cutaway_server.kernels.weights import LayerWeights, Norm, Weights
from cutaway_server.model.transformer import Transformer

PAGE = 16
SMOLLM2 = ModelConfig(
    family="llama", d_model=576, n_heads=9, n_kv_heads=3, d_head=64, d_mlp=1536, d_vocab=49152, max_context=8192,
    layers=(LayerConfig(None, Rope(100000.0, 64)),) * 30, tied_embeddings=True,
)  # fmt: skip


def random_weights(config: ModelConfig, dtype: torch.dtype) -> Weights:
    """Weights of the model's shape; what they are does not change the time."""

    def matrix(out: int, width: int) -> torch.Tensor:
        return (torch.randn(out, width) / width**0.5).to(dtype)

    def norm() -> Norm:
        return Norm(torch.ones(config.d_model))

    q, kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    layers = tuple(
        LayerWeights(
            matrix(q + 2 * kv, config.d_model), matrix(config.d_model, q), matrix(2 * config.d_mlp, config.d_model),
            matrix(config.d_model, config.d_mlp), norm1=norm(), norm2=norm(),
        )
        for _ in config.layers
    )  # fmt: skip
    embed = matrix(config.d_vocab, config.d_model)
    return Weights(embed, layers, norm(), embed)


def batch(sequences: int, rows: int, context: int) -> Batch:
    """`rows` rows each of `sequences` sequences, the last of them at position context + rows - 1."""
    pages = -(-(context + rows) // PAGE)
    table = torch.randperm(sequences * pages).view(sequences, pages) + 1
    positions = torch.arange(context, context + rows)
    slots = table[:, positions // PAGE] * PAGE + positions % PAGE
    n = sequences * rows
    return Batch(
        torch.randint(0, SMOLLM2.d_vocab, (n,)), positions.repeat(sequences), slots.flatten(),
        torch.ones(n, dtype=torch.bool), torch.arange(0, n + 1, rows), torch.full((sequences,), context + rows), table,
        torch.arange(rows - 1, n, rows), PAGE,
    )  # fmt: skip


def step(model: Transformer, work: Batch, pages: Pages) -> Callable[[], object]:
    """A step up to its logits."""
    return lambda: model.logits(model.forward(work, pages))


def milliseconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """One call's time."""
    start = clock()
    call()
    return (clock() - start) * 1e3


def compare(
    a: Callable[[], object], b: Callable[[], object], pairs: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[float], list[float]]:
    """Times of both, A B B A, after one of each."""
    a(), b()
    times: tuple[list[float], list[float]] = [], []
    for _ in range(pairs):
        for which in (0, 1, 1, 0):
            times[which].append(milliseconds((a, b)[which], clock))
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--variant", help="force one of the library's variants")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1000])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quantize", choices=sorted(ROUNDINGS), help="of the native kernels' weights")
    parser.add_argument("--alone", action="store_true", help="beside themselves, not the reference")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of all threads, over their number: for a machine that others use too"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = (lambda: time.process_time() / options.threads) if options.cpu_time else time.perf_counter
    library = load_library()
    if library is None:
        raise SystemExit("the native library cannot be built here")
    dtype = getattr(torch, options.dtype)
    weights = random_weights(SMOLLM2, dtype)
    reference = Transformer(ReferenceKernels(SMOLLM2, weights, 8192))
    rounding = ROUNDINGS.get(options.quantize, NO_ROUNDING)
    native = Transformer(CpuKernels(SMOLLM2, weights, 8192, library, options.variant, rounding=rounding))
    work = [(f"decode {n} rows at {c}", n, 1, c) for c in options.contexts for n in options.rows]
    work += [(f"prefill {n}", 1, n, 0) for n in options.prefill]
    records = []
    for name, sequences, rows, context in work:
        one = batch(sequences, rows, context)
        pages = allocate_pages(SMOLLM2, int(one.block_table.max()) + 1, PAGE, dtype, torch.device("cpu"))
        pages.keys.normal_(), pages.values.normal_()
        other = step(native if options.alone else reference, one, pages)
        slow, fast = compare(other, step(native, one, pages), options.pairs, clock)
        records.append(
            {"work": name, "reference_ms": statistics.median(slow), "native_ms": statistics.median(fast),
             "reference_all": slow, "native_all": fast, "tokens": sequences * rows}
        )  # fmt: skip
        if not options.json:
            show(records[-1])
    if options.json:
        print(json.dumps({"kernels": native.kernels.name, "dtype": options.dtype, "records": records}))


def show(r: dict) -> None:
    """One line of the table."""
    fast, slow = r["native_ms"], r["reference_ms"]
    spread = f"({min(r['native_all']):.1f}-{max(r['native_all']):.1f})"
    rate = f"{slow / fast:5.1f} x, {r['tokens'] / fast * 1e3:6.0f} tok/s"
    print(f"{r['work']:24} reference {slow:8.1f} ms  native {fast:7.1f} ms {spread:15} {rate}")


if __name__ == "__main__":
    main()
