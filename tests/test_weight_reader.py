"""Weights read back from what kernels have made of them, against those that went in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cutaway_server.kernels.cpu import CpuKernels
from cutaway_server.kernels.dequantise import dequantised
from cutaway_server.kernels.library import Library, load_library
from cutaway_server.kernels.quantized import Quantized
from cutaway_server.kernels.reading import WeightReader, times
from cutaway_server.kernels.reference import ReferenceKernels
from cutaway_server.kernels.rounding import NO_ROUNDING, ROUNDINGS
from cutaway_server.kernels.weights import Weights
from networks import PLAIN, SHAPES, random_weights
from test_quantized import blocks

MATRICES = ("qkv", "attention_out", "mlp_in", "mlp_out")
NORMS = ("norm1", "norm1_post", "norm2", "norm2_post", "q_norm", "k_norm")
# No size is a multiple of what the native library reads at once.
ODD = {
    **{name: SHAPES[name] for name in ("plain", "pre- and post-norm", "layernorm, learned positions")},
    "odd": replace(PLAIN, d_model=36, d_mlp=50, d_vocab=61),
}


@pytest.fixture(scope="module")
def library() -> Library:
    found = load_library()
    if found is None:
        pytest.skip("no C compiler here")
    return found


def assert_reads(reader: WeightReader, weights: Weights) -> None:
    """That a reader gives what plain `weights` are, rows in any order."""
    source = torch.Generator().manual_seed(1)
    for i, layer in enumerate(weights.layers):
        for name in MATRICES:
            matrix = getattr(layer, name)
            rows = torch.randperm(len(matrix), generator=source)
            assert torch.equal(reader.rows(name, i, rows), matrix[rows].float()), (name, i)
            vector = torch.randn(len(matrix), generator=source)
            assert torch.allclose(times(reader, name, i, vector), vector @ matrix.float(), atol=1e-5)
            bias = getattr(layer, f"{name}_bias")
            assert bias is None if reader.bias(name, i) is None else torch.equal(reader.bias(name, i), bias), name
        for name in NORMS:
            norm, read = getattr(layer, name), reader.norm(name, i)
            assert (norm is None) == (read is None)
            if norm is not None and read is not None:
                assert torch.equal(norm.gain, read.gain)
                assert norm.bias is None if read.bias is None else torch.equal(norm.bias, read.bias)
    rows = torch.tensor([60, 0, 17])
    assert torch.equal(reader.outer("embed", rows), weights.embed[rows].float())
    assert torch.equal(reader.outer("unembed", rows), weights.unembed[rows].float())
    found = reader.positions(rows)
    assert found is weights.positions or torch.equal(found, weights.positions[rows])


@pytest.mark.parametrize("shape", ODD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_read_as_they_were(shape: str, dtype: torch.dtype, library: Library) -> None:
    config = ODD[shape]
    given, kept = (random_weights(config, dtype=dtype) for _ in range(2))
    kernels = CpuKernels(config, given, 64, library, threads=1, consume=True)
    assert_reads(kernels.weight_reader, kept)
    assert_reads(ReferenceKernels(config, kept, 64).weight_reader, kept)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_rounded_weights_are_read_as_they_are_served(name: str, library: Library) -> None:
    config, rounding = ODD["odd"], ROUNDINGS[name]
    kept = dequantised(random_weights(config), torch.float32, rounding)
    kernels = CpuKernels(config, random_weights(config), 64, library, threads=1, rounding=rounding, consume=True)
    assert_reads(kernels.weight_reader, kept)


def test_matrices_of_several_types_are_read_as_one(library: Library) -> None:
    config = replace(PLAIN, d_model=256, d_mlp=256, d_head=32, n_heads=4, n_kv_heads=2, d_vocab=61)

    def mixed(*parts: tuple[str, int]) -> Quantized:
        return Quantized(tuple(blocks(kind, rows, 256, seed) for seed, (kind, rows) in enumerate(parts)))

    def made() -> Weights:
        plain: Any = random_weights(config)
        layers = tuple(
            replace(
                layer, qkv=mixed(("Q4_0", 128), ("Q4_0", 64), ("Q6_K", 64)), mlp_in=mixed(("Q8_0", 256), ("Q8_0", 256))
            )
            for layer in plain.layers
        )  # fmt: skip
        return replace(plain, layers=layers)

    kernels = CpuKernels(config, made(), 64, library, threads=1)
    assert_reads(kernels.weight_reader, dequantised(made(), torch.float32, NO_ROUNDING))
