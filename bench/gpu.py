"""Everything there is to measure on an NVIDIA GPU, in one command, with random weights of published shapes.

    python bench/gpu.py --json gpu.json                     all parts, on the GPU
    python bench/gpu.py --parts limits decode --streams 1 8 some of them
    python bench/gpu.py --device cpu --tiny                 that it runs: tiny shapes, Triton's interpreter, no figures

Parts: limits (bandwidth, products), linears (cuBLAS beside our own, by rows), decode (Llama-3.1-8B shape, by streams),
saturated (1000 + 1000 tokens), nano (nano-vllm's benchmark: Qwen3-0.6B shape), host (the same decode without graphs,
and without running ahead), invariant (the price of --batch-invariant), transformers (the peer, same shape).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is loaded
sys.path[:0] = [str(Path(__file__).parents[1] / "server"), str(Path(__file__).parent)]

import torch
from cutaway_server.engine.engine import Engine
from cutaway_server.kernels.cuda.matmul import matmul
from cutaway_server.request import Request, Sampled, SamplingParams
from gpu_models import LLAMA_8B, QWEN3_06B, Bench, shrunk
from torch.nn import functional as F

Record = dict[str, object]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device does at best: bytes read a second, and bf16 operations of products."""

    read: float
    copy: float
    flops: float


@dataclass(frozen=True, slots=True)
class Size:
    """How much to measure."""

    tiny: bool
    device: torch.device
    dtype: torch.dtype
    streams: list[int]
    repeats: int

    def pick(self, whole: int, tiny: int) -> int:
        """One number or the other."""
        return tiny if self.tiny else whole

    def wait(self) -> None:
        """Until the device has nothing to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], times: int = 10) -> float:
        """Median time of one call, after two."""
        call(), call()
        found = []
        for _ in range(times):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found)


def measure_limits(size: Size) -> Limits:
    """Reading and copying buffers far larger than any cache, and one large product of random numbers."""
    read, copy = measure_memory(size, size.pick(2**29, 2**14))
    n = size.pick(8192, 64)
    a, b = (torch.randn(n, n, device=size.device).to(size.dtype) for _ in range(2))
    return Limits(read, copy, 2 * n**3 / size.seconds(lambda: a @ b))


def measure_memory(size: Size, numbers: int) -> tuple[float, float]:
    """Bytes a second: reading, and copying (read and written counted)."""
    source = torch.randn(numbers, dtype=torch.float32, device=size.device)
    target = torch.empty_like(source)
    read = source.nbytes / size.seconds(lambda: source.amax())
    return read, 2 * source.nbytes / size.seconds(lambda: target.copy_(source))


def linears(size: Size) -> Iterator[Record]:
    """Each product of a step, by rows: cuBLAS beside the one whose rows do not know each other."""
    config = LLAMA_8B if not size.tiny else shrunk(LLAMA_8B)
    d, kv = config.d_model, config.n_kv_heads * config.d_head
    shapes = {"qkv": (d + 2 * kv, d), "out": (d, d), "gate, up": (2 * config.d_mlp, d), "down": (d, config.d_mlp)}
    for name, (columns, depth) in shapes.items():
        copies = size.pick(4, 1)  # in turn, so that no weight is still in a cache
        weights = [torch.randn(columns, depth, device=size.device).to(size.dtype) for _ in range(copies)]
        for rows in (1, 8, 16, 32, 64, 256) if not size.tiny else (1, 3):
            x = torch.randn(rows, depth, device=size.device).to(size.dtype)
            theirs = size.seconds(lambda: [F.linear(x, w) for w in weights]) / copies  # noqa: B023
            ours = size.seconds(lambda: [matmul(x, w) for w in weights]) / copies  # noqa: B023
            yield {
                "part": "linears", "name": name, "rows": rows, "cublas_us": theirs * 1e6, "invariant_us": ours * 1e6,
                "cublas_bytes_per_second": weights[0].nbytes / theirs,
                "invariant_bytes_per_second": weights[0].nbytes / ours,
            }  # fmt: skip


def prompt_of(bench: Bench, length: int, source: random.Random) -> tuple[int, ...]:
    """Random tokens."""
    return tuple(source.choices(range(bench.config.d_vocab), k=length))


def run(
    engine: Engine, asked: list[tuple[tuple[int, ...], int]], temperature: float, wait: Callable[[], None]
) -> Record:
    """Serve all at once: seconds until all have begun, and from there to the end."""
    for i, (prompt, output) in enumerate(asked):
        sampling = SamplingParams(seed=i, max_tokens=output, temperature=temperature)
        engine.add(Request(f"bench-{i}", prompt, sampling, time.monotonic(), prefix_caching=False))
    wait()
    start = time.perf_counter()
    begun: set[str] = set()
    middle, before, tokens = start, 0, 0
    while engine.has_work:
        for name, event in engine.step():
            if isinstance(event, Sampled):
                begun.add(name)
                tokens += 1
        if len(begun) == len(asked) and middle == start:
            middle, before = time.perf_counter(), tokens
    wait()
    stop = time.perf_counter()
    return {
        "prefill_seconds": middle - start, "decode_seconds": stop - middle, "decoded": tokens - before,
        "tokens": tokens, "seconds": stop - start,
    }  # fmt: skip


def decode(bench: Bench, size: Size, limits: Limits, streams: int, *, part: str = "decode", **options: bool) -> Record:
    """`streams` prompts of 128 tokens, 128 decoded each: all of them decode together."""
    prompt, output = size.pick(128, 5), size.pick(128, 4)
    engine = bench.engine(running=streams, context=prompt + output, step_rows=max(streams, 8192), **options)
    source = random.Random(0)
    found = []
    for _ in range(size.repeats + 1):  # the first records graphs and compiles kernels
        asked = [(prompt_of(bench, prompt, source), output) for _ in range(streams)]
        found.append(run(engine, asked, 0.0, size.wait))
    del engine
    release(size)
    rates = [float(r["decoded"]) / float(r["decode_seconds"]) for r in found[1:]]  # type: ignore[arg-type]
    rate = statistics.median(rates)
    step = streams / rate
    floor = (bench.step_bytes + streams * (prompt + output / 2) * bench.token_bytes) / limits.read
    return {
        "part": part, "streams": streams, **options, "tokens_per_second": rate, "spread": [min(rates), max(rates)],
        "step_ms": step * 1e3, "of_bandwidth": floor / step,
        "prefill_tokens_per_second": streams * prompt / float(found[-1]["prefill_seconds"]),  # type: ignore[arg-type]
    }  # fmt: skip


def saturated(bench: Bench, size: Size, limits: Limits) -> Record:
    """1000 + 1000 tokens, as many at once as their pages fit: output tokens a second, beside the bound."""
    length, streams = size.pick(1000, 6), size.pick(256, 3)
    engine = bench.engine(running=streams, context=2 * length, step_rows=size.pick(8192, 64))
    source = random.Random(0)
    asked = [(prompt_of(bench, length, source), length) for _ in range(streams)]
    run(engine, asked[: streams // 2 or 1], 0.0, size.wait)
    found = run(engine, asked, 0.0, size.wait)
    del engine
    release(size)
    step = (bench.step_bytes + streams * 1.5 * length * bench.token_bytes) / limits.read
    products = streams * bench.row_flops / limits.flops
    bound = streams * length / (length * max(step, products) + streams * length * bench.row_flops / limits.flops)
    rate = float(found["tokens"]) / float(found["seconds"])  # type: ignore[arg-type]
    return {
        "part": "saturated", "streams": streams, "tokens_per_second": rate, "bound": bound, "of_bound": rate / bound,
        **found,
    }  # fmt: skip


def nano(bench: Bench, size: Size) -> Record:
    """nano-vllm's benchmark: 256 sequences, prompts and outputs of 100 to 1024 tokens, temperature 0.6, no end."""
    count, low, high = size.pick(256, 3), size.pick(100, 2), size.pick(1024, 5)
    source = random.Random(0)
    asked = [(prompt_of(bench, source.randint(low, high), source), source.randint(low, high)) for _ in range(count)]
    engine = bench.engine(running=count, context=2 * high, step_rows=size.pick(16384, 64))
    run(engine, asked[: count // 4 or 1], 0.6, size.wait)
    found = run(engine, asked, 0.6, size.wait)
    rate = float(found["tokens"]) / float(found["seconds"])  # type: ignore[arg-type]
    return {"part": "nano", "sequences": count, "tokens_per_second": rate, **found}


def peers(bench: Bench, size: Size) -> Iterator[Record]:
    """Hugging Face transformers; what fails there is told, and ends only itself."""
    import gpu_peers

    model = gpu_peers.llama(bench.config, bench.dtype, bench.device)
    prompt, output = size.pick(128, 5), size.pick(128, 4)
    source = random.Random(0)
    calls: list[tuple[str, int, Callable[[], float]]] = [
        ("continuous batching", n, lambda n=n: gpu_peers.continuous(  # type: ignore[misc]
            model, [list(prompt_of(bench, prompt, source)) for _ in range(n)], output
        )) for n in size.streams
    ]  # fmt: skip
    calls += [
        ("static cache, compiled", n, lambda n=n: gpu_peers.static_and_compiled(  # type: ignore[misc]
            model, n, prompt, output
        )) for n in size.streams
    ]  # fmt: skip
    for name, streams, call in calls:
        record: Record = {"part": "transformers", "name": name, "streams": streams}
        try:
            yield {**record, "tokens_per_second": call()}
        except Exception as error:
            yield {**record, "failed": f"{type(error).__name__}: {error}"[:300]}


def parts(options: argparse.Namespace, size: Size) -> Iterator[Record]:
    """All that is asked for, one record at a time."""
    wanted = set(options.parts)
    limits = measure_limits(size)
    yield {"part": "limits", **asdict(limits)}
    if "linears" in wanted:
        yield from linears(size)
    if wanted & {"decode", "saturated", "host", "invariant"}:
        bench = Bench.make(shrunk(LLAMA_8B) if size.tiny else LLAMA_8B, size.dtype, size.device)
        if "decode" in wanted:
            yield from (decode(bench, size, limits, n) for n in size.streams)
        if "host" in wanted:
            yield from (decode(bench, size, limits, n, part="host", ahead=False) for n in size.streams[:2])
        if "invariant" in wanted:
            yield from (decode(bench, size, limits, n, part="invariant", invariant=True) for n in size.streams)
        if "saturated" in wanted:
            yield saturated(bench, size, limits)
        del bench
        release(size)
    if "nano" in wanted:
        yield nano(Bench.make(shrunk(QWEN3_06B) if size.tiny else QWEN3_06B, size.dtype, size.device), size)
        release(size)
    if "transformers" in wanted:
        yield from peers(Bench.make(shrunk(LLAMA_8B) if size.tiny else LLAMA_8B, size.dtype, size.device), size)


def release(size: Size) -> None:
    """Give memory back to the device."""
    gc.collect()
    if size.device.type == "cuda":
        torch.cuda.empty_cache()


def show(record: Record) -> None:
    """One line of the table."""
    shown = [f"{value:,.3g}" if isinstance(value, float) and value < 100 else
             f"{value:,.0f}" if isinstance(value, float) else str(value) for value in record.values()]  # fmt: skip
    print("  ".join(f"{key} {value}" for key, value in zip(record, shown, strict=True)), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["limits", "linears", "decode", "host", "invariant", "saturated", "nano", "transformers"]
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="shapes that say nothing, to see that everything runs")
    parser.add_argument("--json", type=Path, help="write all records there")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --tiny only shows that this program runs")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the kernels are interpreted there")
    size = Size(
        options.tiny, torch.device(options.device), getattr(torch, options.dtype),
        [1, 2] if options.tiny else options.streams, 1 if options.tiny else options.repeats,
    )  # fmt: skip
    machine = torch.cuda.get_device_name() if options.device == "cuda" else "cpu, interpreted"
    records: list[Record] = [{"machine": machine, "torch": torch.__version__, "dtype": options.dtype}]
    show(records[0])
    for record in parts(options, size):
        records.append(record)
        show(record)
        if options.json is not None:
            options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
