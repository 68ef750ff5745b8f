"""What this machine can do at most: read memory, multiply; and what that allows a model to do.

Memory is read by a small C loop (bench/read.c, compiled with cc; torch's sum without a compiler), through small pages
and huge ones, with and without prefetching; the limit is the fastest of them. Products are torch's, and one of our own
kernels' over the same shape. No server or engine is started.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from cost import BYTES, Cost
from cutaway_server.architecture import LayerConfig, ModelConfig
from cutaway_server.engine.build import choose_kernels
from cutaway_server.kernels.weights import LayerWeights, Norm, Weights
from cutaway_server.model.open import open_model
from measure import Machine, Spread, figure, print_json, rate, table
from reading import read_rates

ROWS = 512


def main() -> None:
    """Measure and print."""
    options = read_options()
    torch.set_num_threads(options.threads)
    reads = dict(read_rates(options.mib << 20, options.threads, options.repeats))
    products = dict(product_rates(options.size, options.repeats))
    bandwidth = max(spread.median for spread in reads.values())
    bounds = model_bounds(Cost.of(open_model(options.model).config), bandwidth, products)
    if options.json:
        print_json(read_bytes_per_second=reads, operations_per_second=products, bounds=bounds, model=options.model)
        return
    print(Machine.here())
    print(f"{options.threads} threads, medians of {options.repeats}\n")
    print(table([f"reading {options.mib} MiB", "GB/s"], [(k, scaled(v, 1e-9)) for k, v in reads.items()]), "\n")
    print(table(["products", "G operations/s"], [(k, scaled(v, 1e-9)) for k, v in products.items()]), "\n")
    print(table([f"{options.model} at most", "tokens/s"], [(k, figure(v)) for k, v in bounds.items()]))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="whose bounds, as for cutaway-server [%(default)s]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mib", type=int, default=512, help="how much memory is read [%(default)s]")
    parser.add_argument("--size", type=int, default=2048, help="of the square products [%(default)s]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def product_rates(size: int, repeats: int) -> Iterator[tuple[str, Spread]]:
    """Operations a second of square products, a multiplication and an addition counted as two."""
    operations = 2 * size**3
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        yield name_of("torch", dtype), rate(operations, partial(torch.nn.functional.linear, a, b), repeats)
    a, b = (torch.randint(-127, 127, (size, size), dtype=torch.int8) for _ in range(2))
    yield "torch int8", rate(operations, partial(torch._int_mm, a, b.t()), repeats)
    for dtype in (torch.float32, torch.bfloat16):
        mlp = our_mlp(size, dtype)
        if mlp is not None:
            rows = torch.randn(ROWS, size)
            yield name_of("ours", dtype), rate(4 * ROWS * size * size, partial(mlp, rows), repeats)


def our_mlp(size: int, dtype: torch.dtype) -> Callable[[torch.Tensor], object] | None:
    """The operation with the largest product, for a made-up layer; None where the native kernels do not run."""
    config = ModelConfig(
        family="llama", d_model=size, n_heads=1, n_kv_heads=1, d_head=64, d_mlp=size, d_vocab=64, max_context=64,
        layers=(LayerConfig(None, None),), tied_embeddings=True,
    )  # fmt: skip

    def matrix(out: int, width: int) -> torch.Tensor:
        return torch.randn(out, width).div(width**0.5).to(dtype)

    norm = Norm(torch.ones(size))
    layer = LayerWeights(matrix(192, size), matrix(size, 64), matrix(2 * size, size), matrix(size, size),
                         norm1=norm, norm2=norm)  # fmt: skip
    embed = matrix(64, size)
    kernels = choose_kernels("auto", config, Weights(embed, (layer,), norm, embed), 64)
    return partial(kernels.mlp_input, 0) if kernels.name != "reference" else None


def model_bounds(cost: Cost, bandwidth: float, products: dict[str, Spread]) -> dict[str, float]:
    """Tokens a second that memory (decoding, 192 tokens of context on average) and products (prompts) allow."""
    bounds = {}
    for weights in ("bfloat16", "int8", "Q4_0"):
        for streams in (1, 8, 32):
            unembed = BYTES["Q8_0"] if weights == "Q4_0" else None
            read = cost.decode_bytes(streams, 192, BYTES[weights], 2, unembed)
            bounds[f"decode {streams}, {weights}"] = streams * bandwidth / read
    for weights in ("bfloat16", "int8"):
        fastest = max(v.median for k, v in products.items() if k.endswith(weights))
        bounds[f"prompts of 512, {weights}"] = 512 * fastest / cost.prefill_flops(512)
    return bounds


def scaled(spread: Spread, by: float) -> Spread:
    """In another unit."""
    return Spread(spread.median * by, spread.low * by, spread.high * by, spread.n)


def name_of(whose: str, dtype: torch.dtype) -> str:
    """A product's name in the table."""
    return f"{whose} {str(dtype).removeprefix('torch.')}"


if __name__ == "__main__":
    main()
