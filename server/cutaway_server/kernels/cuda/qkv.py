"""From the product of W_QKV to queries and stored keys and values: bias, QK-norm, rotation, store.

A program takes the queries, the keys or the values of one row. The partner that a dimension is rotated with is read
and normed a second time rather than exchanged: it comes from the cache, and the arithmetic is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cutaway_server.architecture import ModelConfig, Rope
from cutaway_server.cache.pages import LARGEST, Pages
from cutaway_server.kernels.cuda.launch import EXACT, flat, power_of_two, warps
from cutaway_server.kernels.weights import LayerWeights, Norm


@triton.jit
def load_part(joined, bias, place, column, inside, BIAS: tl.constexpr):
    """Values of one row's part, fp32, with the bias."""
    x = tl.load(joined + place, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x = x + tl.load(bias + column, mask=inside, other=0.0)
    return x


@triton.jit
def head_scales(x, inside, eps, HEADS: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr, LAYER: tl.constexpr):
    """Mean and what divides, [heads, 1]: over each head, or over all of them together."""
    if FULL:
        mean = tl.sum(tl.sum(x, 1, keep_dims=True), 0, keep_dims=True) / (HEADS * D)
    else:
        mean = tl.sum(x, 1, keep_dims=True) / D
    if not LAYER:
        mean = mean * 0.0
    x = tl.where(inside, x - mean, 0.0)
    squares = tl.sum(x * x, 1, keep_dims=True)
    if FULL:
        squares = tl.sum(squares, 0, keep_dims=True) / HEADS
    return mean, tl.sqrt_rn(squares / D + eps)


@triton.jit
def scaled(x, mean, scale, gain, gain_bias, index, inside, BIAS: tl.constexpr):
    """The norm of x, given its mean and what divides."""
    x = (x - mean) / scale * tl.load(gain + index, mask=inside, other=0.0)
    if BIAS:
        x = x + tl.load(gain_bias + index, mask=inside, other=0.0)
    return x


@triton.jit
def normed_and_turned(
    joined, bias, gain, gain_bias, cos, sin, row, start, first, eps,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """Queries or keys [heads, d] of one row after QK-norm and rotation, fp32, and which places are real."""
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    d = tl.arange(0, D_BLOCK)[None, :]
    inside = (head < HEADS) & (d < D)
    turned = load_part(joined, bias, start + head * D + d, first + head * D + d, inside, BIAS)
    if NORM != "none":
        mean, scale = head_scales(turned, inside, eps, HEADS, D, NORM == "full", LAYER)
        index = head * D + d if NORM == "full" else d + head * 0
        turned = scaled(turned, mean, scale, gain, gain_bias, index, inside, LAYER)
    if HALF > 0:
        if INTERLEAVED:
            partner, pair, low = d ^ 1, d // 2, d % 2 == 0
        else:
            partner, pair, low = tl.where(d < HALF, d + HALF, d - HALF), d % HALF, d < HALF
        rotated = inside & (d < 2 * HALF)
        y = load_part(joined, bias, start + head * D + partner, first + head * D + partner, rotated, BIAS)
        if NORM != "none":
            index = head * D + partner if NORM == "full" else partner + head * 0
            y = scaled(y, mean, scale, gain, gain_bias, index, rotated, LAYER)
        c = tl.load(cos + row * HALF + pair, mask=d < 2 * HALF, other=0.0)
        s = tl.load(sin + row * HALF + pair, mask=d < 2 * HALF, other=0.0)
        turned = tl.where(rotated, tl.where(low, turned * c - y * s, turned * c + y * s), turned)
    return turned, inside


@triton.jit
def to_e4m3(x):
    """Round to nearest even on the 3 bits of mantissa that e4m3 has, so that the conversion has nothing to decide."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    return bits.to(tl.float32, bitcast=True).to(tl.float8e4nv)


@triton.jit
def to_int8(x):
    """Round to nearest even: adding 1.5 * 2^23 leaves fp32 no bits below one."""
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def store_heads(
    x, pages, scales, slot, inside,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, PAGE: tl.constexpr,
    SCALED: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Write [heads, d] to one slot of the pages, in their dtype; scaled ones by each head's largest value."""
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    d = tl.arange(0, D_BLOCK)[None, :]
    line = ((slot // PAGE) * HEADS + head) * PAGE + slot % PAGE
    if SCALED:
        x = tl.where(inside, x, 0.0)
        broken = tl.sum(x * 0.0, 1, keep_dims=True)  # NaN if one is not finite: then so is the scale
        scale = tl.max(tl.abs(x), 1, keep_dims=True) / LARGEST + broken
        tl.store(scales + line, scale, mask=head < HEADS)
        x = x / tl.where(scale > 0.0, scale, 1.0)
        if LARGEST == 127.0:
            tl.store(pages + line * D + d, to_int8(x), mask=inside)
        else:
            tl.store(pages + line * D + d, to_e4m3(x), mask=inside)
    else:
        tl.store(pages + line * D + d, x.to(pages.dtype.element_ty), mask=inside)


@triton.jit
def write_queries(
    joined, bias, gain, gain_bias, cos, sin, q_out, row, start, eps,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """One row's queries, normed and rotated."""
    turned, inside = normed_and_turned(
        joined, bias, gain, gain_bias, cos, sin, row, start, 0, eps, HEADS, HEADS_BLOCK, D, D_BLOCK, HALF, INTERLEAVED,
        BIAS, NORM, LAYER,
    )  # fmt: skip
    place = (row * HEADS + tl.arange(0, HEADS_BLOCK)[:, None]) * D + tl.arange(0, D_BLOCK)[None, :]
    tl.store(q_out + place, turned.to(q_out.dtype.element_ty), mask=inside)


@triton.jit
def write_keys(
    joined, bias, gain, gain_bias, cos, sin, slots, keys, key_scales, rot_k_out, row, start, first, eps,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr, PAGE: tl.constexpr,
    SCALED: tl.constexpr, LARGEST: tl.constexpr, STORE: tl.constexpr, OPEN: tl.constexpr,
):  # fmt: skip
    """One row's keys, normed and rotated, to the pages and, opened, as they are."""
    turned, inside = normed_and_turned(
        joined, bias, gain, gain_bias, cos, sin, row, start + first, first, eps, HEADS, HEADS_BLOCK, D, D_BLOCK, HALF,
        INTERLEAVED, BIAS, NORM, LAYER,
    )  # fmt: skip
    if OPEN:
        place = (row * HEADS + tl.arange(0, HEADS_BLOCK)[:, None]) * D + tl.arange(0, D_BLOCK)[None, :]
        tl.store(rot_k_out + place, turned, mask=inside)
    if STORE:
        slot = tl.load(slots + row)
        store_heads(turned, keys, key_scales, slot, inside, HEADS, HEADS_BLOCK, D, D_BLOCK, PAGE, SCALED, LARGEST)


@triton.jit
def write_values(
    joined, bias, slots, values, value_scales, row, start, first,
    HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, BIAS: tl.constexpr,
    PAGE: tl.constexpr, SCALED: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One row's values to the pages."""
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    d = tl.arange(0, D_BLOCK)[None, :]
    inside = (head < HEADS) & (d < D)
    x = load_part(joined, bias, start + first + head * D + d, first + head * D + d, inside, BIAS)
    slot = tl.load(slots + row)
    store_heads(x, values, value_scales, slot, inside, HEADS, HEADS_BLOCK, D, D_BLOCK, PAGE, SCALED, LARGEST)


@triton.jit
def qkv_kernel(
    joined, bias, q_gain, q_gain_bias, k_gain, k_gain_bias, cos, sin, slots, keys, values, key_scales, value_scales,
    q_out, rot_k_out, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, D: tl.constexpr,
    D_BLOCK: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    LAYER: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr, LARGEST: tl.constexpr, STORE: tl.constexpr,
    OPEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    start = row * (HEADS + 2 * KV_HEADS) * D
    if part == 0:
        write_queries(
            joined, bias, q_gain, q_gain_bias, cos, sin, q_out, row, start, eps, HEADS, HEADS_BLOCK, D, D_BLOCK, HALF,
            INTERLEAVED, BIAS, NORM, LAYER,
        )  # fmt: skip
    if part == 1:
        write_keys(
            joined, bias, k_gain, k_gain_bias, cos, sin, slots, keys, key_scales, rot_k_out, row, start, HEADS * D, eps,
            KV_HEADS, KV_BLOCK, D, D_BLOCK, HALF, INTERLEAVED, BIAS, NORM, LAYER, PAGE, SCALED, LARGEST, STORE, OPEN,
        )  # fmt: skip
    if part == 2 and STORE:
        write_values(
            joined, bias, slots, values, value_scales, row, start, (HEADS + KV_HEADS) * D, KV_HEADS, KV_BLOCK, D,
            D_BLOCK, BIAS, PAGE, SCALED, LARGEST,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turned:
    """Queries [T, heads, d_head] in the served dtype and, opened, keys fp32 [T, kv_heads, d_head], both rotated."""

    q: Tensor
    rot_k: Tensor | None


def finish_qkv(
    config: ModelConfig, w: LayerWeights, joined: Tensor, rope: Rope | None, rotation: tuple[Tensor, Tensor] | None,
    slots: Tensor, layer: int, pages: Pages | None, *, opened: bool = False,
) -> Turned:  # fmt: skip
    """From joined [T, (H + 2K) * D]: queries; keys and values go to `pages` of `layer` where the slots [T] say."""
    joined = flat(joined)
    rows = len(joined)
    q = joined.new_empty(rows, config.n_heads, config.d_head)
    rot_k = joined.new_empty(rows, config.n_kv_heads, config.d_head, dtype=torch.float32) if opened else None
    cos, sin = (None, None) if rotation is None else (flat(rotation[0]), flat(rotation[1]))
    block, kv_block = power_of_two(config.n_heads), power_of_two(config.n_kv_heads)
    d_block = power_of_two(config.d_head)
    if rows:
        qkv_kernel[(rows, 3)](
            joined, w.qkv_bias, *_gains(w.q_norm), *_gains(w.k_norm), cos, sin, slots, *stored(pages, layer), q, rot_k,
            config.norm_eps, HEADS=config.n_heads, KV_HEADS=config.n_kv_heads, HEADS_BLOCK=block, KV_BLOCK=kv_block,
            D=config.d_head, D_BLOCK=d_block, HALF=0 if rope is None else rope.dims // 2,
            INTERLEAVED=rope is not None and rope.interleaved, BIAS=w.qkv_bias is not None, NORM=config.qk_norm,
            LAYER=config.norm == "layer", PAGE=1 if pages is None else pages.page_size,
            SCALED=pages is not None and pages.key_scales is not None,
            LARGEST=0.0 if pages is None else LARGEST.get(pages.keys.dtype, 0.0), STORE=pages is not None,
            OPEN=opened, num_warps=warps(block * d_block), **EXACT,
        )  # fmt: skip
    return Turned(q, rot_k)


def stored(pages: Pages | None, layer: int) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """One layer's keys, values and their scales (None where the pages have none)."""
    if pages is None:
        return None, None, None, None
    keys, values = pages.keys[layer], pages.values[layer]
    if pages.key_scales is None or pages.value_scales is None:
        return keys, values, None, None
    return keys, values, pages.key_scales[layer], pages.value_scales[layer]


def _gains(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.gain, norm.bias)
