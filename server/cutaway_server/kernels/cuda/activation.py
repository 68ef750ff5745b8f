"""From the product of the MLP's first matrix to its hidden layer: bias, activation, gate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cutaway_server.kernels.cuda.launch import EXACT, flat

BLOCK = 1024


@triton.jit
def tanh(x):
    """Hyperbolic tangent within 1e-7; exact at both infinities."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activation named `KIND`."""
    if KIND == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif KIND == "relu":
        x = tl.maximum(x, 0.0)
    elif KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return x


@triton.jit
def activation_kernel(
    joined, bias, post, pre_out, linear_out, width,
    KIND: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, OPEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first = row * (2 * width if GATED else width) + column
    place = row * width + column
    pre = tl.load(joined + first, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        pre = pre + tl.load(bias + column, mask=inside, other=0.0)
    out = activate(pre, KIND)
    if GATED:
        linear = tl.load(joined + first + width, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            linear = linear + tl.load(bias + width + column, mask=inside, other=0.0)
        out = out * linear
        if OPEN:
            tl.store(linear_out + place, linear, mask=inside)
    if OPEN:
        tl.store(pre_out + place, pre, mask=inside)
    tl.store(post + place, out.to(post.dtype.element_ty), mask=inside)


def activation(
    joined: Tensor, bias: Tensor | None, *, kind: str, gated: bool, opened: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From joined [T, 2F] (gate, then up) or [T, F]: post [T, F] in its dtype; opened, pre and up too, fp32 [T, F]."""
    joined = flat(joined)
    rows, width = joined.shape[0], joined.shape[1] // (2 if gated else 1)
    post = joined.new_empty(rows, width)
    pre = torch.empty_like(post, dtype=torch.float32) if opened else None
    linear = torch.empty_like(post, dtype=torch.float32) if opened and gated else None
    if rows:
        activation_kernel[(rows, triton.cdiv(width, BLOCK))](
            joined, bias, post, pre, linear, width, KIND=kind, GATED=gated, BIAS=bias is not None, OPEN=opened,
            BLOCK=BLOCK, num_warps=4, **EXACT,
        )  # fmt: skip
    return post, pre, linear
