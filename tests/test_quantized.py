"""Quantised products against exact integers, formats against the gguf package, rows that do not know each other."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from cutaway_server.kernels.build_native import variants
from cutaway_server.kernels.gguf_blocks import BLOCKS
from cutaway_server.kernels.library import Library, load_library
from cutaway_server.kernels.native_matrix import NativeLinear
from cutaway_server.kernels.packing import AnyPacked, pack, pack_gated
from cutaway_server.kernels.packing_quantized import PackedQuantized
from cutaway_server.kernels.quantized import KINDS, Blocks, Integers, Kind, Quantized
from cutaway_server.kernels.rounding import ROUND, Rounded
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gguf import random_blocks

FUSED = ["amx", "avx512vnni", "avx512", "avx512bf16", "avxvnni", "avx2"]  # variants with fused multiply-add
MATRICES = [*KINDS, "ROW8", "rounded GROUP8", "rounded GROUP4"]


@pytest.fixture(scope="module")
def library() -> Library:
    found = load_library()
    if found is None:
        pytest.skip("no C compiler here")
    return found


@pytest.fixture(scope="module", params=variants())
def variant(request: pytest.FixtureRequest, library: Library) -> str:
    if request.param not in library.supported():
        pytest.skip(f"untested: this machine does not run {request.param}")
    return str(request.param)


def blocks(name: str, rows: int, depth: int, seed: int = 0) -> Blocks:
    return Blocks(torch.from_numpy(random_blocks(GGMLQuantizationType[name], rows, depth, seed)), name)


def matrix(name: str, rows: int, depth: int) -> Quantized | Rounded:
    """Of random blocks, or rounded from random floats."""
    if name in KINDS:
        return Quantized((blocks(name, rows, depth),))
    floats = torch.randn(rows, depth, generator=torch.Generator().manual_seed(rows))
    return Rounded(floats, Kind[name.removeprefix("rounded ")])


def packed(source: Quantized | Rounded, bias: torch.Tensor | None = None) -> AnyPacked:
    return pack(source, bias) if isinstance(source, Quantized) else pack(source.weight, bias, rounded=source.kind)


def whole(source: Quantized | Rounded) -> Integers:
    return source.integers(0, source.shape[0])


def activations(rows: int, depth: int, seed: int = 0) -> torch.Tensor:
    """Of very different sizes, some groups all zeros."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, depth, generator=source) * torch.exp(
        3 * torch.randn(rows, depth // 32, 1, generator=source)
    ).expand(-1, -1, 32).reshape(rows, depth)
    x[:, 32:64] = 0
    return x


def exactly(x: torch.Tensor, rows: Integers) -> tuple[np.ndarray, np.ndarray]:
    """The product of rounded activations and the matrix in 64 bits; and what its terms add up to in magnitude."""
    grouped = x.numpy().reshape(len(x), -1, x.shape[1] if rows.kind == Kind.ROW8 else 32)
    most = np.abs(grouped).max(2, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    rounded = np.rint(grouped * inverse).astype(np.int64)
    values = (rounded * (most / np.float32(127)).astype(np.float64)).reshape(len(x), -1)
    weights = double_values(rows)[:, : x.shape[1]]
    return values @ weights.T, np.abs(values) @ np.abs(weights).T


def double_values(rows: Integers) -> np.ndarray:
    """What the integers stand for, in 64 bits and formulas of this test's own."""
    q = rows.stored.numpy().astype(np.int64) - {Kind.GROUP4: 8, Kind.MIN4: 0, Kind.SUPER4: 0}.get(rows.kind, 128)
    scales = rows.scales.numpy().astype(np.float64)
    if rows.kind == Kind.ROW8:
        return q * scales[:, None]
    if rows.kind in (Kind.GROUP4, Kind.GROUP8):
        return q * scales.repeat(32, 1)
    if rows.kind in (Kind.MIN4, Kind.MIN8):
        return q * scales[..., 0].repeat(32, 1) + scales[..., 1].repeat(32, 1)
    parts = rows.parts.numpy()
    if rows.kind == Kind.HALVES8:
        return q * (scales.repeat(16, 1) * parts.view(np.int8).reshape(len(q), -1)).repeat(16, 1)
    scale, minimum = (scales[..., i].repeat(8, 1) * parts[..., i] for i in (0, 1))
    return q * scale.repeat(32, 1) - minimum.repeat(32, 1)


@pytest.mark.parametrize("name", KINDS)
def test_values_of_blocks_are_to_the_bit_those_of_the_gguf_package(name: str) -> None:
    here = blocks(name, 9, 1024)
    expected = torch.from_numpy(gguf.dequantize(here.raw.numpy(), GGMLQuantizationType[name]))
    assert torch.equal(here.integers(slice(None)).values(), expected)
    assert torch.equal(Quantized((here,)).values(torch.float32), expected)
    assert (BLOCKS[name].n_weights, BLOCKS[name].n_bytes) == gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]


@pytest.mark.parametrize("name", MATRICES)
def test_packed_matrices_give_their_rows_back(name: str) -> None:
    source = matrix(name, 61, 512)
    held = packed(source)
    numbers = torch.tensor([0, 60, 17, 17, 16])
    assert isinstance(held, PackedQuantized)
    assert (held.tiles, held.padded_depth) == (2, 512)
    assert torch.equal(held.rows(numbers), source.values(torch.float32)[numbers])


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 16, 33, 150])
@pytest.mark.parametrize("name", MATRICES)
def test_a_product_is_that_of_exact_integers(name: str, rows: int, variant: str, library: Library) -> None:
    source, x = matrix(name, 77, 768), activations(rows, 768)
    bias = torch.randn(77)
    found = NativeLinear(library, variant, packed(source, bias))(x).double().numpy()
    expected, size = exactly(x, whole(source))
    assert np.abs(found - expected - bias.double().numpy()).max() <= (1e-6 * np.maximum(size, 1)).max()
    assert (np.abs(found - expected - bias.double().numpy()) <= 2e-6 * np.maximum(size, 1)).all()


@pytest.mark.parametrize("name", MATRICES)
def test_a_row_alone_has_the_bits_it_has_among_many(name: str, variant: str, library: Library) -> None:
    source, x = packed(matrix(name, 64, 1280)), activations(150, 1280)
    linear, threaded = NativeLinear(library, variant, source), NativeLinear(library, variant, source, threads=3)
    together = linear(x)
    assert torch.equal(threaded(x), together)
    for start, stop in [(0, 1), (149, 150), (100, 150), *((7, 7 + n) for n in range(1, 36))]:
        assert torch.equal(linear(x[start:stop]), together[start:stop])


@pytest.mark.parametrize("name", MATRICES)
def test_every_fused_variant_gives_the_same_bits(name: str, library: Library) -> None:
    source, x = packed(matrix(name, 64, 512)), activations(19, 512)
    found = [NativeLinear(library, v, source)(x) for v in FUSED if v in library.supported()]
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("name", ["ROW8", "rounded GROUP8", "rounded GROUP4"])
@settings(max_examples=20, deadline=None)
@given(columns=st.integers(1, 100), depth=st.integers(1, 200), rows=st.integers(1, 40))
def test_sizes_that_fill_no_block_and_no_group(
    name: str, columns: int, depth: int, rows: int, variant: str, library: Library
) -> None:
    source = matrix(name, columns, depth)
    x = torch.randn(rows, depth, generator=torch.Generator().manual_seed(depth))
    found = NativeLinear(library, variant, packed(source))(x)
    wide = torch.nn.functional.pad(x, (0, whole(source).stored.shape[1] - depth))
    expected, size = exactly(wide, whole(source))
    assert (np.abs(found.double().numpy() - expected) <= 2e-6 * np.maximum(size, 1)).all()


def test_types_one_below_the_other_multiply_as_each_alone(variant: str, library: Library) -> None:
    parts = tuple(blocks(name, n, 512, seed=n) for name, n in [("Q5_0", 32), ("Q8_0", 64), ("Q6_K", 96), ("Q4_K", 17)])
    held = pack(Quantized(parts), bias := torch.randn(209))
    x = activations(5, 512)
    found = NativeLinear(library, variant, held)(x)
    offset = 0
    for part in parts:
        n = len(part.raw)
        alone = NativeLinear(library, variant, pack(Quantized((part,)), bias[offset : offset + n]))(x)
        assert torch.equal(found[:, offset : offset + n], alone)
        offset += n


@pytest.mark.parametrize("name", MATRICES)
def test_gate_and_up_alternate(name: str, variant: str, library: Library) -> None:
    source = matrix(name, 96, 256)
    together = pack_gated(source) if isinstance(source, Quantized) else pack_gated(source.weight, rounded=source.kind)
    x = activations(3, 256)
    plain = NativeLinear(library, variant, packed(source))(x)
    found = NativeLinear(library, variant, together)(x)
    assert torch.equal(found.view(3, 3, 2, 16).transpose(1, 2).reshape(3, 96), plain)


def test_nothing_in_a_row_reaches_its_neighbours_not_even_nan(variant: str, library: Library) -> None:
    for name in ("ROW8", "Q4_1", "Q6_K"):
        linear = NativeLinear(library, variant, packed(matrix(name, 64, 512)))
        x = activations(20, 512)
        clean = linear(x)
        for wrong in (torch.nan, torch.inf):
            x[9, 100] = wrong
            spoilt = linear(x)
            assert not spoilt[9].isfinite().any()
            others = torch.arange(20) != 9
            assert torch.equal(spoilt[others], clean[others])


@pytest.mark.parametrize("kind", ROUND)
def test_rounding_is_to_the_nearest(kind: Kind) -> None:
    weights = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    weights[3] = 0
    rounded = ROUND[kind](weights)
    error = (rounded.values() - weights).abs()
    scales = rounded.scales.float()
    step = scales[:, None] if kind == Kind.ROW8 else scales.abs().repeat_interleave(32, 1)
    assert (rounded.values()[3] == 0).all()
    if kind == Kind.GROUP4:
        worst = (weights.abs().unflatten(1, (-1, 32)).amax(2) / 8).repeat_interleave(32, 1)
        assert (
            error.square().unflatten(1, (-1, 32)).sum(2) <= 32 * (worst / 2).unflatten(1, (-1, 32))[:, :, 0] ** 2 * 2
        ).all()
    else:
        assert (error <= step * 0.501 + 1e-7).all()
