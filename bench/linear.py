"""What a product costs by number of rows: why `kernels/linear.py` tiles as it does."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from cutaway_server.kernels.linear import linear, rows_per_tile

SHAPES = {"qkv": (576, 960), "gate and up": (576, 3072), "down": (1536, 576), "unembed": (576, 49152)}


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of one call."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) * 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, (width, out) in SHAPES.items():
            weight = torch.randn(out, width).to(dtype)
            for rows in options.rows:
                x = torch.randn(rows, width)
                ours = milliseconds(lambda x=x, w=weight: linear(x, w), options.repeats)
                narrow = x.to(dtype)
                plain = milliseconds(lambda x=narrow, w=weight: torch.nn.functional.linear(x, w), options.repeats)
                records.append({"dtype": str(dtype), "shape": name, "rows": rows, "tiled_ms": ours, "plain_ms": plain})
    if options.json:
        print(json.dumps(records))
        return
    print(f"rows per tile: fp32 {rows_per_tile(torch.float32)}, bf16 {rows_per_tile(torch.bfloat16)}")
    for r in records:
        times = f"tiled {r['tiled_ms']:8.3f}  plain {r['plain_ms']:8.3f} ms"
        print(f"{r['dtype']:15} {r['shape']:12} {r['rows']:4} rows  {times}")


if __name__ == "__main__":
    main()
