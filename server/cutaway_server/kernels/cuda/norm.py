"""Residual + what is added, and the norm of it: one program a row, everything in fp32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cutaway_server.kernels.cuda.launch import EXACT, flat, power_of_two, warps
from cutaway_server.kernels.reference import Normed
from cutaway_server.kernels.weights import Norm


@triton.jit
def normalise(x, inside, width, eps, gain, bias, column, LAYER: tl.constexpr, BIAS: tl.constexpr):
    """RMSNorm or LayerNorm of one row: what divides, the values before the gain, and after gain and bias."""
    if LAYER:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    scale = tl.sqrt_rn(tl.sum(x * x, 0) / width + eps)
    normalized = x / scale
    out = normalized * tl.load(gain + column, mask=inside, other=0.0)
    if BIAS:
        out = out + tl.load(bias + column, mask=inside, other=0.0)
    return scale, normalized, out


@triton.jit
def add_norm_kernel(
    residual, delta, delta_bias, post_gain, post_bias, gain, bias,
    residual_out, x_out, added_out, post_scale, post_normalized, post_out, scale_out, normalized_out, norm_out,
    width, eps,
    BLOCK: tl.constexpr, ADD: tl.constexpr, DELTA_BIAS: tl.constexpr, POST: tl.constexpr, NORM: tl.constexpr,
    LAYER: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, EMIT: tl.constexpr, OPEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    x = tl.load(residual + place, mask=inside, other=0.0)
    if ADD:
        added = tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        if DELTA_BIAS:
            added = added + tl.load(delta_bias + column, mask=inside, other=0.0)
        if POST:
            scale, normalized, added = normalise(added, inside, width, eps, post_gain, post_bias, column, LAYER, BIAS)
            if OPEN:
                tl.store(post_scale + row, scale)
                tl.store(post_normalized + place, added if LAYER else normalized, mask=inside)
                tl.store(post_out + place, added, mask=inside)
        if OPEN:
            tl.store(added_out + place, added, mask=inside)
        x = x + added
    if KEEP:
        tl.store(residual_out + place, x, mask=inside)
    if NORM:
        scale, normalized, x = normalise(x, inside, width, eps, gain, bias, column, LAYER, BIAS)
        if OPEN:
            tl.store(scale_out + row, scale)
            tl.store(normalized_out + place, x if LAYER else normalized, mask=inside)
            tl.store(norm_out + place, x, mask=inside)
    if EMIT:
        tl.store(x_out + place, x.to(x_out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Delta:
    """What is added to the residual: a product [T, d], its bias, and the norm of their sum (post-norm)."""

    product: Tensor
    bias: Tensor | None
    post: Norm | None


@dataclass(frozen=True, slots=True)
class AddNorm:
    """Values of one row-wise step; those that were not asked for are None."""

    residual: Tensor  # fp32 [T, d]
    x: Tensor | None  # what the next product reads, in the served dtype
    added: Tensor | None  # fp32 [T, d]
    post: Normed | None
    norm: Normed | None


def add_norm(
    residual: Tensor, delta: Delta | None, norm: Norm | None, *, eps: float, layer_norm: bool,
    emit: torch.dtype | None = None, opened: bool = False,
) -> AddNorm:  # fmt: skip
    """Add `delta` to residual fp32 [T, d] and norm the sum.

    `emit` is the dtype in which the result is handed on; `opened` keeps every value on the way.
    """
    residual = flat(residual)
    rows, width = residual.shape
    kept = residual if delta is None else torch.empty_like(residual)
    x = None if emit is None else torch.empty_like(residual, dtype=emit)
    added = torch.empty_like(residual) if opened and delta is not None else None
    after = _values(residual) if opened and delta is not None and delta.post is not None else None
    normed = _values(residual) if opened and norm is not None else None
    if rows:
        block = power_of_two(width)
        post = None if delta is None else delta.post
        add_norm_kernel[(rows,)](
            residual, None if delta is None else flat(delta.product), None if delta is None else delta.bias,
            *_parts(post), *_parts(norm), kept, x, added, *_places(after), *_places(normed), width, eps,
            BLOCK=block, ADD=delta is not None, DELTA_BIAS=delta is not None and delta.bias is not None,
            POST=post is not None, NORM=norm is not None, LAYER=layer_norm, BIAS=layer_norm, KEEP=delta is not None,
            EMIT=emit is not None, OPEN=opened, num_warps=warps(block), **EXACT,
        )  # fmt: skip
    return AddNorm(kept, x, added, after, normed)


def _values(x: Tensor) -> Normed:
    return Normed(x.new_empty(len(x), 1), torch.empty_like(x), torch.empty_like(x))


def _parts(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.gain, norm.bias)


def _places(values: Normed | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if values is None else (values.scale, values.normalized, values.out)
