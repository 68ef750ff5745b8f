"""The linear products of one step of a SmolLM2-135M-shaped model, alone, in every way its weights can be held."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "active")  # read when torch is loaded; in a model, one region has all layers

import torch
from cutaway_server.kernels.gguf_blocks import BLOCKS
from cutaway_server.kernels.library import load_library
from cutaway_server.kernels.native_matrix import NativeLinear
from cutaway_server.kernels.packing import AnyPacked, Packed, pack
from cutaway_server.kernels.packing_quantized import PackedQuantized
from cutaway_server.kernels.quantized import KINDS, Blocks, Kind, Quantized

LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # columns, depth
SHAPES = (*(LAYER * 30), (49152, 576))
ROUNDED = {"int8": Kind.ROW8, "int4": Kind.GROUP4}
FORMATS = ("bfloat16", *ROUNDED, *KINDS)


def packed(name: str, columns: int, depth: int) -> AnyPacked:
    """A matrix of random weights; Q4_K's kind of blocks are 256 deep, so those of other depths are the next deeper."""
    if name in KINDS:
        block = BLOCKS[name]
        n_blocks = -(-depth // block.n_weights)
        raw = torch.randint(0, 60, (columns, n_blocks * block.n_bytes), dtype=torch.uint8)  # finite scales
        return pack(Quantized((Blocks(raw, name),)), consume=True)
    weight = torch.randn(columns, depth)
    if name in ROUNDED:
        return pack(weight, rounded=ROUNDED[name], consume=True)
    return pack(weight.bfloat16(), consume=True)


def n_bytes(matrix: AnyPacked) -> int:
    """Bytes that one product reads."""
    if isinstance(matrix, Packed):
        return matrix.data.nbytes
    assert isinstance(matrix, PackedQuantized)
    return matrix.data.nbytes + matrix.scales.nbytes + (0 if matrix.parts is None else matrix.parts.nbytes)


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Of one call, after one."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes a second of reading memory with torch's threads."""
    memory = torch.ones(2**27)
    return memory.nbytes / median_seconds(memory.sum, 5)


def step(linears: list[NativeLinear], depths: list[int], rows: int) -> Callable[[], object]:
    """Every product once, into memory that is there; the unembedding of 32 rows at most."""
    inputs = [torch.randn(rows, depth) for depth in depths[:-1]] + [torch.randn(min(rows, 32), depths[-1])]
    outputs = [torch.zeros(len(x), columns) for x, (columns, _) in zip(inputs, SHAPES, strict=True)]
    return lambda: [linear(x, out) for linear, x, out in zip(linears, inputs, outputs, strict=True)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 512])
    parser.add_argument("--variant", help="force one of the library's variants")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    library = load_library()
    if library is None:
        raise SystemExit("the native library cannot be built here")
    variant = options.variant or library.supported()[0]
    limit, records = bandwidth(), []
    if not options.json:
        print(f"{variant}, {options.threads} threads; reading memory: {limit / 1e9:.1f} GB/s")
    for name in options.formats:
        matrices = [packed(name, *shape) for shape in SHAPES]
        linears = [NativeLinear(library, variant, matrix, threads=options.threads) for matrix in matrices]
        size = sum(map(n_bytes, matrices))
        for rows in options.rows:
            call = step(linears, [matrix.depth for matrix in matrices], rows)
            seconds = median_seconds(call, options.repeats)
            share = size / limit / seconds
            records.append(
                {"format": name, "rows": rows, "ms": seconds * 1e3, "megabytes": size / 1e6, "of_bandwidth": share}
            )
            if not options.json:
                print(f"{name:9} {rows:4} rows {seconds * 1e3:8.2f} ms {size / 1e6:6.0f} MB, {share:4.0%} of bandwidth")
    if options.json:
        print(json.dumps({"variant": variant, "bytes_per_second": limit, "records": records}))


if __name__ == "__main__":
    main()
